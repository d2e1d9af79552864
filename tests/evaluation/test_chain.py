"""Each key has one successor, one cycle holds all keys, a mistake ends the count."""

import itertools
import re

import numpy as np
import pytest
from tiny import ByteTokenizer, PairTokenizer

from kvjax.evaluation.tasks import chain
from kvjax.evaluation.tasks.words import WORDS

BYTES = ByteTokenizer()
TEXT = "".join(f"line {i} of a text, well-worn\n" for i in range(200))
LONGEST_LINE = 7 + 1 + 7 + 1


class Bos(ByteTokenizer):
    """As Llama's: one token before every text."""

    def encode(self, text):
        return [256, *super().encode(text)]


def make(n=4, *, tokenizer=BYTES, text="", context=600, **options):
    return chain.chain_of_key(tokenizer, text, context=context, n=n, **options)


def listed(example):
    body = example.text[: example.text.rindex("\nchain: ")]
    return re.findall(r"^([a-z]+)-([a-z]+)$", body, re.MULTILINE)


def oracle(text):
    """What a perfect reader of the prompt goes on with, as far as it likes."""
    body, _, question = text.rpartition("\nchain: ")
    follows = dict(re.findall(r"^([a-z]+)-([a-z]+)$", body, re.MULTILINE))
    word = question.rpartition(", ")[2]
    said = f"-{follows[word]}"
    for _ in range(len(follows) // 2):
        word = follows[word]
        said += f", {word}-{follows[word]}"
    return said


def test_the_words_are_distinct_short_and_enough_for_long_lists():
    assert len(set(WORDS)) == len(WORDS) >= 512
    assert all(re.fullmatch("[a-z]{3,7}", word) for word in WORDS)


def test_every_key_has_exactly_one_successor_and_one_cycle_holds_them_all():
    for example in make(6):
        follows = dict(listed(example))
        assert len(follows) == len(listed(example)) == len(example.keys) > 20
        assert set(follows) == set(follows.values())
        word, seen = example.start, []
        while word not in seen:
            seen.append(word)
            word = follows[word]
        assert word == example.start
        assert len(seen) == len(follows)


@pytest.mark.parametrize(
    "tokenizer", [BYTES, Bos(), PairTokenizer()], ids=["1", "bos", "2"]
)
@pytest.mark.parametrize("context", [200, 1111])
@pytest.mark.parametrize("links", [1, 5])
def test_prompt_and_answer_fill_the_context_and_never_exceed_it(
    tokenizer, context, links
):
    for example in make(tokenizer=tokenizer, context=context, links=links):
        whole = tokenizer.encode(example.text + example.answer)
        assert example.prompt == whole[: len(example.prompt)]
        assert tokenizer.decode(example.prompt) == example.text
        assert len(whole) == len(example.prompt) + example.answer_tokens
        # One more key makes the list longer by up to two lines.
        assert context - 2 * LONGEST_LINE < len(whole) <= context


def test_the_prompt_gives_the_first_key_and_ends_inside_the_second():
    for example in make(6, links=3):
        found = re.search(r"\n\nchain: ([a-z-]+), ([a-z]+)$", example.text)
        first, second = found.groups()
        assert first in example.keys
        assert first.split("-")[1] == second == example.start
        asked = (second + example.answer).split(", ")
        assert len(asked) == example.links == 3
        assert len({first, *asked}) == 4
        assert example.keys.issuperset(asked)


def test_a_perfect_reader_scores_one_and_the_answer_is_what_it_says():
    for links in (1, 5, 9):
        for example in make(4, links=links):
            said = oracle(example.text)
            assert said.startswith(example.answer)
            assert example.score(example.answer) == 1
            assert example.score(said) == 1  # what comes after does not matter
            assert example.score(f"{example.answer}\nnow something else, x-y") == 1


def test_a_mistake_ends_the_count():
    (example,) = make(1)
    keys = (example.start + example.answer).split(", ")

    def score(*said):
        return example.score(", ".join(said).removeprefix(example.start))

    assert score(*keys[:2]) == 2 / 5
    assert score(*keys[:2], *keys[:2]) == 2 / 5  # begins again: does not link
    assert score(*keys[:3], keys[4]) == 3 / 5  # in the list, but not the next one
    made_up = f"{keys[2].split('-')[1]}-nowhere"
    assert score(*keys[:3], made_up, *keys[4:]) == 3 / 5
    assert score(*keys[:3], made_up, keys[3]) == 3 / 5  # the right one comes too late
    assert score(keys[1]) == 0
    assert example.score("") == example.score(" what?") == 0
    assert score(*keys[:2], keys[2][:-1]) == 2 / 5  # cut off in the middle of a key
    assert score(*keys[:2]) == example.score(
        f"-{keys[0].split('-')[1]} ,{keys[1]}\n, {keys[2]}"
    )


def test_the_papers_examples():
    # Appendix A.6: ten good keys; two and then the prompt's example; three and a break.
    words = [f"w{chr(97 + i)}" for i in range(12)]
    keys = [f"{a}-{b}" for a, b in itertools.pairwise(words)]
    good = ", ".join(keys[:10])
    copied = ", ".join([*keys[:2], "apricot-waggish", "waggish-tea", *keys[2:4]])
    broken = ", ".join([*keys[:3], *keys[5:]])
    for text, expected in ((good, 1.0), (copied, 0.2), (broken, 0.3)):
        assert chain.valid_prefix(keys, text) / 10 == expected
    # The model may choose the key it begins with, unless it is given.
    assert chain.valid_prefix(keys, ", ".join(keys[4:7])) == 3
    assert chain.valid_prefix(keys, ", ".join(keys[4:7]), follows=words[4]) == 3
    assert chain.valid_prefix(keys, ", ".join(keys[4:7]), follows=words[3]) == 0
    # More than two words: the last one links.
    assert chain.valid_prefix(["a-x-b", "b-y-c", "x-z-d"], "a-x-b,b-y-c, x-z-d") == 2


def test_the_list_is_shuffled_and_so_is_the_first_key():
    places, in_order = [], []
    for example in make(30):
        pairs = listed(example)
        keys = ["-".join(pair) for pair in pairs]
        in_order += [sum(a[1] == b[0] for a, b in itertools.pairwise(pairs))]
        first = re.search(r"\nchain: ([a-z-]+),", example.text)[1]
        places.append(keys.index(first) / (len(keys) - 1))
    assert 0.3 < np.mean(in_order) < 2  # 1 in a random order, all 40 in order
    assert 0.3 < np.mean(places) < 0.7
    assert max(places) > 0.8
    assert min(places) < 0.2


def test_examples_depend_on_the_seed_and_not_on_how_many_there_are():
    assert make(2, seed=3) == make(5, seed=3)[:2]
    assert make(2, seed=3) != make(2, seed=4)
    assert len({example.text for example in make(5)}) == 5


def test_fixed_keys_stand_between_lines_of_the_text():
    text = "lone-pair\n" + TEXT  # a line that looks like a key
    for example in make(4, text=text, context=900, keys=12):
        assert len(listed(example)) == len(example.keys) == 12
        assert "lone-pair" not in example.text
        body = example.text[: example.text.rindex("\nchain: ")].splitlines()
        hay = [i for i, line in enumerate(body) if line + "\n" in TEXT]
        assert len(hay) + 12 == len(body)
        first = TEXT.splitlines().index(body[hay[0]])
        expected = [TEXT.splitlines()[(first + i) % 200] for i in range(len(hay))]
        assert [body[i] for i in hay] == expected
        # Spread out: not all before, after or in one place of the text.
        assert len(set(np.diff(hay))) > 1
        whole = len(example.prompt) + example.answer_tokens
        assert 900 - 40 < whole <= 900
        assert example.score(oracle(example.text)) == 1


def test_when_the_words_run_out_lines_fill_the_rest(monkeypatch):
    monkeypatch.setattr(chain, "WORDS", WORDS[:12])
    for example in make(2, text=TEXT, context=900):
        assert len(example.keys) == 12
        assert len(example.prompt) + example.answer_tokens > 900 - 40
    with pytest.raises(ValueError, match="no line that is not itself a needle"):
        make(1, context=900)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0 and links=5 must be at least 1"),
        ({"links": 0}, "links=0 must be at least 1"),
        ({"keys": 5}, r"keys=5 must be in \[6, 837\]: links=5 and the first"),
        ({"keys": 838}, r"keys=838 must be in \[6, 837\]"),
        ({"context": 60}, "context=60 is too short: .* take 1[0-9][0-9] tokens"),
        ({"keys": 300, "text": TEXT}, "context=600 is too short"),
    ],
)
def test_errors_name_the_values_and_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        make(**({"n": 1} | options))
