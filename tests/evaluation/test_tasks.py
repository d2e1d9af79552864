"""Needles are where they should be, fit the context, and have one right answer."""

import re

import numpy as np
import pytest
from text_families import joining_bytes, sentencepiece, word_piece
from tiny import ByteTokenizer, PairTokenizer

from kvjax.evaluation.tasks import chain, extraction, haystack
from kvjax.evaluation.tasks import needles as tasks_needles
from kvjax.text import encoding
from kvjax.text.stream import continuation

RNG = np.random.default_rng(0)
LINES = [
    f"{i} " + " ".join(str(w) for w in RNG.integers(0, 999, RNG.integers(1, 12)))
    for i in range(200)
]
TEXT = "\n".join(LINES) + "\n"
BYTES = ByteTokenizer()


class Bos(ByteTokenizer):
    """As Llama's: one token before every text."""

    def encode(self, text):
        return [256, *super().encode(text)]


SAID_AS_ASKED = {"passkey": tasks_needles.passkey, "multikey": tasks_needles.multikey}
MAKERS = SAID_AS_ASKED | {"variables": tasks_needles.variable_tracking}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture(params=SAID_AS_ASKED)
def make_said(request):
    return MAKERS[request.param]


def is_needle(line):
    return bool(tasks_needles._NEEDLE_LIKE.search(line) or tasks_needles._assigns(line))


@pytest.mark.parametrize(
    "tokenizer", [BYTES, Bos(), PairTokenizer()], ids=lambda t: type(t).__name__
)
@pytest.mark.parametrize("context", [400, 1024])
def test_prompt_and_answer_fill_the_context_and_never_exceed_it(
    make, tokenizer, context
):
    longest = max(len(tokenizer.encode(line + "\n")) for line in LINES)
    for example in make(tokenizer, TEXT, context=context, n=7):
        whole = tokenizer.encode(example.text + example.answer)
        assert example.prompt == whole[: len(example.prompt)]
        assert len(whole) == len(example.prompt) + example.answer_tokens
        assert tokenizer.decode(example.prompt) == example.text
        assert re.fullmatch(r" ?\d{5}", example.answer)
        assert context - 2 * longest < len(whole) <= context


def test_the_answer_is_said_once_and_asked_for_at_the_end(make_said):
    for example in make_said(BYTES, TEXT, context=900, n=10):
        assert re.fullmatch(r"\d{5}", example.answer)
        assert example.text.count(example.answer) == 1
        question = example.text[example.text.rindex("\n") + 1 :]
        said = f"\n{question}{example.answer}.", f"{question}{example.answer}."
        assert said[0] in example.text or example.text.startswith(said[1])
        assert example.text.endswith("\n\n" + question)


def test_the_wording_is_the_one_the_embedded_model_learnt():
    (one,) = tasks_needles.passkey(BYTES, TEXT, context=300, n=1)
    assert f"The pass key is {one.answer}. Remember it.\n" in one.text
    assert one.text.endswith("\nThe pass key is ")
    (many,) = tasks_needles.multikey(BYTES, TEXT, context=900, n=1)
    lines = re.findall(r"^key (\w+) has value (\d{5})\.$", many.text, re.MULTILINE)
    assert len(lines) == len(dict(lines)) == len({value for _, value in lines}) == 8
    asked = re.search(r"\n\nkey (\w+) has value $", many.text)[1]
    assert dict(lines)[asked] == many.answer


def test_needles_stand_between_whole_lines_in_order_of_the_text(make):
    for example in make(BYTES, TEXT, context=900, n=10):
        body = example.text[: example.text.rindex("\n\n") + 1]
        hay = [line for line in body.splitlines() if not is_needle(line)]
        first = LINES.index(hay[0])
        assert hay == [LINES[(first + i) % len(LINES)] for i in range(len(hay))]


def test_the_depth_is_met_to_within_a_line(make):
    depths = (0.0, 0.3, 0.8, 1.0)
    for example in make(BYTES, TEXT, context=2000, n=8, depths=depths):
        body = example.text[: example.text.rindex("\n\n") + 1]
        start = (
            body.rindex("\n", 0, body.index(example.answer)) + 1
            if ("\n" in body[: body.index(example.answer)])
            else 0
        )
        needles = [line + "\n" for line in body.splitlines() if is_needle(line)]
        before = body[:start]
        hay_before = len(before) - sum(len(x) for x in needles if x in before)
        hay = len(body) - sum(map(len, needles))
        longest = max(map(len, LINES)) + 1
        assert abs(hay_before - example.depth * hay) <= longest / 2 + 1
    assert [e.depth for e in make(BYTES, TEXT, context=900, n=5, depths=depths)] == [
        0.0,
        0.3,
        0.8,
        1.0,
        0.0,
    ]


def test_examples_depend_on_the_seed_and_not_on_how_many_there_are(make):
    few = make(BYTES, TEXT, context=900, n=3, seed=5)
    more = make(BYTES, TEXT, context=900, n=6, seed=5)
    assert few == more[:3]
    assert len({example.answer for example in more}) == 6
    other = make(BYTES, TEXT, context=900, n=3, seed=6)
    assert all(a.text != b.text for a, b in zip(few, other, strict=True))


def test_needles_of_the_text_itself_do_not_compete():
    trap = "The pass key is 11111. Remember it.\nkey apple has value 22222.\n"
    text = trap + TEXT + trap
    for make in SAID_AS_ASKED.values():
        for example in make(BYTES, text, context=900, n=8):
            assert "11111" not in example.text
            assert "22222" not in example.text


def test_a_short_text_is_used_again_from_its_first_line():
    (example,) = tasks_needles.passkey(BYTES, "one line\n", context=200, n=1)
    assert example.text.count("one line\n") > 5


def test_only_the_beginning_of_a_reply_counts():
    (example,) = tasks_needles.passkey(BYTES, TEXT, context=300, n=1)
    wrong = str((int(example.answer) + 1 - 10_000) % 90_000 + 10_000)
    assert example.score(example.answer) == 1
    assert example.score(f" {example.answer}. Remember") == 1
    assert example.score(example.answer[:4]) == 0
    assert example.score(f"{wrong} {example.answer}") == 0


ASSIGNMENT = re.compile(r"^([a-z]+) = (\w+)$", re.MULTILINE)


def follow(text):
    """The value of the variable that is asked for, read off the assignments."""
    body, _, question = text.rpartition("\n\n")
    held = dict(ASSIGNMENT.findall(body))
    name, steps = re.fullmatch(r"([a-z]+) = ", question)[1], 0
    while not name.isdigit():
        name, steps = held[name], steps + 1
    return name, steps


@pytest.mark.parametrize(("hops", "chains"), [(0, 3), (1, 1), (2, 4), (4, 2)])
def test_following_the_assignments_gives_the_value(hops, chains):
    made = tasks_needles.variable_tracking(
        BYTES, TEXT, context=1200, n=6, hops=hops, chains=chains
    )
    for example in made:
        assert follow(example.text) == (example.answer, hops + 1)
        pairs = ASSIGNMENT.findall(example.text)
        assert len(pairs) == len(dict(pairs)) == chains * (hops + 1)
        numbers = [value for _, value in pairs if value.isdigit()]
        assert len(set(numbers)) == chains
        assert example.text.count(example.answer) == 1
        # What a name is set to is known by then.
        known = set(numbers)
        for name, value in pairs:
            assert value in known
            known.add(name)


def test_a_chain_of_variables_is_spread_from_its_depth_to_the_end():
    for example in tasks_needles.variable_tracking(
        BYTES, TEXT, context=3000, n=5, hops=2
    ):
        body = example.text[: example.text.rindex("\n\n") + 1]
        held = {value: name for name, value in ASSIGNMENT.findall(body)}
        name, value, places = "", example.answer, []
        while value in held:
            name = held[value]
            places.append(body.index(f"{name} = {value}\n") / len(body))
            value = name
        wanted = example.depth + (1 - example.depth) * np.arange(3) / 3
        assert np.abs(np.array(places) - wanted).max() < 0.08
        assert example.text.endswith(f"\n\n{name} = ")


def test_assignments_of_the_text_itself_do_not_compete():
    trap = "apple = 1\nriver=apple\n    stone = 3\nother = 4\n"
    for example in tasks_needles.variable_tracking(
        BYTES, trap + TEXT, context=9000, n=8
    ):
        assert "other = 4" in example.text
        for line in ("apple = 1\n", "river=apple", "stone = 3"):
            assert line not in example.text


@pytest.mark.parametrize("tokenizer", [BYTES, Bos()], ids=["bytes", "bos"])
def test_windows_are_disjoint_pieces_of_the_text(tokenizer):
    size = 100
    made = tasks_needles.windows(tokenizer, TEXT, context=size, n=9, seed=3)
    prefix = len(tokenizer.encode(""))  # nothing is put behind a text
    body = BYTES.encode(TEXT)
    starts = []
    for window in made:
        assert len(window) == size
        assert window[:prefix] == tokenizer.encode("")
        piece = bytes(window[prefix:])
        starts.append(bytes(body).index(piece))
        assert starts[-1] % (size - prefix) == 0
    assert len(set(starts)) == 9
    assert starts != sorted(starts)
    assert made == tasks_needles.windows(tokenizer, TEXT, context=size, n=9, seed=3)
    assert made != tasks_needles.windows(tokenizer, TEXT, context=size, n=9, seed=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tasks_needles.passkey(BYTES, TEXT, context=300, n=-1),
            "n=-1 must be at",
        ),
        (
            lambda: tasks_needles.passkey(BYTES, TEXT, context=30, n=1),
            "context=30 is too short",
        ),
        (lambda: tasks_needles.passkey(BYTES, "", context=300, n=1), "no line"),
        (
            lambda: tasks_needles.passkey(BYTES, TEXT, context=300, n=1, depths=(1.5,)),
            r"depths=\(1.5,\) must be",
        ),
        (
            lambda: tasks_needles.multikey(BYTES, TEXT, context=900, n=1, keys=41),
            r"keys=41 must be in \[1, 40\]",
        ),
        (
            lambda: tasks_needles.variable_tracking(
                BYTES, TEXT, context=900, n=1, hops=-1
            ),
            "chains=4 of hops=-1 take 0 names",
        ),
        (
            lambda: tasks_needles.variable_tracking(
                BYTES, TEXT, context=900, n=1, hops=9, chains=90
            ),
            "chains=90 of hops=9 take 900 names: .* at most 837",
        ),
        (
            lambda: tasks_needles.windows(BYTES, "x" * 250, context=100, n=3),
            "n=3 windows of context=100 tokens need 300 .* has 250: lower n to 2",
        ),
        (
            lambda: tasks_needles.windows(
                BYTES, "x" * 50, context=100, n=3, named="windows"
            ),
            "^windows=3 windows of .* has 50: give a longer text",
        ),
        (
            lambda: tasks_needles.windows(BYTES, TEXT, context=1, n=1),
            "context=1 must leave",
        ),
    ],
)
def test_errors_name_the_values_and_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_answer_is_new_also_in_a_text_full_of_digits(make):
    # A quarter of all five-digit strings occur in each haystack.
    rng = np.random.default_rng(0)
    text = "".join(
        "".join(map(str, rng.integers(0, 10, 200))) + "\n" for _ in range(150)
    )
    for example in make(BYTES, text, context=30_000, n=20):
        assert example.text.count(example.answer) == 1


class Ending(ByteTokenizer):
    """BOS before a text and EOS behind it."""

    def encode(self, text):
        return [256, *super().encode(text), 257]


def test_windows_have_nothing_that_ends_a_text():
    for window in tasks_needles.windows(Ending(), TEXT, context=100, n=5):
        assert window[0] == 256
        assert max(window[1:]) < 256
        assert bytes(window[1:]).decode() in TEXT


ALL = {**MAKERS, "chain": chain.chain_of_key, "extraction": extraction.extraction}
COPIERS = {
    "bytes": ByteTokenizer,
    "pairs": PairTokenizer,
    "joining": joining_bytes,
    "sentencepiece": sentencepiece,
    "ending": Ending,
}


@pytest.mark.parametrize("name", COPIERS)
@pytest.mark.parametrize("task", ALL)
def test_a_faultless_copier_answers_right_in_the_tokens_it_is_given(task, name):
    tokenizer = COPIERS[name]()
    for example in ALL[task](tokenizer, TEXT, context=900, n=6):
        whole = haystack.whole(tokenizer, example)
        said = whole[len(example.prompt) :][: example.answer_tokens]
        answer = continuation(tokenizer.decode, example.prompt, said)
        assert example.score(answer) == 1
        assert answer == example.answer
        assert tokenizer.decode(example.prompt) == example.text
        # And not a token less.
        short = continuation(tokenizer.decode, example.prompt, said[:-1])
        assert example.score(short) < 1


def test_a_blank_is_said_with_the_answer_where_it_is_one_token_with_it():
    (example,) = tasks_needles.passkey(joining_bytes(), TEXT, context=900, n=1)
    assert example.text.endswith("\nThe pass key is")
    assert re.fullmatch(r" \d{5}", example.answer)
    assert example.answer_tokens == 5
    assert example.score(example.answer.lstrip()) == 1
    (plain,) = tasks_needles.passkey(BYTES, TEXT, context=900, n=1)
    assert plain.text.endswith("\nThe pass key is ")


def test_letters_of_the_question_are_said_with_the_answer():
    """Where a token is two bytes, an answer begins in the middle of every other one."""
    made = tasks_needles.multikey(PairTokenizer(), TEXT, context=900, n=8)
    assert {example.text.endswith("value") for example in made} == {True, False}
    made = extraction.extraction(PairTokenizer(), TEXT, context=900, n=8)
    cut = [example for example in made if not example.text.endswith("\t")]
    assert 0 < len(cut) < 8
    for example in made:
        assert example.score(example.answer) == 1
        assert example.score("\t" + example.answer) < 1


@pytest.mark.parametrize("task", ["chain", "extraction"])
def test_an_answer_that_cannot_be_said_is_refused(task):
    """WordPiece has no line ends and no tabs, and puts blanks around a hyphen."""
    with pytest.raises(
        ValueError, match=r"the tokenizer cannot say .* behind .* decode"
    ):
        ALL[task](word_piece(), TEXT, context=900, n=1)
    (example,) = tasks_needles.passkey(word_piece(), TEXT, context=900, n=1)
    assert re.fullmatch(r" \d{5}", example.answer)


def test_a_prompt_that_its_answer_does_not_go_on_with_is_refused():
    tokenizer = joining_bytes()
    (example,) = tasks_needles.passkey(tokenizer, TEXT, context=900, n=1)
    example = example._replace(prompt=tokenizer.encode(example.text + " "))
    with pytest.raises(ValueError, match=r"the tokenizer joins .* and its answer"):
        haystack.whole(tokenizer, example)


# --- where the context ends and the question begins


@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, Bos(), PairTokenizer(), joining_bytes()],
    ids=lambda t: type(t).__name__,
)
@pytest.mark.parametrize("name", [*MAKERS, "chain", "extraction"])
def test_the_context_knows_nothing_of_the_question(name, tokenizer):
    """Its tokens are those of the text before the question, but for a joined one."""
    make = MAKERS.get(name) or getattr(chain, "chain_of_key", None)
    options = {}
    if name == "extraction":
        make, options = extraction.extraction, {"rows": 3}
    if name == "chain":
        options = {"links": 2, "keys": 6}
    for example in make(tokenizer, TEXT, context=600, n=2, **options):
        body, _, _ = example.text.rpartition("\n\n")
        alone = encoding.begin(tokenizer.encode, body + "\n")
        assert 0 < len(alone) - 2 <= example.asked_at <= len(alone)
        assert example.prompt[: example.asked_at] == alone[: example.asked_at]
        context = haystack.context_of(tokenizer, example)
        assert body.startswith(context.rstrip("\n"))
        assert len(body) + 1 - len(context) <= 8
