"""Chain-of-key: a shuffled list of word pairs, and the chain that runs through it.

Each link sits anywhere in the list and is known only once the one before is found, so
what a method keeps of the prompt when decoding starts cannot be chosen for all of them.
"""

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from kvjax.evaluation.tasks import haystack
from kvjax.evaluation.tasks.haystack import Needles
from kvjax.evaluation.tasks.words import WORDS
from kvjax.interface import Tokenizer
from kvjax.text import encoding

LINKS = 5
_QUESTION = "chain: "


class Chain(NamedTuple):
    """A prompt that lists keys and begins a chain; one continuation is right."""

    text: str
    prompt: list[int]  # the text as tokens
    answer: str  # the first key but its first word, then the other keys
    answer_tokens: int  # tokens the answer takes after the prompt
    keys: frozenset[str]  # all that the text lists
    start: str  # the prompt's last word, which is the first key's first
    links: int  # keys that are asked for
    asked_at: int = 0  # tokens of the prompt before anything is asked

    def score(self, generated: str) -> float:
        """Share of the `links` keys that come before the first mistake, in [0, 1].

        The chain is the generated text's first line; keys beyond `links` do not count.
        """
        line = self.text.rpartition(_QUESTION)[2] + generated.partition("\n")[0]
        found = valid_prefix(self.keys, line) - 1  # was given
        return min(max(found, 0), self.links) / self.links


def valid_prefix(keys: Collection[str], text: str, *, follows: str = "") -> int:
    """Counts the valid keys of a comma separated chain, from its beginning.

    A key is valid if it is one of `keys` and its first word is the last word of the
    key before. The first mistake ends the count: what is right after it gives nothing.

    Args:
        keys: words joined by hyphens.
        text: the chain; blanks around a key do not matter.
        follows: word the first key must begin with; any if empty.
    """
    last, count = follows, 0
    for key in (piece.strip() for piece in text.split(",")):
        if key not in keys or (last and key.split("-")[0] != last):
            break
        last = key.split("-")[-1]
        count += 1
    return count


def chain_of_key(
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int,
    n: int,
    seed: int = 0,
    links: int = LINKS,
    keys: int | None = None,
) -> list[Chain]:
    """A list of keys in random order, a first key, and the next ones asked for.

    A key is two words: ``apple-river``. The keys of a list are one cycle through
    distinct words, so each has exactly one successor, the key whose first word is its
    own last one. The prompt ends with ``chain: apple-river, river``, and goes on, if
    `links` is 2, with ``-stone, stone-cloud``.

    Args:
        tokenizer: of the model under test.
        text: lines for what room the list leaves; not used if it leaves none.
        context: most tokens of prompt and answer together.
        n: examples.
        seed: of the words and their order.
        links: keys that are asked for, T in the paper.
        keys: in the list; None is as many as fit, at most one a word of
            :data:`kvjax.evaluation.tasks.words.WORDS`. Where there is room for more,
            lines of the text are between them.

    Raises:
        ValueError: if `n` or `links` < 1, `keys` is not in [links + 1, words], the
            list does not fit, lines are needed and the text has none, or the tokenizer
            cannot say the answer.

    Source:
        Xu et al., "RefreshKV", arXiv:2411.05787, section 3 and appendix A.6.
    Deviations:
        The first key is given, so that one answer is right; the paper lets the model
        choose it. No instruction and no worked example, so that a model that follows
        none can be asked; ``apple-river`` instead of ``Name of key: apple-river``. One
        cycle through all words: the paper does not say how long its cycles are. 5 links
        by default instead of 10.
    """
    if n < 1 or links < 1:
        raise ValueError(f"{n=} and {links=} must be at least 1.")
    if keys is not None and not links < keys <= len(WORDS):
        raise ValueError(
            f"{keys=} must be in [{links + 1}, {len(WORDS)}]: {links=} and the first "
            "key are all different."
        )

    @functools.cache
    def source():
        return haystack.source(tokenizer, text, _is_key_like)

    def example(index: int) -> Chain:
        rng = np.random.default_rng((seed, index))
        words = rng.permutation(WORDS).tolist()
        ranks = rng.random(len(words))

        def listed(count: int) -> Needles:
            return _list(words[:count], ranks[:count], links)

        def fits(count: int) -> bool:
            alone = listed(count)
            whole = "".join([*alone.lines, alone.question, alone.answer])
            return len(encoding.begin(tokenizer.encode, whole)) <= context

        count = keys or haystack.largest(fits, links + 1, len(words))
        lines, sizes = [], {}
        if keys is not None or count == len(words):  # there may be room left
            lines = haystack.cut(source(), rng, context)
            sizes = source().sizes
        needles = listed(count)
        asked = haystack.fit(tokenizer, lines, sizes, needles, context)
        return Chain(
            **asked._asdict(),
            keys=frozenset(line.strip() for line in needles.lines),
            start=words[1],
            links=links,
        )

    return [example(index) for index in range(n)]


def _list(words: Sequence[str], ranks: np.ndarray, links: int) -> Needles:
    """One cycle through the words, listed by rank, and the chain from its first key.

    With w words: ``words[0]-words[1]`` to ``words[w - 1]-words[0]``.
    """
    following = [*words[1:], words[0]]
    cycle = [f"{a}-{b}" for a, b in zip(words, following, strict=True)]
    lines = [cycle[i] + "\n" for i in np.argsort(ranks).tolist()]
    question = f"\n{_QUESTION}{cycle[0]}, {words[1]}"
    answer = ", ".join(cycle[1 : links + 1]).removeprefix(words[1])
    return Needles(lines, np.sort(ranks).tolist(), question, answer)


def _is_key_like(line: str) -> bool:
    first, hyphen, second = line.strip().partition("-")
    return bool(hyphen) and first.isalpha() and second.isalpha()
