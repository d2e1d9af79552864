"""Corpora, and samples whose answers an independent reader finds in their own text."""

import itertools
import re

import numpy as np
import pytest
from tiny import ByteTokenizer
from tokenizers import Tokenizer, processors

from kvjax.evaluation.tasks.chain import chain_of_key
from kvjax.evaluation.tasks.extraction import extraction
from kvjax.evaluation.tasks.needles import multikey, passkey
from kvjax.training import data
from kvjax.training.data import retrieval, text
from models import embedded
from models.embedded import tokenizer as embedded_tokenizer

LENGTHS = (40, 64, 257)


@pytest.fixture(scope="module")
def backend():
    # Few merges, but every number and word: what the retrieval texts are made of.
    held_out = embedded.heldout_text()[:50_000]
    return embedded_tokenizer.train([held_out], 2300)


@pytest.fixture(scope="module")
def corpus(backend):
    return text.make([embedded.heldout_text()[:50_000]], backend)


@pytest.fixture(scope="module")
def sources(corpus):
    return data.sources(corpus)


def drawn(source, length, n=20, seed=0):
    return [source.draw(np.random.default_rng([seed, i]), length) for i in range(n)]


def spoken(backend: Tokenizer, sample) -> tuple[str, list[tuple[int, str]]]:
    """The text of a sample, and (where, what) of each run of answers in it."""
    ids = sample.tokens.tolist()
    runs, start = [], None
    for i, is_answer in enumerate([*sample.answers.tolist(), False]):
        if is_answer and start is None:
            start = i + 1
        elif not is_answer and start is not None:
            runs.append((len(backend.decode(ids[:start])), ids[start : i + 1]))
            start = None
    return backend.decode(ids), [(at, backend.decode(run)) for at, run in runs]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", data.names())
def test_a_sample_is_a_function_of_its_seed_and_fits(sources, corpus, name, length):
    samples = drawn(sources[name], length)
    for one, other in zip(samples, drawn(sources[name], length), strict=True):
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(left, right)
    different = drawn(sources[name], length, seed=1)
    assert any(
        one.tokens.tolist() != other.tokens.tolist()
        for one, other in zip(samples, different, strict=True)
    )
    for sample in samples:
        n = len(sample.tokens) - 1
        assert 1 <= n <= length
        assert tuple(sample.tokens[: len(corpus.prefix)]) == corpus.prefix
        assert sample.weights.shape == sample.answers.shape == (n,)
        assert (sample.weights >= 0).all()
        assert sample.weights.max() <= retrieval.MOST_WEIGHT
        assert (sample.weights[sample.answers] > 0).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_text_is_the_corpus_word_for_word(sources, corpus, length):
    whole = corpus.tokens.astype(np.int32).tobytes()
    for sample in drawn(sources["text"], length):
        window = sample.tokens[len(corpus.prefix) :].tobytes()
        assert window in whole
        assert len(sample.weights) == length
        assert set(sample.weights.tolist()) == {1.0}


@pytest.mark.parametrize("length", LENGTHS)
def test_copies_of_a_block_follow_from_its_last_token(sources, length):
    for sample in drawn(sources["repeat"], length):
        answered = 0
        follows: dict[int, int] = {}
        pairs = itertools.pairwise(sample.tokens[1:].tolist())
        for (here, there), is_answer in zip(pairs, sample.answers[1:], strict=True):
            if is_answer:
                answered += 1
                assert follows[here] == there
            follows[here] = there
        assert answered >= length // 2 - 2


@pytest.mark.parametrize("length", LENGTHS)
def test_values_of_recall_follow_from_its_pairs(sources, length):
    for sample in drawn(sources["recall"], length):
        pairs = sample.tokens[1:].tolist()
        values: dict[int, int] = {}
        asked = 0
        for at in range(0, len(pairs) - 1, 2):
            key, value = pairs[at : at + 2]
            if sample.answers[at + 1]:
                asked += 1
                assert values[key] == value
            else:
                assert key not in values
                values[key] = value
        assert asked == sample.answers.sum() > 0


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["passkey", "keys"])
def test_an_asked_value_was_stated_in_the_same_words(sources, backend, name, length):
    asked = 0
    for sample in drawn(sources[name], length):
        content, runs = spoken(backend, sample)
        for at, answer in runs:
            question = content[:at].rpartition("\n")[2]
            statement = f"{question}{answer}"
            assert re.search(rf"^{re.escape(statement)}", content[:at], re.MULTILINE)
            # And no other five digits for the same words.
            said = re.findall(
                rf"^{re.escape(question)}(\d{{5}})", content, re.MULTILINE
            )
            assert all(value.startswith(answer) for value in said)
            asked += 1
    assert asked >= 10


@pytest.mark.parametrize("length", LENGTHS)
def test_a_chain_goes_through_its_list(sources, backend, length):
    asked = 0
    for sample in drawn(sources["chain"], length):
        content, runs = spoken(backend, sample)
        listed, found, steps = content.partition("\n\nchain: ")
        if not found:
            assert not runs
            continue
        follows = dict(line.split("-") for line in listed.splitlines())
        assert sorted(follows) == sorted(follows.values())
        links = [link.split("-") for link in steps.strip().split(", ")]
        for (_, last), (first, word) in itertools.pairwise(links[:-1]):
            assert last == first
            assert follows[first] == word
        answers = [word for _, word in links[1:] if word][: len(runs)]
        assert [answer for _, answer in runs] == answers
        asked += len(runs)
    assert asked >= 20


@pytest.mark.parametrize("length", LENGTHS)
def test_a_table_repeats_its_list_in_order(sources, backend, length):
    asked = 0
    for sample in drawn(sources["extraction"], length):
        content, runs = spoken(backend, sample)
        before, found, table = content.partition("\ntable:\n")
        if not found:
            assert not runs
            continue
        items = re.findall(r"^([a-z]+) (\d{3})$", before, re.MULTILINE)
        assert len(dict(items)) == len({number for _, number in items}) == len(items)
        cells = [cell for item in items for cell in item]
        said = re.findall(r"[a-z]+|\d+", table)
        at = cells.index(said[0])
        assert at % 2 == 0
        # Cut off at the sample's end, at most the last one is not whole.
        assert said == cells[at : at + len(said)]
        assert [answer for _, answer in runs] == said[1 : len(runs) + 1]
        assert "\t" not in before
        asked += len(runs)
    assert asked >= 20


@pytest.mark.parametrize("length", LENGTHS)
def test_a_variable_leads_back_to_its_number(sources, backend, length):
    asked = 0
    for sample in drawn(sources["variables"], length):
        content, runs = spoken(backend, sample)
        for at, answer in runs:
            names = dict(
                line.split(" = ")
                for line in content[:at].splitlines()
                if re.fullmatch(r"[a-z]+ = [a-z0-9]+", line)
            )
            value = content[:at].rpartition("\n")[2].removesuffix(" = ")
            hops = 0
            while not value.isdecimal():
                value, hops = names[value], hops + 1
            assert value.startswith(answer)
            assert 2 <= hops <= 4
            asked += 1
    assert asked >= 5


def test_questions_are_worded_as_the_evaluation_words_them(sources, backend):
    words = ByteTokenizer()
    haystack = "nothing\n" * 30
    (one,) = passkey(words, haystack, context=800, n=1)
    (many,) = multikey(words, haystack, context=800, n=1, keys=3)
    (chain,) = chain_of_key(words, haystack, context=800, n=1, keys=7)
    (table,) = extraction(words, haystack, context=800, n=1, items=20)
    trained = {
        name: "\n".join(
            spoken(backend, sample)[0] for sample in drawn(sources[name], 128, 40)
        )
        for name in ("passkey", "keys", "chain", "extraction")
    }
    assert "\nThe pass key is " in trained["passkey"]
    assert one.text.endswith("\nThe pass key is ")
    assert re.search(r"\n\nkey [a-z]+ has value \d", trained["keys"])
    assert re.search(r"\n\nkey [a-z]+ has value $", many.text)
    key = r"[a-z]+-[a-z]+"
    assert re.search(rf"{key}\n\nchain: {key}, {key}", trained["chain"])
    whole = chain.text + chain.answer
    assert re.search(rf"\n\nchain: {key}(, {key}){{5}}$", whole)
    row = r"[a-z]+\t\d{3}"
    for said in (trained["extraction"], table.text + table.answer):
        assert re.search(r"<pre>\n([a-z]+ \d{3}\n)+</pre>\n", said)
        assert re.search(rf"</pre>\n(.*\n)*\ntable:\n{row}\n{row}", said)


def test_half_of_the_loss_is_on_answers(sources):
    for name in ("keys", "chain", "extraction"):
        for sample in drawn(sources[name], 200):
            answers = sample.weights[sample.answers].sum()
            if answers > 0 and sample.weights.max() < retrieval.MOST_WEIGHT:
                assert answers == pytest.approx(len(sample.weights) / 2, rel=1e-4)
                assert sample.weights.sum() == pytest.approx(len(sample.weights))


def test_unknowable_digits_are_not_trained_on(sources, backend):
    for sample in drawn(sources["keys"], 64):
        numbers = [
            bool(re.fullmatch(r"\d+", backend.decode([int(token)])))
            for token in sample.tokens[1:]
        ]
        free = np.array(numbers) & ~sample.answers
        assert (sample.weights[free] == 0).all()


def test_held_out_modules_are_not_trained_on():
    everything, trained_on = text.stdlib_files(), text.stdlib_training_files()
    left_out = set(everything) - set(trained_on)
    assert {path.name for path in left_out} == set(text.HELD_OUT)
    assert len(left_out) == len(text.HELD_OUT)
    assert len(trained_on) > 100


def test_held_out_text_is_not_in_the_training_text():
    held_out = embedded.heldout_text()
    assert len(held_out.encode()) >= 200_000
    training = "\n".join(text.read("stdlib"))
    starts = range(0, len(held_out) - 400, 4000)
    assert not [at for at in starts if held_out[at : at + 400] in training]
    assert training[10_000:10_400] in training  # and the search does find


def test_files_and_patterns_are_read_in_order(tmp_path):
    for name, content in (("b.txt", "two"), ("a.txt", "one"), ("c.md", "three")):
        (tmp_path / name).write_text(content)
    pattern = str(tmp_path / "*.txt")
    assert text.read([pattern]) == ["one", "two"]
    assert text.read([str(tmp_path / "c.md"), pattern]) == ["three", "one", "two"]


def test_a_corpus_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.corpus='.*none.txt' matches no file"):
        text.read([str(tmp_path / "none.txt")])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"holds no text: every file is empty"):
        text.read([str(tmp_path / "empty.txt")])
    (tmp_path / "image.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"image.txt is not UTF-8"):
        text.read([str(tmp_path / "image.txt")])


def test_a_haystack_stays_within_its_room(corpus):
    rng = np.random.default_rng(0)
    for room in (0, 1, 50, 3000):
        lines = text.haystack(rng, corpus, room)
        assert len("".join(lines)) <= room
        joined = "".join(corpus.lines) * 2
        assert "".join(lines) in joined


@pytest.mark.parametrize(
    "form", ["<|bos|> $A", "<|bos|> $A <|eos|>", "$A <|eos|>", "$A"]
)
def test_a_file_begins_and_ends_as_the_tokenizer_says(backend, form):
    made = Tokenizer.from_str(backend.to_str())
    made.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    files = ["def f(x):\n    return x\n", "the second file\n"]
    corpus = text.make(files, made)
    assert corpus.tokens.tolist() == [i for x in files for i in made.encode(x).ids]
    assert corpus.prefix == ((0,) if form.startswith("<|bos|>") else ())
    for sample in drawn(data.sources(corpus)["passkey"], 40):
        assert 1 not in sample.tokens
