"""A table repeats the list's items, in their order; F1 counts whole rows."""

import re

import pytest
from tiny import ByteTokenizer

from kvjax.evaluation.tasks import extraction

BYTES = ByteTokenizer()
TEXT = "".join(f"line {i} of a page\n" for i in range(200))


def make(n=4, *, text=TEXT, context=900, **options):
    return extraction.extraction(BYTES, text, context=context, n=n, **options)


def listed(example):
    (found,) = re.findall(r"<pre>\n(.*?)</pre>\n", example.text, re.DOTALL)
    return [tuple(item.split(" ")) for item in found.splitlines()]


def oracle(text):
    """What a perfect reader of the prompt goes on with, to the end of the list."""
    items = re.findall(r"^([a-z]+) (\d+)$", text, re.MULTILINE)
    start = re.search(r"\ntable:\n([a-z]+)\t$", text)[1]
    at = [name for name, _ in items].index(start)
    return "\n".join("\t".join(row) for row in items[at:])[len(start) + 1 :]


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("items", [None, 20])
def test_a_perfect_reader_scores_one_and_the_answer_is_what_it_says(rows, items):
    starts = []
    for example in make(8, rows=rows, items=items):
        said = oracle(example.text)
        assert said.startswith(example.answer)
        assert example.score(example.answer) == example.score(said) == 1
        assert len(example.rows) == example.answer.count("\n") + 1 == rows
        names, numbers = zip(*listed(example), strict=True)
        assert len(set(names)) == len(set(numbers)) == len(names)
        assert len(names) == items or items is None
        starts.append(names.index(example.start) / (len(names) - rows))
        whole = BYTES.encode(example.text + example.answer)
        assert example.prompt == BYTES.encode(example.text)
        assert len(whole) == len(example.prompt) + example.answer_tokens
        assert 900 - 25 < len(whole) <= 900
    assert min(starts) < 0.3
    assert max(starts) > 0.7


def test_lines_of_the_text_surround_a_short_list():
    before = [e.text.index("<pre>") for e in make(12, items=15)]
    assert min(before) < 150
    assert max(before) > 300
    for example in make(3, items=15):
        lines = example.text.split("\ntable:")[0].splitlines()
        assert sum(line + "\n" in TEXT for line in lines) == len(lines) - 15 - 2


def test_f1_counts_rows_that_are_wholly_right():
    (example,) = make(1, rows=4)
    (_, first), *others = example.rows
    others = ["\t".join(row) for row in others]

    def score(*rows):
        return example.score("\n".join(rows))

    assert score(first, *others[:1]) == 2 * 2 / (2 + 4)
    assert score(first, others[1], others[0], others[2]) == 1  # order does not matter
    assert score(first, others[0], others[0], others[2]) == 3 / 4  # said twice
    assert score(first, others[0] + "1", *others[1:]) == 3 / 4
    assert score(first, others[0].replace("\t", " "), *others[1:]) == 3 / 4
    assert score("12", *others) == 3 / 4
    assert score("") == score("not a number\nat all") == 0
    # What is generated after the rows that are asked for does not count against it.
    assert score(first, *others, "more\t123") == 1


def test_examples_depend_on_the_seed_and_not_on_how_many_there_are():
    assert make(2, seed=3) == make(5, seed=3)[:2]
    assert make(2, seed=3) != make(2, seed=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0 and rows=12 must be at least 1"),
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"items": 11}, r"items=11 must be in \[rows=12, 837\]"),
        ({"items": 838}, r"items=838 must be in \[rows=12, 837\]"),
        ({"context": 90}, "context=90 is too short: .* take [0-9]+ tokens"),
        ({"text": "<pre>\n", "items": 12}, "no line that is not itself a needle"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
