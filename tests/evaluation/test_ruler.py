"""RULER's tasks, counted independently: needles, depths, lengths, answers, scores."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from text_families import of_embedded, sentencepiece
from tiny import ByteTokenizer, byte_tokenizer

from kvjax.evaluation.tasks import ruler
from kvjax.evaluation.tasks.ruler import facts, niah, texts, vocabulary
from kvjax.evaluation.tasks.ruler.fitting import Kind, Parts, largest, prompted

BYTES = ByteTokenizer()
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
# A byte a token: what a real tokenizer says in a quarter of it.
ROOM = 3600
# Written down a second time: answers' tokens, and how many are looked for.
PUBLISHED = {
    "niah_single_1": (128, 1),
    "niah_single_2": (128, 1),
    "niah_single_3": (128, 1),
    "niah_multikey_1": (128, 1),
    "niah_multikey_2": (128, 1),
    "niah_multikey_3": (128, 1),
    "niah_multivalue": (128, 4),
    "niah_multiquery": (128, 4),
    "vt": (30, 5),
    "cwe": (120, 10),
    "fwe": (50, 3),
    "qa_1": (32, 1),
    "qa_2": (32, 1),
}
NEEDLES = [task for task in PUBLISHED if task.startswith("niah")]


def make(task, tokenizer=BYTES, *, context=ROOM, n=3, **options):
    return ruler.examples(task, tokenizer, context=context, n=n, **options)


def asked(example):
    """What stands after the context, and before it the text of the haystack."""
    text, context = example.text, example.parts.context
    assert text.startswith(context)
    return text[len(context) :], context


def test_the_tasks_are_the_published_ones():
    assert list(ruler.TASKS) == list(PUBLISHED)
    for task, (reply, answers) in PUBLISHED.items():
        (example,) = make(task, n=1)
        assert example.answer_tokens == reply
        assert len(example.answers) == answers
        assert example.task == task


TOKENIZERS = {
    "bytes": ByteTokenizer,
    "sentencepiece": sentencepiece,
    "embedded": of_embedded,
}
# The longest piece of a haystack that could not be added, in bytes.
PIECE = {"cwe": 60, "fwe": 60, "qa_1": 330, "qa_2": 330}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("task", PUBLISHED)
def test_the_prompt_fills_the_context_to_within_a_line(task, name):
    tokenizer = TOKENIZERS[name]()
    verse = max(map(len, texts.shipped().prose()))
    piece = PIECE.get(task, max(len(niah.NOISE) + 1, verse))
    room = ROOM // 2 if name == "embedded" else ROOM
    for example in make(task, tokenizer, n=2, context=room):
        size = len(example.prompt) + example.answer_tokens
        assert room - piece - 1 <= size <= room
        assert example.prompt == tokenizer.encode(example.text)
        behind, context = asked(example)
        assert behind == example.parts.question + example.parts.prefix.rstrip(" ")
        before, after = np.split(example.prompt, [example.asked_at])
        # Line ends that are one token with what follows are the question's.
        assert tokenizer.decode(before.tolist()).rstrip() == context.rstrip()
        assert len(tokenizer.decode(after.tolist())) - len(behind) <= 3
        if name == "bytes":
            assert tokenizer.decode(before.tolist()) == context
            assert tokenizer.decode(after.tolist()) == behind


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_are_there_once_and_answer_the_question(task):
    about = niah.TASKS[task]
    for example in make(task, n=6):
        behind, context = asked(example)
        found = [(kind, key, value) for kind, key, value in NEEDLE.findall(context)]
        assert {kind for kind, _, _ in found} == {about.value}
        keys = {key for _, key, _ in found}
        values = [value for _, _, value in found]
        assert len(set(values)) == len(values)
        if about.haystack == "needles":
            assert len(found) == len(keys) == context.count("\n") - 1 > 25
        else:
            assert (len(keys), len(found)) == (about.keys, about.keys * about.values)
        query = re.search(r" for (.*) mentioned in the provided text\?", behind)[1]
        wanted = re.split(r", and |, ", query)
        assert len(set(wanted)) == about.asked
        assert query == example.parts.prefix.split(" for ")[1].split(" mentioned")[0]
        told = [value for key in wanted for _, k, value in found if k == key]
        assert sorted(told) == sorted(example.answers)
        for answer in example.answers:
            assert example.text.count(answer) == 1
        shape = r"\d{7}" if about.value == "numbers" else r"[0-9a-f-]{36}"
        assert all(re.fullmatch(shape, value) for value in values)
        single = len(example.answers) == 1
        assert context.startswith("A special" if single else "Some special")
        assert example.text.endswith("is" if single else "are")


def test_the_wording_is_ruler_s():
    (example,) = make("niah_single_1", n=1)
    context, question, prefix, _ = example.parts
    ((_, key, _),) = NEEDLE.findall(context)
    lines = context.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to "
        "memorize it. I will quiz you about the number afterwards."
    )
    assert set(lines[1:-1]) - {next(x for x in lines if NEEDLE.match(x))} == {
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
        "back again."
    }
    asks = f"special magic number for {key} mentioned in the provided text"
    assert question == f"What is the {asks}?"
    assert prefix == f" The {asks} is"
    (many,) = make("niah_multiquery", n=1)
    assert many.parts.question.startswith("What are all the special magic numbers for ")


def depths(task, n, context, **options):
    """How much of the haystack comes before each needle that is asked for."""
    found = []
    for example in make(task, n=n, context=context, **options):
        body = example.parts.context.split("\n", 1)[1]
        pieces = body.removesuffix("\n").split("\n")
        if niah.TASKS[task].haystack == "prose":
            pieces = [body]
            before = body.index(example.answers[0]) / len(body)
            found.append(before)
            continue
        (place,) = [i for i, x in enumerate(pieces) if example.answers[0] in x]
        found.append(place / (len(pieces) - 1))
    return np.array(found)


@pytest.mark.parametrize(
    "task", ["niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multivalue"]
)
def test_depths_are_uniform(task):
    found = depths(task, 120, 2500, seed=7)
    assert found.min() < 0.1
    assert found.max() > 0.9
    counts, _ = np.histogram(found, 5, (0, 1.0001))
    assert stats.chisquare(counts).pvalue > 0.01
    # A tenth too much of one half would show.
    assert abs(found.mean() - 0.5) < 0.07


def test_prose_begins_anywhere_and_goes_on_from_its_first_sentence():
    source = texts.shipped()._replace(prose=lambda: [f"Sentence {i}." for i in "abcd"])
    first = set()
    for example in make("niah_single_2", n=8, context=900, source=source):
        body = NEEDLE.sub("", asked(example)[1].split("\n", 1)[1])
        said = re.findall(r"Sentence (\w)\.", body)
        place = "abcd".index(said[0])
        assert said == ["abcd"[(place + i) % 4] for i in range(len(said))]
        assert len(said) > 8
        first.add(said[0])
    assert len(first) > 1


ASSIGNED = re.compile(r"^VAR ([A-Z]+) = (?:VAR )?(\w+)$", re.MULTILINE)


def test_variables_are_those_that_hold_the_value():
    for example in make("vt", n=6, context=4000):
        shown, own = asked(example)[1].split("\n\nMemorize", 1)
        for text, letters in ((shown, 3), (own, 5)):
            pairs = ASSIGNED.findall(text)
            assert len(pairs) == 5
            held = {"": text}
            for name, value in pairs:  # a name is set after what it is set to
                assert value.isdigit() or value in held
                held[name] = held.get(value, value)
            assert {len(name) for name, _ in pairs} == {letters}
            assert len(set(held.values()) - {text}) == 1
        value = pairs[0][1]
        assert example.answers == tuple(name for name, _ in pairs)
        assert f"assigned the value {value} in the text above" in example.text
        told = shown.rsplit("they are: ", 1)[1].split()
        assert told == [name for name, _ in ASSIGNED.findall(shown)]
        assert example.text.endswith(
            f"5 variables are assigned the value {value}, they are:"
        )
        # No two stand side by side, unless noise is short.
        assert "again.\nVAR" in own


def test_the_places_of_assignments_are_anywhere():
    places = []
    for example in make("vt", n=60, context=6000):
        lines = asked(example)[1].split("\n\nMemorize", 1)[1].split("\n")
        places += [i / len(lines) for i, x in enumerate(lines) if x.startswith("VAR")]
    counts, _ = np.histogram(places, 5, (0, 1))
    assert stats.chisquare(counts).pvalue > 0.01


def lists_of(text):
    """The words of each numbered list; its numbers count from 1 on."""
    found = []
    for line in text.split("\n"):
        pairs = re.findall(r"(\d+)\. (\S+)", line)
        if line.startswith("1. "):
            assert [int(number) for number, _ in pairs] == [*range(1, len(pairs) + 1)]
            found.append([word for _, word in pairs])
    return found


@pytest.mark.parametrize(
    ("context", "times", "shown"),
    [(4095, (6, 1), (20, 3, 1)), (12_000, (30, 3), (40, 10, 3))],
)
def test_common_words_are_the_commonest(context, times, shown):
    for example in make("cwe", n=4, context=context):
        text = asked(example)[1]
        first, second = lists_of(text)
        counts = Counter(second)
        assert {counts[word] for word in example.answers} == {times[0]}
        others = {n for word, n in counts.items() if word not in example.answers}
        assert others == {times[1]}
        shown_counts = Counter(first)
        assert len(shown_counts) == shown[0]
        assert sorted(set(shown_counts.values())) == [shown[2], shown[1]]
        told = re.search(r"in the list are:(1\..*)\nBelow", text)[1]
        told = [word for _, word in re.findall(r"(\d+)\. (\S+)", told)]
        assert all(shown_counts[word] == shown[1] for word in told)
        assert len(told) == 10
        # A reply that names other words of the prompt scores nothing.
        assert example.score(" ".join(told)) == 0
        assert example.score(" ".join(set(second) - set(example.answers))) == 0


def test_lists_never_run_out_of_words():
    words = vocabulary.words(np.random.default_rng(0))
    assert len({next(words) for _ in range(3000)}) == 3000


def test_frequent_words_come_as_zeta_says():
    for example in make("fwe", n=4):
        text = re.search(r"coded words\. (.*)\n$", asked(example)[1])[1]
        counts = Counter(text.split(" "))
        ranked = [word for word, _ in counts.most_common(4)]
        assert ranked == ["...", *example.answers]
        total = counts["..."] * np.pi**2 / 6  # as many words as were asked for
        for rank, (_, count) in enumerate(counts.most_common(6), 1):
            assert abs(count - total * rank**-2.0 / (np.pi**2 / 6)) < 2
        frequent = [count for _, count in counts.most_common(5)]
        assert len(set(frequent)) == 5
        assert all(re.fullmatch(r"[a-z]{6}", word) for word in example.answers)


def documents(example):
    text = asked(example)[1].split("given documents.\n\n", 2)[-1]
    found = re.findall(r"Document (\d+):\n(.*?)\n\n", text, re.DOTALL)
    assert [int(number) for number, _ in found] == [*range(1, len(found) + 1)]
    return [document for _, document in found]


def test_a_question_is_answered_by_one_document():
    places = []
    for example in make("qa_1", n=20):
        found = documents(example)
        (answer,) = example.answers
        holding = [i for i, text in enumerate(found) if answer in text]
        assert len(holding) == 1
        name = found[holding[0]].split("\n")[0]
        assert name in example.parts.question
        assert len({text.split("\n")[0] for text in found}) == len(found) > 8
        places.append(holding[0] / (len(found) - 1))
    assert min(places) < 0.2
    assert max(places) > 0.8


def test_a_question_is_answered_by_two_documents():
    for example in make("qa_2", n=10):
        found = documents(example)
        person = re.search(r"where (\w+ \w+) was born\?", example.parts.question)[1]
        (of_person,) = [x for x in found if x.startswith(f"{person}\n")]
        town = re.search(r"was born in (\w+)\.", of_person)[1]
        (of_town,) = [x for x in found if x.startswith(f"{town}\n")]
        (answer,) = example.answers
        assert answer in of_town
        assert [x for x in found if answer in x] == [of_town]
        # And not to be had without the first: there are other towns.
        assert sum(" is a town on the river " in x for x in found) > 3


def test_of_many_documents_no_other_has_the_answer():
    for seed in range(5):
        for place, pose in enumerate((facts.one_document, facts.two_documents)):
            asked = pose(np.random.default_rng(seed), 0, 400)
            (answer,) = asked.answers
            holding = [text for text in asked.documents if answer in text]
            assert holding == [asked.documents[place]]
            assert len(asked.documents) == 400


def test_names_of_towns_differ():
    names = facts.town_names(np.random.default_rng(0))
    assert len({next(names) for _ in range(4000)}) == 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """RULER's own files, with a few invented lines each."""
    folder = tmp_path_factory.mktemp("texts")
    essays = " ".join(
        f'Essay {i} was short. It ended "well." Did it?' for i in range(9)
    )
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"Paragraph {a}.{p} says red{a}{p}.",
                    "qas": [
                        {
                            "question": f"What says {a}.{p}?",
                            "is_impossible": False,
                            "answers": [
                                {"text": f"red{a}{p}"},
                                {"text": f"says red{a}{p}"},
                            ],
                        },
                        {"question": "Why?", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(4)
            ]
        }
        for a in range(5)
    ]
    hotpot = [
        {
            "question": f"Hot {q}?",
            "answer": f"blue{q}",
            "supporting_facts": [[f"T{q}.3", 0], [f"T{q}.7", 1]],
            "context": [[f"T{q}.{d}", [f"One {q}.{d}.", " Two."]] for d in range(10)],
        }
        for q in range(6)
    ]
    (folder / texts.ESSAYS).write_text(json.dumps({"text": essays}), "utf-8")
    (folder / texts.SQUAD).write_text(json.dumps({"data": articles}), "utf-8")
    (folder / texts.HOTPOT).write_text(json.dumps(hotpot), "utf-8")
    return folder


def test_published_questions_come_with_their_documents(folder):
    source = texts.published(folder)
    questions = set()
    for example in make("qa_1", n=20, context=700, source=source):
        found = documents(example)
        number = re.search(r"What says (\S+)\?", example.text)[1]
        place = number.replace(".", "")
        assert example.answers == (f"red{place}", f"says red{place}")
        assert f"Paragraph {number} says red{place}." in found
        # Of the same article first: the other three are all there.
        assert sum(x.startswith(f"Paragraph {number[0]}.") for x in found) == min(
            4, len(found)
        )
        questions.add(number)
    assert len(questions) == 20  # all of them, each once
    for example in make("qa_2", n=6, context=900, source=source):
        found = documents(example)
        number = re.search(r"Hot (\d)\?", example.text)[1]
        assert example.answers == (f"blue{number}",)
        for needed in (3, 7):
            assert f"T{number}.{needed}\nOne {number}.{needed}. Two." in found


def test_published_essays_are_cut_at_sentences(folder):
    source = texts.published(folder)
    assert source.prose()[:4] == (
        "Essay 0 was short.",
        'It ended "well." Did it?',
        "Essay 1 was short.",
        'It ended "well." Did it?',
    )
    (example,) = make("niah_single_2", n=1, context=1500, source=source)
    assert "Essay 3 was short." in example.text


def test_without_the_published_text_the_command_that_brings_it_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no Paul.*: run `kvjax fetch rul"):
        texts.published(tmp_path)


def test_the_text_that_ships_is_the_bible():
    prose = texts.shipped().prose()
    assert prose[0] == "In the beginning God created the heaven and the earth."
    assert len(prose) == 31_103
    assert all(line == line.strip() and line for line in prose)


def test_scores_by_hand():
    parts = Parts("c\n", "q?", " It is", ("Apple", "pear", "fig", "plum"))
    every = prompted(BYTES, parts, Kind("t", 9))
    assert every.score(" apple, PEAR and figs") == 0.75
    assert every.score("plu") == 0
    assert every.score(every.answer) == 1
    one = prompted(BYTES, parts, Kind("qa_1", 9, is_any=True))
    assert one.score("no\nmore figs") == 1
    assert one.score("") == 0
    assert one.answer == " Apple"


def test_a_chat_asks_in_the_user_s_turn_and_begins_the_answer():
    tokenizer = byte_tokenizer()
    (example,) = make("niah_single_1", tokenizer, n=1, context=1500, is_chat=True)
    context, question, prefix, _ = example.parts
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": context + question}], tokenize=False
    )
    assert example.text == turn + prefix.lstrip(" ")
    assert example.prompt == tokenizer.encode(example.text, add_special_tokens=False)
    before = tokenizer.decode(example.prompt[: example.asked_at])
    assert before == "<user>" + context
    with pytest.raises(ValueError, match="no chat template: leave chat out"):
        make("vt", n=1, is_chat=True)


@pytest.mark.parametrize("task", PUBLISHED)
def test_examples_depend_on_the_seed_and_not_on_how_many_there_are(task):
    few = make(task, n=2, seed=5, context=4000)
    assert few == make(task, n=3, seed=5, context=4000)[:2]
    other = make(task, n=2, seed=6, context=4000)
    assert all(a.text != b.text for a, b in zip(few, other, strict=True))
    assert few[0].answers != few[1].answers


@pytest.mark.parametrize("task", PUBLISHED)
def test_a_context_that_is_too_short_is_one_line(task):
    message = f"context=180 is too short for {task}: its prompt takes at least [0-9]+ "
    with pytest.raises(ValueError, match=message):
        make(task, context=180)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("niah"), "unknown task='niah': choose one of niah_single_1, "),
        (lambda: make("vt", n=0), "n=0 must be at least 1"),
        (lambda: make("vt", seed=-1), "seed=-1 must not be negative"),
    ],
)
def test_errors_name_the_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_largest_that_fits_is_found_in_few_measurements():
    rng = np.random.default_rng(0)
    for most in (1, 3, 1000, 1 << 40):
        steps = rng.integers(1, 200, 5000)
        ends = np.cumsum(steps)
        for room in (int(ends[0]), 777, 20_000, int(ends[-1])):
            asked = []

            def size(count, asked=asked, ends=ends):
                asked.append(count)
                return int(ends[min(count, len(ends)) - 1]) + 1000 * (count > 5000)

            found = largest(size, room, 1, most)
            right = max(int(np.searchsorted(ends, room, "right")), 1)
            assert found == min(right, most, 5000)
            assert len(asked) < 25
