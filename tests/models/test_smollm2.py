"""A real model, SmolLM2-135M-Instruct: what transformers makes of it, and every method.

`smollm2_reference.py` makes the goldens. The contract of the methods is shown on the
queries, keys and values of all its layers, which one pass over a text records.
"""

import dataclasses
import pathlib
import sysconfig

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2_reference as reference

import models
from kvjax import registry
from kvjax.decoding import saved_prompt
from kvjax.decoding.generate import generate

TOLERANCE = 2e-4  # of a log-probability, in nats
FULL = registry.parse("full")
NUM_SOURCES = 20  # whose tokens are compared
STEPS = 6  # of a method, on recorded heads
CAPACITY = 160
LAYERS = 2  # where depth does not matter


@pytest.fixture(scope="module")
def model(smollm2):
    assert smollm2.is_file()
    return models.load("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def beginning(model):
    """Its first layers: all that is real but depth, which is most of the compiling."""
    config = dataclasses.replace(model.decoder.config, num_layers=LAYERS)
    layers = {layer: model.params["layers"][layer] for layer in range(LAYERS)}
    params = model.params | {"layers": layers}
    return model._replace(decoder=type(model.decoder)(config), params=params)


@pytest.fixture(scope="module")
def goldens():
    with np.load(reference.GOLDENS) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def chat(model):
    return model.tokenizer.apply_chat_template(reference.CHAT)


@pytest.fixture(scope="module")
def passage(model, goldens):
    """`run(params)`: log-probabilities (T, V), and q, k, v of the layers (L, H, T, D).

    The layers attend under `full`; their queries and keys are not yet rotated.
    """
    tokens, decoder = goldens["tokens"], model.decoder
    spec = decoder.cache_spec(1, len(tokens))
    lengths = jnp.full((1,), len(tokens), jnp.int32)

    @jax.jit
    def run(params):
        heads = []

        def attention(layer, q, k, v):
            del layer
            heads.append((q, k, v))
            _, out = FULL.prefill(FULL.init(spec), q, k, v, lengths)
            return out

        hidden = decoder.hidden(params, tokens[None], attention)
        log_probs = jax.nn.log_softmax(decoder.logits(params, hidden[0]))
        return log_probs, [jnp.concatenate(x) for x in zip(*heads, strict=True)]

    return run


@pytest.fixture(scope="module")
def recorded(passage, model):
    return jax.tree.map(np.asarray, passage(model.params))


def worst_error(log_probs, goldens):
    """Largest difference to transformers', over the text and the likeliest tokens."""
    tokens, positions = goldens["tokens"], goldens["positions"]
    own = log_probs[np.arange(len(tokens) - 1), tokens[1:]]
    likeliest = np.take_along_axis(log_probs[positions], goldens["likeliest"], 1)
    return max(
        np.abs(own - goldens["log_probs"]).max(),
        np.abs(likeliest - goldens["likeliest_log_probs"]).max(),
    )


# --- what transformers and tokenizers say


def test_log_probabilities_equal_transformers(recorded, goldens):
    log_probs, _ = recorded
    assert worst_error(log_probs, goldens) < TOLERANCE
    best = np.argmax(log_probs[goldens["positions"]], axis=1)
    np.testing.assert_array_equal(best, goldens["likeliest"][:, 0])


def one_head_interleaved(layer):
    """As llama.cpp stores it: a rotary pair side by side."""
    order = np.arange(64).reshape(2, 32).T.ravel()
    kernel = layer["attention"]["k"]["kernel"]
    layer["attention"]["k"]["kernel"] = kernel.at[:, :64].set(kernel[:, order])


def one_block_off(layer):
    """A block of 32 quantized weights whose offset is left out."""
    kernel = layer["mlp"]["up"]["kernel"]
    block = kernel[:32, 7]
    layer["mlp"]["up"]["kernel"] = kernel.at[:32, 7].set(block - block.min())


def norm_off(layer):
    layer["mlp_norm"]["weight"] *= 1.0005


@pytest.mark.parametrize("mutant", [one_head_interleaved, one_block_off, norm_off])
def test_the_tolerance_notices(mutant, passage, model, goldens):
    params = jax.tree.map(lambda leaf: leaf, model.params)
    mutant(params["layers"][11])
    log_probs, _ = passage(params)
    assert worst_error(np.asarray(log_probs), goldens) > 3 * TOLERANCE


def test_the_tokenizer_is_that_of_an_independent_construction(smollm2, model):
    theirs = reference.tokenizer(smollm2)
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py"))[:: len(list(root.glob("*.py"))) // NUM_SOURCES]
    texts = [path.read_text("utf-8")[:50_000] for path in files[:NUM_SOURCES]]
    texts += [
        reference.passage(),
        "   123\n\n\t 4567 <|im_end|>x",
        "naïve 日本語 🙂 ١٢٣",
    ]
    assert len(texts) == NUM_SOURCES + 3
    for text in texts:
        ids = model.tokenizer.encode(text)
        assert ids == theirs.encode(text).ids
        assert model.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_chat_is_what_transformers_makes_of_it(smollm2, model, chat, goldens):
    text = model.tokenizer.apply_chat_template(reference.CHAT, tokenize=False)
    assert text == str(goldens["chat"])
    assert chat == reference.tokenizer(smollm2).encode(text).ids
    assert model.tokenizer.decode([*model.eos_ids], False) == "<|im_end|>"


@pytest.fixture(scope="module")
def answer(model, chat):
    options = {"max_new_tokens": reference.NUM_GENERATED, "eos_ids": ()}
    return generate(model, FULL, [chat], **options)[0]


def test_greedy_text_equals_transformers(answer, smollm2, goldens):
    assert answer.tokens == goldens["generated"].tolist()
    expected = reference.tokenizer(smollm2).decode(answer.tokens)
    assert answer.text == expected
    assert "Mercury" in answer.text


# --- what every method promises


def dense(q, k, v, rope):
    """Causal softmax attention of (L, H, T, D) in float64."""
    steps = np.arange(q.shape[2])

    def turn(x):
        half = x.shape[-1] // 2
        angles = steps[:, None] * rope.theta ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(turn(k), group, axis=1), np.repeat(v, group, axis=1)
    logits = turn(q) @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    logits = np.where(steps[:, None] >= steps, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.fixture(scope="module")
def stream(recorded):
    """Each layer a row of its own length, at its own place of the text."""
    heads = recorded[1]
    num_layers = heads[0].shape[0]
    prompts = tuple(90 + 2 * row for row in range(num_layers))
    longest = max(prompts) + STEPS
    starts = range(0, 4 * num_layers, 4)
    rows = [
        np.stack(
            [x[row, :, start : start + longest] for row, start in enumerate(starts)]
        )
        for x in heads
    ]
    return drive.Stream(*rows, prompts, STEPS)


@pytest.fixture(scope="module")
def expected(stream, model):
    return dense(*stream[:3], model.decoder.config.rope)


SPECS = [*registry.names(1.0), *map(registry.example, registry.transforms())]


@pytest.mark.parametrize("spec", SPECS)
def test_is_full_attention_when_the_budget_covers_the_text(
    spec, stream, expected, model
):
    options = registry.options(spec.split("+")[-1])
    budget = {"budget": CAPACITY} if "budget" in options else {}
    method = registry.parse(spec, **budget)
    config = model.decoder.config
    cache_spec = drive.make_spec(stream, CAPACITY, layer=3, rope=config.rope)
    run = drive.run(method, cache_spec, stream)
    for row, prompt in enumerate(stream.prompts):
        drive.assert_rows_close(run.prompt_out[row], expected[row, :, :prompt])
        out, truth = run.out[:, row], expected[row, :, prompt : prompt + STEPS]
        out = out.swapaxes(0, 1)
        if method.lossy:  # 8 bits of each number: a few hundredths of a head
            gap = np.linalg.norm(out - truth, axis=-1)
            assert (gap < 0.05 * np.linalg.norm(truth, axis=-1)).all()
        else:
            drive.assert_rows_close(out, truth)
    assert (run.diagnostics.exact == (not method.lossy)).all()


@pytest.fixture(scope="module")
def short_answer(beginning, chat):
    options = {"max_new_tokens": reference.NUM_GENERATED, "eos_ids": ()}
    return generate(beginning, FULL, [chat], **options)[0]


# A choice of pages at every step, and a choice of tokens at the prompt's end, which is
# read once or twice before.
@pytest.mark.parametrize("spec", ["quest", "snapkv", "kvzip"])
def test_the_text_is_that_of_full_when_the_budget_covers_it(
    spec, beginning, chat, short_answer
):
    method = registry.parse(spec, budget=512)
    (found,) = generate(beginning, method, [chat], max_new_tokens=32, eos_ids=())
    assert found.tokens == short_answer.tokens[:32]


def test_drafts_lose_nothing(beginning, chat, short_answer):
    """The text is that of single steps."""
    options = {"max_new_tokens": reference.NUM_GENERATED, "eos_ids": ()}
    options |= {"draft": "streaming_llm:budget=24", "draft_tokens": 4}
    (found,) = generate(beginning, FULL, [chat], **options)
    assert found._replace(drafts=None) == short_answer
    assert found.drafts.accepted > 0


# --- rows and saved prompts


def test_a_row_does_not_depend_on_its_neighbours(beginning, chat, short_answer):
    options = {"max_new_tokens": reference.NUM_GENERATED, "eos_ids": ()}
    shorter = chat[:-3]
    batch = generate(beginning, FULL, [chat[:9], chat, shorter], **options)
    assert batch[1] == short_answer
    assert [batch[2]] == generate(beginning, FULL, [shorter], **options)


def test_a_saved_prompt_goes_on_bit_for_bit(beginning, chat, short_answer, tmp_path):
    model, room, folder = beginning, reference.NUM_GENERATED, tmp_path / "read"
    read = saved_prompt.read(model, FULL, [chat], room=room)
    saved_prompt.save(folder, model, read, method_name="full")
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(read)]
    restored = saved_prompt.restore(folder, model, FULL, method_name="full")
    after = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored)]
    assert after == before
    found = saved_prompt.generate(model, FULL, restored, eos_ids=())
    assert found == [short_answer]
