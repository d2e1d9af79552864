"""Extraction: a list in HTML, written again as a table of two columns, row after row.

The output is long and each row of it needs another place of the prompt, the one after
the last: what a method chose when decoding began does not last.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvjax.evaluation.tasks import haystack
from kvjax.evaluation.tasks.haystack import Needles
from kvjax.evaluation.tasks.words import WORDS
from kvjax.interface import Tokenizer
from kvjax.text import encoding

ROWS = 12
NUMBERS = range(100, 1000)  # three digits, as few tokens as a tokenizer has for them


class Extraction(NamedTuple):
    """A prompt with a list, and its table begun; one continuation is right."""

    text: str
    prompt: list[int]  # the text as tokens
    answer: str  # the first row's number, then the other rows
    answer_tokens: int  # tokens the answer takes after the prompt
    start: str  # the first row's name, with which the prompt ends
    rows: tuple[tuple[str, str], ...]  # names and numbers, as they are asked for
    asked_at: int = 0  # tokens of the prompt before anything is asked

    @property
    def asks(self) -> str:
        """The request of a chat's user, up to the first row's name."""
        return (
            f"\n\nGo on with the table: {len(self.rows)} rows of the list above, in "
            "its order, each a line with the name, a tab and the number. The first row "
            "begins with: "
        )

    def score(self, generated: str) -> float:
        """F1 of the rows, in [0, 1]: a row counts if name and number are right.

        Of the generated lines only as many are looked at as rows are asked for. A line
        that is no row is a wrong one, and so is a row said twice.
        """
        table = self.text[self.text.rindex(self.start) :] + generated
        lines = table.split("\n")[: len(self.rows)]
        rows = [tuple(cell.strip() for cell in line.split("\t")) for line in lines]
        correct = (Counter(rows) & Counter(self.rows)).total()
        return 2 * correct / (len(rows) + len(self.rows))


def extraction(
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int,
    n: int,
    seed: int = 0,
    rows: int = ROWS,
    items: int | None = None,
) -> list[Extraction]:
    """A list of names and numbers in HTML, and a table that goes on from one of them.

    The list is a line an item, ``apple 481``, between ``<pre>`` and ``</pre>``; no name
    and no number twice. The prompt ends with ``table:``, a line end, ``apple`` and a
    tab, and goes on, if `rows` is 2, with ``481``, ``river``, a tab and ``920``. The
    first row is any item with enough others after it.

    Args:
        tokenizer: of the model under test.
        text: lines that surround the list where it leaves room.
        context: most tokens of prompt and answer together.
        n: examples.
        seed: of names, numbers and the first row.
        rows: that are asked for, the first included.
        items: in the list; None is as many as fit, at most one a word of
            :data:`kvjax.evaluation.tasks.words.WORDS`.

    Raises:
        ValueError: if `n` or `rows` < 1, `items` is not in [rows, words], the list does
            not fit, lines are needed and the text has none, or the tokenizer cannot
            say the answer.

    Source:
        After LongProc's HTML-to-TSV, Ye et al., arXiv:2501.05414, which RefreshKV uses
        (arXiv:2411.05787, section 5); rows are scored as there.
    Deviations:
        Generated: one list instead of a whole page, two columns, no header, no
        instruction, and the first row's name is given, so that a model that follows no
        instruction can be asked.
    """
    if n < 1 or rows < 1:
        raise ValueError(f"{n=} and {rows=} must be at least 1.")
    if items is not None and not rows <= items <= len(WORDS):
        raise ValueError(f"{items=} must be in [{rows=}, {len(WORDS)}].")

    @functools.cache
    def source():
        return haystack.source(tokenizer, text, lambda line: "pre>" in line)

    def example(index: int) -> Extraction:
        rng = np.random.default_rng((seed, index))
        names = rng.permutation(WORDS).tolist()
        numbers = rng.permutation(NUMBERS)[: len(names)].astype(str).tolist()
        pairs = list(zip(names, numbers, strict=True))
        place, share = rng.random(2).tolist()

        def listed(count: int) -> Needles:
            first = int(share * (count - rows + 1))
            return _needles(pairs[:count], pairs[first : first + rows], place)

        def fits(count: int) -> bool:
            alone = listed(count)
            whole = "".join([*alone.lines, alone.question, alone.answer])
            return len(encoding.begin(tokenizer.encode, whole)) <= context

        count = items or haystack.largest(fits, rows, len(pairs))
        lines, sizes = [], {}
        if items is not None or count == len(pairs):  # there may be room left
            lines = haystack.cut(source(), rng, context)
            sizes = source().sizes
        needles = listed(count)
        asked = haystack.fit(tokenizer, lines, sizes, needles, context)
        first = int(share * (count - rows + 1))
        table = tuple(pairs[first : first + rows])
        return Extraction(**asked._asdict(), start=table[0][0], rows=table)

    return [example(index) for index in range(n)]


def _needles(
    pairs: Sequence[tuple[str, str]], asked: Sequence[tuple[str, str]], place: float
) -> Needles:
    """The whole list is one needle, and its table what is asked for."""
    items = "".join(f"{name} {number}\n" for name, number in pairs)
    table = "\n".join(f"{name}\t{number}" for name, number in asked)
    start = asked[0][0] + "\t"
    question = f"\ntable:\n{start}"
    listed = f"<pre>\n{items}</pre>\n"
    return Needles([listed], [place], question, table.removeprefix(start))
