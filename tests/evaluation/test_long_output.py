"""Long answers: an independent search and walk find the same lines."""

import itertools
import re
from fractions import Fraction

import pytest
from text_families import of_embedded, sentencepiece
from tiny import ByteTokenizer, byte_tokenizer

from kvjax.evaluation.tasks import chat, haystack, long_output

BYTES = ByteTokenizer()
TASKS = {
    "countdown": long_output.countdown,
    "path_traversal": long_output.path_traversal,
}
TOKENIZERS = {
    "bytes": ByteTokenizer,
    "sentencepiece": sentencepiece,
    "embedded": of_embedded,
}


def make(task, tokenizer=BYTES, *, context=3600, n=2, **options):
    return TASKS[task](tokenizer, context=context, n=n, **options)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_fill_the_context(task, name):
    tokenizer = TOKENIZERS[name]()
    for example in make(task, tokenizer):
        whole = haystack.whole(tokenizer, example)
        assert len(whole) == len(example.prompt) + example.answer_tokens <= 3600
        # Of an embedded model's tokens 64 searches are fewer.
        if task == "path_traversal" or name != "embedded":
            assert len(whole) > 3600 - (900 if task == "countdown" else 60)
        assert 600 < example.answer_tokens <= 1200
        before = tokenizer.decode(example.prompt[: example.asked_at])
        assert example.text.startswith(before)
        # Line ends that are one token with what follows are the question's.
        assert (
            example.text[len(before) :]
            .lstrip()
            .startswith("Numbers: " if task == "countdown" else "How does one get from")
        )
        assert example.score(example.answer) == 1


def test_the_steps_of_an_answer_are_asked_for():
    (example,) = make("path_traversal", n=1, output=500)
    assert 400 < example.answer_tokens <= 500
    (example,) = make("countdown", n=1, output=2000)
    assert 1000 < example.answer_tokens <= 2000


def attempts(numbers):
    """Every attempt in order, by the rules as the prompt states them."""
    for (i, a), (j, b) in itertools.combinations(enumerate(numbers), 2):
        rest = [x for k, x in enumerate(numbers) if k != i and k != j]
        high, low = sorted((a, b))[::-1]
        results = [(a, "+", b, a + b)]
        if high != low:
            results.append((high, "-", low, high - low))
        results.append((a, "*", b, a * b))
        if low and Fraction(high, low).denominator == 1:
            results.append((high, "/", low, high // low))
        for x, sign, y, z in results:
            yield numbers, f"{x} {sign} {y} = {z}", [*rest, z]
            if rest:
                yield from attempts([*rest, z])


def test_a_search_is_the_one_that_the_rules_say():
    for example in make("countdown", n=3):
        blocks = example.text.split("Numbers: ")[1:]
        assert len(blocks) > 2
        answered = [*blocks[:-1], blocks[-1] + example.answer + "\n\n"]
        for place, block in enumerate(answered):
            head, target, written = re.fullmatch(
                r"([\d ]+)\nTarget: (\d+)\nSearch:\n(.*)\n\n", block, re.DOTALL
            ).groups()
            numbers = [int(x) for x in head.split()]
            assert len(numbers) == (4 if place == len(blocks) - 1 else 3)
            lines = []
            for before, said, left in attempts(numbers):
                start = f"From {' '.join(map(str, before))}: {said}"
                if len(left) > 1:
                    lines.append(f"{start}, leaves {' '.join(map(str, left))}.")
                elif left == [int(target)]:
                    lines.append(f"{start}, found.")
                    break
                else:
                    lines.append(f"{start}, not {target}.")
            assert written.split("\n") == lines


def test_a_route_is_the_one_that_the_lines_say():
    for example in make("path_traversal", n=6):
        body, _, asked = example.text.partition("\nHow does one get")
        leads = {}
        for town, sign, aim in re.findall(r"From (.*), a (\w+) goes to (.*)\.", body):
            assert town not in leads
            assert aim != town
            leads[town] = (sign, aim)
        start, end = re.match(r" from (.*) to (.*)\? List", asked).groups()
        walked, here = [], start
        while here != end:
            sign, aim = leads[here]
            walked.append(f"From {here} by {sign} to {aim}.")
            here = aim
        assert example.answer.split("\n") == walked == list(example.steps)
        assert len(set(walked)) == len(walked) > 10
        assert len(leads) > len(walked) + 20
        # Others lead into the route: looking for its towns is not enough.
        towns = {start, *(leads[step.split(" ")[1]][1] for step in walked)}
        assert sum(aim in towns for _, aim in leads.values()) > len(walked) + 3


def test_a_score_ends_at_the_first_mistake():
    (example,) = make("path_traversal", n=1)
    steps = list(example.steps)
    count = len(steps)

    def score(lines):
        return example.score("\n".join(lines))

    assert score(steps[:3]) == 3 / count
    assert score([*steps[:2], steps[3], *steps[3:]]) == 2 / count
    assert score([steps[0], "", f"  {steps[1]} "]) == 2 / count
    assert score([*steps, "From A by bus to B."]) == 1
    assert score(steps[1:]) == score([""]) == 0
    assert score([steps[0].removesuffix(".")]) == 0


@pytest.mark.parametrize("task", TASKS)
def test_examples_depend_on_the_seed_and_not_on_how_many_there_are(task):
    few = make(task, n=1, seed=3)
    assert few == make(task, n=2, seed=3)[:1]
    assert few[0].text != make(task, n=1, seed=4)[0].text


@pytest.mark.parametrize("task", TASKS)
def test_a_chat_s_turn_is_the_prompt(task):
    tokenizer = byte_tokenizer()
    (example,) = chat.fitted(
        tokenizer, lambda c: make(task, tokenizer, n=1, context=c), 3600, is_chat=True
    )
    assert example.text.startswith("<user>")
    assert len(example.prompt) + example.answer_tokens <= 3600
    assert example.score(example.answer) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"output": 0}, r"output=0 must be in \[1, context=3600\)"),
        ({"output": 3600}, r"output=3600 must be in \[1, context=3600\)"),
        ({"output": 20}, "an answer of 20 tokens is too short for a"),
        ({"context": 250, "output": 150}, "context=250 is too short for"),
    ],
)
@pytest.mark.parametrize("task", TASKS)
def test_wrong_arguments(task, options, message):
    with pytest.raises(ValueError, match=message):
        make(task, **options)
