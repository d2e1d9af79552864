"""Lines of a text with a few of our own among them, fitted to a context.

What tasks with hidden facts are made of: which lines, where, and how many of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from kvjax.interface import Tokenizer
from kvjax.text import encoding
from kvjax.text.stream import continuation


@runtime_checkable
class Prompted(Protocol):
    """An example of any task: a prompt, its right answer, and how a reply scores.

    The prompt is context up to `asked_at`, and from there on what is asked about it:
    examples of equal `prompt[:asked_at]` may share one reading of it. In a chat the
    question is the rest of the turn, and the opening of the next.
    """

    @property
    def text(self) -> str: ...

    @property
    def prompt(self) -> list[int]: ...

    @property
    def asked_at(self) -> int: ...

    @property
    def answer(self) -> str: ...

    @property
    def answer_tokens(self) -> int: ...

    def score(self, generated: str) -> float: ...


class Needles(NamedTuple):
    """Needles that one example hides in a text, and what it asks for at the end."""

    lines: Sequence[str]  # with their line ends, in the order of the text
    places: Sequence[float]  # of each, in [0, 1]: 0 = before the text, 1 = after it
    question: str
    answer: str


class Asked(NamedTuple):
    """A question as a prompt, which the right answer goes on with."""

    text: str
    prompt: list[int]  # the text as tokens
    answer: str
    answer_tokens: int  # tokens the answer takes after the prompt
    asked_at: int = 0  # tokens of the prompt before anything is asked


class Source(NamedTuple):
    """The lines a haystack is cut from, and what each costs."""

    lines: list[str]  # with their line ends
    sizes: dict[str, int]  # tokens of a line on its own


def source(tokenizer: Tokenizer, text: str, is_taken: Callable[[str], bool]) -> Source:
    """The lines of a text that are not themselves like a needle.

    Raises:
        ValueError: if no line is left.
    """
    lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
    lines = [line for line in lines if not is_taken(line)]
    if not text.strip() or not lines:
        raise ValueError("the haystack's text has no line that is not itself a needle.")
    around = sum(map(len, encoding.added(tokenizer.encode)))
    # At least 1, so that the lines of a haystack are finite whatever the tokenizer.
    sizes = {x: max(len(tokenizer.encode(x)) - around, 1) for x in set(lines)}
    return Source(lines, sizes)


def cut(source: Source, rng: np.random.Generator, context: int) -> list[str]:
    """Lines of `context` tokens or a little more, from a random one on.

    Where the text ends they go on from its first line.
    """
    first = int(rng.integers(len(source.lines)))
    lines, used = [], 0
    while used <= context:
        lines.append(source.lines[(first + len(lines)) % len(source.lines)])
        used += source.sizes[lines[-1]]
    return lines


def fit(
    tokenizer: Tokenizer,
    lines: list[str],
    sizes: dict[str, int],
    needles: Needles,
    context: int,
) -> Asked:
    """Hides the needles among `lines`, of which the last go until everything fits.

    Raises:
        ValueError: if the needles alone do not fit, or the tokenizer cannot say the
            answer behind the question.
    """
    lines = list(lines)
    while True:
        body = insert(lines, [sizes[line] for line in lines], needles)
        text = body + needles.question
        whole = len(encoding.begin(tokenizer.encode, text + needles.answer))
        if whole <= context:
            return ask(tokenizer, text, needles.answer, context=body)
        if not lines:
            raise ValueError(
                f"{context=} is too short: the needle, its question and its answer "
                f"take {whole} tokens."
            )
        while lines and whole > context:
            whole -= sizes[lines.pop()]


def ask(
    tokenizer: Tokenizer, question: str, answer: str, *, context: str = ""
) -> Asked:
    """Cuts the tokens of question and answer as one text where the answer begins.

    A tokenizer may join the blank that ends a question with the answer's first letters:
    the blank is then the answer's.

    Args:
        question: all of the text before the answer, a context too.
        context: a text that knows nothing of what is asked, as what `question` begins
            with. The tokens that both begin with are the prompt's context.

    Raises:
        ValueError: if the tokens of the right answer do not say it.
    """
    encode, decode = tokenizer.encode, tokenizer.decode
    whole = encoding.begin(encode, question + answer)

    def reply(end: int) -> str:
        return continuation(decode, whole[:end], whole[end:])

    end = encoding.shared(encoding.begin(encode, question), whole)
    least = max(end - 8, 0)
    while end > least and not reply(end).endswith(answer):
        end -= 1
    while end < len(whole) and reply(end + 1).endswith(answer):
        end += 1
    joined = reply(end).removesuffix(answer)
    if not reply(end).endswith(answer) or not question.endswith(joined):
        raise ValueError(
            f"the tokenizer cannot say {answer[:40]!r} behind {question[-20:]!r}: the "
            f"tokens of both decode to {reply(end)[:40]!r}. Use a model with another "
            "tokenizer for this task."
        )
    text = question.removesuffix(joined)
    prompt, asked_at = whole[:end], 0
    if context:
        asked_at = encoding.shared(encoding.begin(encode, context), prompt)
    return Asked(text, prompt, joined + answer, len(whole) - end, asked_at)


def context_of(tokenizer: Tokenizer, example: Prompted) -> str:
    """Returns what of an example's text is context, in whole characters.

    Of a text without special tokens: the prompt of no chat.
    """
    context = continuation(tokenizer.decode, [], example.prompt[: example.asked_at])
    return context[: encoding.shared(context, example.text)]


def whole(tokenizer: Tokenizer, example: Prompted) -> list[int]:
    """Returns the tokens of an example's prompt with the right answer behind it.

    Raises:
        ValueError: if they do not begin with those of the prompt.
    """
    tokens = encoding.begin(tokenizer.encode, example.text + example.answer)
    if tokens[: len(example.prompt)] != list(example.prompt):
        raise ValueError(
            f"the tokenizer joins {example.text[-20:]!r} and its answer "
            f"{example.answer[:40]!r}: cut the prompt with haystack.ask."
        )
    return tokens


def insert(lines: Sequence[str], sizes: Sequence[int], needles: Needles) -> str:
    """Each needle at the line boundary nearest to its place, measured in tokens."""
    ends = np.cumsum([0, *sizes])
    by_boundary: dict[int, list[str]] = {}
    for needle, place in zip(needles.lines, needles.places, strict=True):
        boundary = int(np.abs(ends - place * ends[-1]).argmin())
        by_boundary.setdefault(boundary, []).append(needle)
    pieces = []
    for index in range(len(lines) + 1):
        pieces += by_boundary.get(index, [])
        pieces += lines[index : index + 1]
    return "".join(pieces)


def largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest count that fits; `least` if none does."""
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least


def new_numbers(rng: np.random.Generator, text: str, count: int) -> list[str]:
    """Five digits each that the text does not contain, not even inside a number."""
    numbers: list[str] = []
    while len(numbers) < count:
        number = str(rng.integers(10_000, 100_000))
        if number not in text and number not in numbers:
            numbers.append(number)
    return numbers
