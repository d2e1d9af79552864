"""The inputs of a comparison: the same for every method, and what they are made by."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from kvjax.evaluation import chain, tasks
from kvjax.evaluation.chain import Chain
from kvjax.evaluation.haystack import Prompted
from kvjax.evaluation.tasks import Example
from kvjax.interface import LanguageModel


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run; the same for every method.

    Attributes:
        context: tokens of every input, what follows the prompt included.
        new_tokens: tokens after the prompt: generated, or fed and predicted.
        examples: of each retrieval task.
        links: of a chain; fewer where `new_tokens` cannot hold so many.
        windows: of held-out text.
        batch: rows decoded together; cache memory grows with it.
        depths: where needles are hidden, 0 = start of the prompt, 1 = end.
        seed: of every input.
        chunk_size: most prompt tokens processed at once.
    """

    context: int = 512
    new_tokens: int = 64
    examples: int = 15
    links: int = chain.LINKS
    windows: int = 8
    batch: int = 8
    depths: tuple[float, ...] = tasks.DEPTHS
    seed: int = 0
    chunk_size: int = 1024

    def __post_init__(self):
        positive = "context", "examples", "links", "windows", "batch", "chunk_size"
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 2 <= self.new_tokens < self.context:
            raise ValueError(
                f"new_tokens={self.new_tokens} must be in [2, context={self.context})."
            )


class Inputs(NamedTuple):
    """What every method is given."""

    passkey: list[Example]
    multikey: list[Example]
    chain: list[Chain]
    windows: list[list[int]]


def make_inputs(model: LanguageModel, text: str, settings: Settings) -> Inputs:
    """The inputs of a comparison.

    Raises:
        ValueError: if the context exceeds the model's, or the text is too short.
    """
    check_context(model, settings.context)
    tokenizer, new_tokens = model.tokenizer, settings.new_tokens

    room = settings.context - new_tokens

    def examples(task):
        # The answer begins what is generated: leave all of it room.
        made = task(
            tokenizer,
            text,
            context=room,
            n=settings.examples,
            seed=settings.seed,
            depths=settings.depths,
        )
        if _longest(made) > new_tokens:
            raise ValueError(
                f"{new_tokens=} cannot hold an answer of {_longest(made)} tokens: "
                "raise it."
            )
        return made

    return Inputs(
        examples(tasks.passkey),
        examples(tasks.multikey),
        _chains(tokenizer, text, room, settings),
        tasks.windows(
            tokenizer,
            text,
            context=settings.context,
            n=settings.windows,
            seed=settings.seed,
        ),
    )


def _longest(examples: Sequence[Prompted]) -> int:
    return max(example.answer_tokens for example in examples)


def _chains(tokenizer, text, room, settings) -> list[Chain]:
    links = settings.links
    while True:
        made = chain.chain_of_key(
            tokenizer,
            text,
            context=room,
            n=settings.examples,
            seed=settings.seed,
            links=links,
        )
        longest = _longest(made)
        if longest <= settings.new_tokens:
            return made
        if links == 1:
            raise ValueError(
                f"new_tokens={settings.new_tokens} cannot hold one link of {longest} "
                "tokens: raise it."
            )
        links = max(min(links - 1, links * settings.new_tokens // longest), 1)


def check_context(model: LanguageModel, context: int) -> None:
    """Raises ValueError if `context` exceeds the model's."""
    if context > model.decoder.context:
        raise ValueError(
            f"{context=} exceeds the {model.decoder.context} tokens the model was made "
            "for: lower it or use another model."
        )
