"""Examples that are scored by string match: a context, a question, the answers.

The parts are kvpress's: what is read before it is asked, what is asked, and the words
that begin the answer. An example is as many lines of context as fit.
"""

from collections.abc import Callable
from typing import NamedTuple

from kvjax.evaluation.tasks import chat
from kvjax.interface import Tokenizer
from kvjax.text import encoding


class Parts(NamedTuple):
    """The texts of an example; one behind the other they are its prompt."""

    context: str  # its line end included
    question: str
    prefix: str  # begins the answer, as RULER has it: with a blank before it
    answers: tuple[str, ...]


class Kind(NamedTuple):
    """The parts of a task that all of its examples share."""

    task: str
    reply: int  # most tokens of an answer
    is_any: bool = False  # one answer is enough: questions; else each counts its share


class Matched(NamedTuple):
    """A prompt, and the texts that a right reply contains."""

    text: str
    prompt: list[int]  # the text as tokens
    asked_at: int  # of the prompt's tokens, those of the context
    parts: Parts
    kind: Kind

    @property
    def task(self) -> str:
        """The task's name, as RULER has it."""
        return self.kind.task

    @property
    def answers(self) -> tuple[str, ...]:
        """All texts that are looked for."""
        return self.parts.answers

    @property
    def answer(self) -> str:
        """A reply that scores 1."""
        said = self.answers[:1] if self.kind.is_any else self.answers
        return " " + ", ".join(said)

    @property
    def answer_tokens(self) -> int:
        """The tokens that a reply may take."""
        return self.kind.reply

    def score(self, generated: str) -> float:
        """Scores a reply by string match, as RULER does, in [0, 1].

        The share of the answers that the reply contains, wherever; of questions, 1 if
        it contains one. Capitals do not matter.
        """
        reply = generated.lower()
        found = [answer.lower() in reply for answer in self.answers]
        return float(any(found)) if self.kind.is_any else sum(found) / len(found)


def prompted(
    tokenizer: Tokenizer, parts: Parts, kind: Kind, *, is_chat: bool = False
) -> Matched:
    """Returns an example as tokens.

    The blanks that end `parts.prefix` are the answer's, since with most tokenizers a
    blank is one token with what follows. In a chat, context and question are the user's
    turn, and the prefix, without the blank before it, begins the assistant's.

    Raises:
        ValueError: if the tokenizer has no chat template, under `is_chat`.
    """
    text, tokens = _whole(tokenizer, parts, is_chat)
    if is_chat:
        # A template may take blanks from the ends of a turn.
        at = text.rfind(parts.question.strip())
        known = chat.encode(tokenizer, text[: max(at, 0)])
    else:
        known = encoding.begin(tokenizer.encode, parts.context)
    return Matched(text, tokens, encoding.shared(known, tokens), parts, kind)


def _whole(tokenizer: Tokenizer, parts: Parts, is_chat: bool) -> tuple[str, list[int]]:
    """Returns a prompt as text and as tokens."""
    prefix = parts.prefix.rstrip(" ")
    if is_chat:
        turn = chat.turn(tokenizer, parts.context + parts.question)
        text = turn + prefix.lstrip(" ")
        return text, chat.encode(tokenizer, text)
    text = parts.context + parts.question + prefix
    return text, encoding.begin(tokenizer.encode, text)


def fitted(
    tokenizer: Tokenizer,
    build: Callable[[int], Parts],
    kind: Kind,
    *,
    context: int,
    least: int = 1,
    most: int = 1 << 40,
    is_chat: bool = False,
) -> Matched:
    """Returns the example of as many lines as fit.

    Args:
        tokenizer: of the model under test.
        build: the parts of an example of so many lines (or words, or documents).
        kind: of the task; prompt and `kind.reply` together take at most `context`.
        context: tokens.
        least, most: lines.
        is_chat: in the model's chat template.

    Raises:
        ValueError: if the least lines do not fit.
    """

    def size(count: int) -> int:
        return len(_whole(tokenizer, build(count), is_chat)[1]) + kind.reply

    if (shortest := size(least)) > context:
        raise ValueError(
            f"{context=} is too short for {kind.task}: its prompt takes at least "
            f"{shortest - kind.reply} tokens, and an answer {kind.reply}."
        )
    count = largest(size, context, least, most)
    return prompted(tokenizer, build(count), kind, is_chat=is_chat)


def largest(size: Callable[[int], int], room: int, least: int, most: int) -> int:
    """Returns the largest count whose size is at most `room`; that of `least` is.

    Sizes are measured few times: each is a text that is put together and tokenized.
    """
    low, fits = least, size(least)
    first, high, beyond = fits, most + 1, room
    by_slope = True
    while high - low > 1:
        if high == most + 1:  # none was too large yet
            slope = (fits - first) / (low - least) if low > least else 0.0
            step = (room - fits) / slope + 1 if slope > 0 else max(low, 8)
        elif by_slope:
            step = (room - fits) * (high - low) / max(beyond - fits, 1)
        else:
            step = (high - low) / 2
        by_slope = not by_slope
        middle = min(max(low + round(min(step, most)), low + 1), high - 1)
        measured = size(middle)
        if measured <= room:
            low, fits = middle, measured
        else:
            high, beyond = middle, measured
    return low


def unused(draw: Callable[[], str], count: int, text: str = "") -> list[str]:
    """Draws `count` different texts, none of which stands in `text`."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        one = draw()
        if one not in text:
            drawn[one] = None
    return list(drawn)


def check_examples(n: int, seed: int) -> None:
    """Raises ValueError unless there is an example, and the seed is not negative."""
    if n < 1:
        raise ValueError(f"{n=} must be at least 1.")
    if seed < 0:
        raise ValueError(f"{seed=} must not be negative.")
