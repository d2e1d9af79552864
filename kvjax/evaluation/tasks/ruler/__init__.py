"""RULER: thirteen tasks at any length, in any tokenizer's tokens, scored as published.

Needles in a haystack, chains of variables, counts of words, questions over documents.
Every example is made anew from a seed; none is read from a file of the benchmark.
"""

from collections.abc import Callable
from typing import NamedTuple

from kvjax.evaluation.tasks.ruler import counting, niah, qa, texts, variables
from kvjax.evaluation.tasks.ruler.fitting import (
    Kind,
    Matched,
    Parts,
    check_examples,
    fitted,
)
from kvjax.evaluation.tasks.ruler.texts import Texts
from kvjax.interface import Tokenizer

TASKS = (*niah.TASKS, "vt", "cwe", "fwe", "qa_1", "qa_2")


def check_task(task: str) -> None:
    """Raises ValueError unless the task exists."""
    if task not in TASKS:
        raise ValueError(f"unknown {task=}: choose one of {', '.join(TASKS)}.")


class _Maker(NamedTuple):
    """The making of one task's examples, given their seeds and their number."""

    kind: Kind
    least: int  # lines, words or documents
    build: Callable[[tuple[int, ...], int], Callable[[int], Parts]]


def examples(
    task: str,
    tokenizer: Tokenizer,
    *,
    context: int,
    n: int,
    seed: int = 0,
    source: Texts | None = None,
    is_chat: bool = False,
) -> list[Matched]:
    """Makes the examples of one of RULER's tasks.

    Prompt and answer together take at most `context` tokens, and one line of haystack
    more (or word, or document) would not fit. Example `i` of a seed is the same
    whatever the number of examples.

    Args:
        task: one of `TASKS`.
        tokenizer: of the model under test.
        context: most tokens of prompt and answer together; an answer may take 128
            tokens of `niah`, 30 of `vt`, 120 of `cwe`, 50 of `fwe` and 32 of `qa`.
        n: examples.
        seed: of everything that is drawn.
        source: prose and questions, from :mod:`kvjax.evaluation.tasks.ruler.texts`;
            those that ship if None.
        is_chat: prompts are turns in the model's chat template.

    Raises:
        ValueError: if there is no such task, `n` < 1, the context is too short for the
            task, or the tokenizer has no chat template.

    Source:
        Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language
        Models?", COLM 2024, arXiv:2404.06654, appendix B, and the settings of its
        thirteen tasks.
    Deviations:
        Prose begins at a random sentence instead of always at the first, so that
        examples are independent, and as many sentences are taken as fit, not steps of
        500 words. Keys are pairs, and lists of common words made, of
        nouns and adjectives of our own instead of those of wonderwords; where they do
        not suffice, a listed word is a pair too. Keys, values and names are never drawn
        twice in an example, and no listed word contains a common one. Assignments
        stand in lines of their own. The example that is shown is drawn anew for every
        prompt. The text that ships is another one: verses of the King James Bible for
        the essays, and for SQuAD and HotpotQA documents on invented towns and people.
        HotpotQA's documents that answer come first where not all ten fit.
    """
    check_task(task)
    check_examples(n, seed)
    source = source or texts.shipped()
    maker = _maker(task, tokenizer, context, source)
    made = []
    for index in range(n):
        build = maker.build((seed, TASKS.index(task), index), index)
        made.append(
            fitted(
                tokenizer,
                build,
                maker.kind,
                context=context,
                least=maker.least,
                is_chat=is_chat,
            )
        )
    return made


def _maker(task: str, tokenizer: Tokenizer, context: int, source: Texts) -> _Maker:
    if task in niah.TASKS:
        about = niah.TASKS[task]
        prose = source.prose() if about.haystack == "prose" else ()
        return _Maker(
            Kind(task, niah.REPLY), 1, lambda key, _: niah.builder(about, prose, key)
        )
    if task == "vt":
        shown = variables.shown_lines(tokenizer)
        return _Maker(
            Kind(task, variables.REPLY),
            variables.LEAST,
            lambda key, _: variables.builder(key, shown),
        )
    if task == "cwe":
        return _Maker(
            Kind(task, counting.COMMON_REPLY),
            counting.LEAST_WORDS,
            lambda key, _: counting.common_words(context, key),
        )
    if task == "fwe":
        return _Maker(
            Kind(task, counting.FREQUENT_REPLY),
            counting.LEAST_CODED,
            lambda key, _: counting.frequent_words(context, key),
        )
    pose = source.qa_1 if task == "qa_1" else source.qa_2
    return _Maker(
        Kind(task, qa.REPLY, is_any=True),
        2 if task == "qa_2" else 1,
        lambda key, index: qa.builder(pose, key, index),
    )
