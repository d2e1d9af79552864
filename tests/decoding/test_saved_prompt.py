"""A prefix on disk: decoding goes on bit for bit, and nothing foreign is taken."""

import gc
import json
import shutil
import time

import jax
import numpy as np
import pytest
from text_families import FAMILIES, surround
from tiny import SMALL, tiny_model

from kvjax import registry
from kvjax.decoding import generate, reader, saved_prompt
from kvjax.decoding.sampling import Sampling
from kvjax.files.arrays import DamagedError
from kvjax.rope import Rope

MODEL = tiny_model()
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (45, 1, 70)]
ONE_LAYER = tiny_model(num_layers=1)
# A transform over pages; what a prompt's end makes smaller; arrays of the host. States
# are plain arrays to all that is tested here: one of a kind will do.
SPECS = ["dense_layers:first=1+quest", "snapkv", "offload:cache=8+quest"]
SPECS += ["offload:cache=8+token_select"]
SAMPLED = Sampling(temperature=1.3, top_k=40, repetition_penalty=1.2)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def kinds(prefix):
    return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(prefix.states)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a prefix of `full`, and the prefix."""
    folder = tmp_path_factory.mktemp("prefix") / "here"
    read = saved_prompt.read(ONE_LAYER, registry.parse("full"), PROMPTS, room=12)
    saved_prompt.save(folder, ONE_LAYER, read, method_name="full")
    return folder, read


@pytest.mark.parametrize("spec", SPECS)
def test_goes_on_bit_for_bit(spec, tmp_path):
    """Every array comes back as it was, and so does what it leads to."""
    method = registry.parse(spec, **SMALL)
    read = saved_prompt.read(MODEL, method, PROMPTS, room=12)
    saved_prompt.save(tmp_path / "a", MODEL, read, method_name=spec)
    before = bits(read)
    found = saved_prompt.restore(tmp_path / "a", MODEL, method, method_name=spec)
    assert bits(found) == before
    assert kinds(found) == kinds(read)
    assert jax.tree.structure(found) == jax.tree.structure(read)
    alone = generate.prefill(MODEL, method, PROMPTS, max_new_tokens=12)
    assert bits(reader.finish_layers(method, found.states)) == bits(alone.states)
    options = {"max_new_tokens": 12, "eos_ids": (), "sampling": SAMPLED, "seed": 5}
    expected = generate.generate(MODEL, method, PROMPTS, **options)
    assert saved_prompt.generate(MODEL, method, found, **options) == expected
    del options["max_new_tokens"]  # all there is room for
    assert saved_prompt.generate(MODEL, method, read, **options) == expected


def test_more_of_the_prompt_is_a_longer_prompt():
    """Row by row: one goes on, one does not, one grows past the longest."""
    method = registry.parse("quest", **SMALL)
    read = saved_prompt.read(ONE_LAYER, method, PROMPTS, room=30)
    more = [PROMPTS[2][:7], [], PROMPTS[0][:18]]
    longer = saved_prompt.extend(ONE_LAYER, method, read, more)
    whole = [old + new for old, new in zip(PROMPTS, more, strict=True)]
    assert longer.prompts == tuple(map(tuple, whole))
    found = saved_prompt.generate(
        ONE_LAYER, method, longer, max_new_tokens=12, eos_ids=()
    )
    assert found == generate.generate(
        ONE_LAYER, method, whole, max_new_tokens=12, eos_ids=()
    )


def test_nothing_more_is_the_same_prefix(saved):
    _, read = saved
    assert (
        saved_prompt.extend(ONE_LAYER, registry.parse("full"), read, [[]] * 3) is read
    )


def test_room_is_kept_to(saved):
    _, read = saved
    full = registry.parse("full")
    for run, message in [
        (
            lambda: saved_prompt.generate(ONE_LAYER, full, read, max_new_tokens=13),
            "room for 12 tokens more, .* the 70 .* 13 are wanted: .* room=13",
        ),
        (
            lambda: saved_prompt.extend(
                ONE_LAYER, full, read, [[1] * 12, [1] * 82, []]
            ),
            "room for 12 tokens more, .* the 70 .* 14 are wanted: .* room=14",
        ),
        (
            lambda: saved_prompt.generate(ONE_LAYER, full, read, max_new_tokens=0),
            "max_new_tokens=0 must be at least 1",
        ),
        (
            lambda: saved_prompt.extend(ONE_LAYER, full, read, [[1]]),
            "1 rows and the prefix 3",
        ),
        (
            lambda: saved_prompt.extend(ONE_LAYER, full, read, [[], [], [999]]),
            "row 2 .*id 999",
        ),
        (
            lambda: saved_prompt.generate(ONE_LAYER, full, read, stop=("",)),
            "non-empty strings",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            run()
    dynamic = tiny_model(
        rope=Rope(8, kind="dynamic", factor=2.0, original_context=4096)
    )
    with pytest.raises(ValueError, match="rope is 'dynamic'"):
        saved_prompt.extend(dynamic, full, read, [[1], [], []])
    # What is of constant size has room for everything.
    ring = registry.parse("streaming_llm", **SMALL)
    one = saved_prompt.read(ONE_LAYER, ring, [PROMPTS[0]], room=1)
    (found,) = saved_prompt.generate(
        ONE_LAYER, ring, one, max_new_tokens=17, eos_ids=()
    )
    assert len(found.tokens) == 17


def test_what_it_does_not_belong_to_is_refused(saved):
    folder, _ = saved
    full = registry.parse("full")
    half = tiny_model(num_layers=1, dtype="bfloat16")._replace(name="half")
    wide = tiny_model(num_layers=1, mlp_width=64)._replace(name="wide")
    changed = jax.tree.map(lambda leaf: leaf, ONE_LAYER.params)
    changed["norm"]["weight"] = changed["norm"]["weight"].at[3].add(1e-6)
    tuned = ONE_LAYER._replace(params=changed, name="tuned")
    for model, name, message in [
        (
            ONE_LAYER,
            "tova:budget=5",
            "with method full and cannot go on with tova:budge",
        ),
        (half, "full", "saved with dtype float32 and cannot go on with bfloat16"),
        (wide, "full", "saved with model 'tiny' .* with 'wide': their sizes differ"),
        (tuned, "full", "saved with model 'tiny' .* 'tuned': their weights differ"),
    ]:
        with pytest.raises(ValueError, match=message):
            saved_prompt.restore(folder, model, full, method_name=name)
    other = registry.parse("quest", **SMALL)
    with pytest.raises(ValueError, match="whose full held other arrays"):
        saved_prompt.restore(folder, ONE_LAYER, other, method_name="full")
    renamed = ONE_LAYER._replace(name="the same under another name")
    assert saved_prompt.restore(folder, renamed, full, method_name="full").room == 12


def test_a_folder_is_complete_or_absent(saved, tmp_path, monkeypatch):
    folder, read = saved
    with pytest.raises(FileExistsError, match="remove it or choose another"):
        saved_prompt.save(folder, ONE_LAYER, read, method_name="full")
    with pytest.raises(FileNotFoundError, match="holds no prefix"):
        saved_prompt.about(tmp_path)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_prompt.files, "write_text", fail)
    with pytest.raises(OSError, match=r"b \(No space left on device\), and nothing"):
        saved_prompt.save(tmp_path / "new" / "b", ONE_LAYER, read, method_name="full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_found(saved, tmp_path):
    folder, _ = saved
    full = registry.parse("full")

    def damaged(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        return copy

    def about(**values):
        def change(copy):
            path = copy / saved_prompt.ABOUT
            path.write_text(json.dumps(json.loads(path.read_text()) | values))

        return change

    def cut_about(copy):
        (copy / saved_prompt.ABOUT).write_text('{"format"')

    def cut_arrays(copy):
        largest = max(copy.rglob("*"), key=lambda f: f.is_file() * f.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])

    def no_key(copy):
        (copy / saved_prompt.ABOUT).write_text('{"format": 2, "room": 3}')

    fingerprints = json.loads((folder / saved_prompt.ABOUT).read_text())["fingerprints"]
    flipped = [fingerprints[0] ^ 1, *fingerprints[1:]]
    lengths = json.loads((folder / saved_prompt.ABOUT).read_text())["prompt_tokens"]
    assert lengths[::-1] != lengths
    edited = (
        about(fingerprints=flipped),
        about(prompt_tokens=lengths[::-1]),  # as many tokens, cut elsewhere
        about(prompt_tokens=None),
        about(longest="x"),
        about(room=-5),
        about(leaves={}),
    )
    for change in (cut_about, cut_arrays, no_key, *edited):
        with pytest.raises(DamagedError, match="is damaged"):
            saved_prompt.restore(damaged(change), ONE_LAYER, full, method_name="full")
    with pytest.raises(ValueError, match="has format 3, this kvjax reads 2"):
        saved_prompt.restore(
            damaged(about(format=3)), ONE_LAYER, full, method_name="full"
        )
    # Orbax's threads leave the reads that failed to the collector: here, ignored.
    for _ in range(3):
        gc.collect()
        time.sleep(0.2)


def test_what_was_said_is_what_was_saved(tmp_path):
    full = registry.parse("full")
    read = saved_prompt.read(ONE_LAYER, full, PROMPTS, room=12)
    said = [{"role": "user", "content": "hi"}]
    lacks = [{"role": "user"}]
    with pytest.raises(ValueError, match="texts role and content"):
        saved_prompt.save(
            tmp_path / "no", ONE_LAYER, read, method_name="full", messages=lacks
        )
    folder = tmp_path / "talk"
    saved_prompt.save(folder, ONE_LAYER, read, method_name="full", messages=said)
    path = folder / saved_prompt.ABOUT
    saved = json.loads(path.read_text())
    assert saved_prompt.about(folder)["messages"] == said
    for messages in (None, said[:0], [said[0] | {"content": "ho"}]):
        path.write_text(json.dumps(saved | {"messages": messages}))
        with pytest.raises(DamagedError, match="messages are not what was saved"):
            saved_prompt.about(folder)
    del saved["said"]  # as of earlier versions
    for messages in (None, said):
        path.write_text(json.dumps(saved | {"messages": messages}))
        assert saved_prompt.about(folder)["messages"] == messages
    for messages in (lacks, ["hi"], "hi", [{"role": "user", "content": None}]):
        path.write_text(json.dumps(saved | {"messages": messages}))
        with pytest.raises(DamagedError, match="texts role and content"):
            saved_prompt.about(folder)


@pytest.mark.parametrize("name", ["sentencepiece", "joining_bytes", "word_piece"])
def test_texts_go_on_as_one_text(name):
    """No blank is gained, no BOS or EOS is inside, and the reply goes on with it."""
    tokenizer = FAMILIES[name]()
    surround(tokenizer.backend, "<s> $A </s>")
    model = tiny_model(num_layers=1, vocab_size=512)._replace(tokenizer=tokenizer)
    full = registry.parse("full")
    whole = ["hello world, hello", "a world"]
    options = {"max_new_tokens": 12, "eos_ids": ()}
    expected = generate.generate(model, full, whole, **options)
    read = saved_prompt.read(model, full, ["hello", "a"], room=40)
    longer = saved_prompt.extend(model, full, read, [" world, hello", " world"])
    prompts = [tuple(tokenizer.encode(text)) for text in whole]
    assert list(longer.prompts) == prompts
    found = saved_prompt.generate(model, full, longer, **options)
    assert found == expected
    for prompt, row in zip(prompts, found, strict=True):
        text = tokenizer.decode([*prompt, *row.tokens])
        assert tokenizer.decode(prompt) + row.text == text


def test_one_text_is_no_list_of_texts():
    full = registry.parse("full")
    with pytest.raises(TypeError, match="prompts is one text: put it in a list"):
        saved_prompt.read(MODEL, full, "hello")
    read = saved_prompt.read(ONE_LAYER, full, [[1, 2]])
    with pytest.raises(TypeError, match="more is one text: put it in a list"):
        saved_prompt.extend(ONE_LAYER, full, read, "hello")
    assert saved_prompt.extend(ONE_LAYER, full, read, [""]) is read
