"""Prompts of tasks as turns of a chat: the question is asked, the answer begun.

Tasks end in words that the answer follows ("The pass key is"). In a chat these begin
the assistant's turn, and the user's turn asks for what goes on from them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from kvjax.evaluation.tasks import haystack
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.interface import Tokenizer

T = TypeVar("T", bound=Prompted)

# An example of another wording has it as `asks`.
ASKED = "\n\nFrom the text above, complete the line that begins with: "


def turn(tokenizer: Tokenizer, content: str) -> str:
    """The user's turn of a chat and the opening of the assistant's, as text.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    apply = getattr(tokenizer, "apply_chat_template", None)
    if apply is None:
        raise ValueError("the tokenizer has no chat template: leave chat out.")
    return apply([{"role": "user", "content": content}], tokenize=False)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of what :func:`turn` writes: its special tokens are in the text."""
    return cast(Any, tokenizer).encode(text, add_special_tokens=False)


def fitted(
    tokenizer: Tokenizer,
    make: Callable[[int], list[T]],
    context: int,
    *,
    is_chat: bool,
) -> list[T]:
    """The examples of a task, in the model's chat template if it is a chat.

    The last line of an example's text, which its answer completes, becomes the
    beginning of the assistant's turn, and is what the user asks for.

    Args:
        tokenizer: has a chat template.
        make: examples whose prompts and answers take at most so many tokens.
        context: most tokens of prompt and answer, the template's included.
        is_chat: else they are as made.

    Raises:
        ValueError: as `make`, and if there is no chat template.
    """
    if not is_chat:
        return make(context)
    room = context
    while True:
        found = [_asked(tokenizer, example) for example in make(room)]
        longest = max(len(made.prompt) + made.answer_tokens for made in found)
        if longest <= context:
            return found
        room -= longest - context


class _Verbatim(NamedTuple):
    """A tokenizer of texts that have their special tokens in them."""

    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)


def _asked(tokenizer: Tokenizer, example: T) -> T:
    body, _, begun = example.text.rpartition("\n")
    asks = getattr(example, "asks", ASKED)
    text = turn(tokenizer, f"{body}{asks}{begun.strip()}") + begun
    context = haystack.context_of(tokenizer, example)
    made = haystack.ask(
        _Verbatim(tokenizer),
        text,
        example.answer,
        context=turn(tokenizer, context) if context else "",
    )
    return cast(Any, example)._replace(**made._asdict())
