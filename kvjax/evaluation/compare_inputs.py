"""The inputs of a comparison: the same for every method, and what they are made by."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from kvjax.attention.choices import check_choice
from kvjax.decoding.checks import check_counts, check_seed
from kvjax.evaluation.tasks import chain, chat, needles
from kvjax.evaluation.tasks import own as tasks_own
from kvjax.evaluation.tasks.chain import Chain
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.evaluation.tasks.needles import Example
from kvjax.evaluation.tasks.own import Own, Question
from kvjax.interface import LanguageModel

# When tasks ask: as a prompt ends, after a method has chosen what to keep, or both.
When = Literal["seen", "after", "both"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run; the same for every method.

    Attributes:
        context: tokens of every input, what follows the prompt included.
        new_tokens: tokens after the prompt: generated, or fed and predicted.
        examples: of each retrieval task.
        links: of a chain; fewer where `new_tokens` cannot hold so many.
        windows: of the text.
        batch: rows decoded together; cache memory grows with it.
        depths: where needles are hidden, 0 = start of the prompt, 1 = end.
        seed: of every input.
        chunk_size: most prompt tokens processed at once; a second reading takes the
            method's own `chunk`.
        question: when tasks ask: `seen`, as the prompt ends, `after` a method has
            chosen what to keep of it, or `both`.
    """

    context: int = 512
    new_tokens: int = 64
    examples: int = 15
    links: int = chain.LINKS
    windows: int = 8
    batch: int = 8
    depths: tuple[float, ...] = needles.DEPTHS
    seed: int = 0
    chunk_size: int = 1024
    question: str = "seen"

    def __post_init__(self):
        check_choice("question", self.question, When)
        counts = "context", "new_tokens", "examples", "links", "windows", "batch"
        counts = (*counts, "chunk_size")
        check_counts(**{name: getattr(self, name) for name in counts})
        check_seed(self.seed)
        for name in (*counts, "seed"):  # those of NumPy are no JSON
            object.__setattr__(self, name, int(getattr(self, name)))
        if not 2 <= self.new_tokens < self.context:
            raise ValueError(
                f"new_tokens={self.new_tokens} must be in [2, context={self.context})."
            )

    @property
    def questions(self) -> tuple[str, ...]:
        """The times at which tasks ask, one or both."""
        return ("seen", "after") if self.question == "both" else (self.question,)


class Inputs(NamedTuple):
    """The inputs that every method is given."""

    passkey: list[Example]
    multikey: list[Example]
    chain: list[Chain]
    windows: list[list[int]]
    own: Sequence[Own] = ()  # the user's questions


def make_inputs(
    model: LanguageModel,
    text: str,
    settings: Settings,
    *,
    questions: Sequence[Question] = (),
    is_chat: bool = False,
) -> Inputs:
    """The inputs of a comparison.

    Args:
        model: decoder, weights and tokenizer.
        text: what tasks and windows are made of.
        settings: the same as of the comparison.
        questions: the user's own.
        is_chat: tasks are turns in the model's chat template; windows are not.

    Raises:
        ValueError: if the context exceeds the model's, the text is too short, or
            a question does not fit.
    """
    check_context(model, settings.context)
    tokenizer, new_tokens = model.tokenizer, settings.new_tokens

    room = settings.context - new_tokens

    def examples(task):
        # The answer begins what is generated: leave all of it room.
        made = chat.fitted(
            tokenizer,
            lambda context: task(
                tokenizer,
                text,
                context=context,
                n=settings.examples,
                seed=settings.seed,
                depths=settings.depths,
            ),
            room,
            is_chat=is_chat,
        )
        if _longest(made) > new_tokens:
            raise ValueError(
                f"{new_tokens=} cannot hold an answer of {_longest(made)} tokens: "
                "raise it."
            )
        return made

    return Inputs(
        examples(needles.passkey),
        examples(needles.multikey),
        _chains(tokenizer, text, room, settings, is_chat),
        needles.windows(
            tokenizer,
            text,
            context=settings.context,
            n=settings.windows,
            seed=settings.seed,
            named="windows",
        ),
        tasks_own.prompts(
            tokenizer,
            questions,
            context=settings.context,
            new_tokens=new_tokens,
            is_chat=is_chat,
        ),
    )


def _longest(examples: Sequence[Prompted]) -> int:
    return max(example.answer_tokens for example in examples)


def _chains(tokenizer, text, room, settings, is_chat) -> list[Chain]:
    def make(context: int, links: int) -> list[Chain]:
        return chain.chain_of_key(
            tokenizer,
            text,
            context=context,
            n=settings.examples,
            seed=settings.seed,
            links=links,
        )

    links = settings.links
    while True:
        made = chat.fitted(
            tokenizer, functools.partial(make, links=links), room, is_chat=is_chat
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
