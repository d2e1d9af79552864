"""phd: copies beside any method, against loops over pairs and the model as trained."""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles.phd
import pytest
from tiny import tiny_model

import kvjax
from kvjax import registry
from kvjax.accounting import state_bytes
from kvjax.copies import Copies
from kvjax.decoding import reader
from kvjax.evaluation.fidelity import side_by_side
from kvjax.methods import phd
from kvjax.rope import Rope
from kvjax.training.phd import phd_attention

PAGE = pathlib.Path(__file__).parents[2] / "docs/phd.md"
HEADS, SIZE = (4, 2), 4
# Ragged calls of a prompt, and steps behind them: past two borders of eight tokens, and
# twice around the ring. Prompts end at a border, before it and behind it.
CALLS = [(5, 0, 8, 3), (8, 1, 0, 4), (3, 0, 1, 0)]
STEPS = 18
CALL = 8
SIZES = [(2, 16, 8), (3, 5, 8), (5, 3, 4), (2, 0, 8), (3, 4, 0), (4, 1, 4)]


@functools.cache
def heads(copies: int):
    """Queries, keys and values of all copies: `(B, H, K, T, D)`."""
    rng = np.random.default_rng(copies)
    tokens = STEPS + max(map(sum, zip(*CALLS, strict=True)))
    shape = copies, tokens, SIZE

    def draw(heads, scale=1.0):
        x = scale * rng.standard_normal((len(CALLS[0]), heads, *shape))
        return x.astype(np.float32)

    return draw(HEADS[0], 2.0), draw(HEADS[1]), draw(HEADS[1])


def spec_of(sizes, **changes):
    q = heads(sizes[0])[0]
    fields = {
        "batch": q.shape[0],
        "num_q_heads": HEADS[0],
        "num_kv_heads": HEADS[1],
        "head_dim": SIZE,
        "capacity": q.shape[3] + 2,
        "dtype": "float32",
        "rope": Rope(SIZE),
        "max_new_tokens": STEPS,
        "copies": Copies(*sizes),
    }
    return kvjax.CacheSpec(**(fields | changes))


def call_rows(x, sizes, start, lengths):
    """The rows of a call as a model makes them, of `(B, H, K, T, D)`."""
    copies, window, chunk = sizes
    tail = 1 if not window else min(chunk, CALL) if chunk else CALL
    rows = np.full((*x.shape[:2], CALL + (copies - 1) * tail, SIZE), 3e3, np.float32)
    for b, (first, count) in enumerate(zip(start, lengths, strict=True)):
        rows[b, :, :count] = x[b, :, 0, first : first + count]
        for j in range(1, copies):
            behind = CALL + j * tail
            number = min(tail, count)
            last = x[b, :, j, first + count - number : first + count]
            rows[b, :, behind - number : behind] = last
    return jax.device_put(rows)


@functools.cache
def run(method, sizes):
    """States, the last copy of each row's newest token, and all steps' outputs."""
    given, spec = heads(sizes[0]), spec_of(sizes)
    state, start, last = method.init(spec), np.zeros(spec.batch, int), {}
    prefill = jax.jit(method.prefill)
    for lengths in CALLS:
        rows = (call_rows(x, sizes, start, lengths) for x in given)
        state, out = prefill(state, *rows, jax.device_put(np.int32(lengths)))
        start = start + lengths
        for b in np.flatnonzero(lengths):
            last[int(b)] = np.asarray(out)[b, :, -1]
    inputs = []
    for x in given:  # (steps, B, H, K, D)
        rows = [x[b, :, :, at : at + STEPS] for b, at in enumerate(start)]
        inputs.append(jax.device_put(np.moveaxis(np.stack(rows), 3, 0)))

    @jax.jit
    def decode(state, inputs):
        state = method.finish(state)
        return jax.lax.scan(functools.partial(drive.step, method), state, inputs)

    ended, (out, diagnostics) = decode(state, inputs)
    return state, last, np.asarray(out), diagnostics, ended, start


@functools.cache
def expected(sizes):
    q, k, v = heads(sizes[0])
    flat = (x.reshape(*x.shape[:2], -1, SIZE) for x in (q, k, v))
    return oracles.phd.attention(*flat, *sizes).reshape(q.shape)


@functools.cache
def full():
    return registry.parse("phd+full")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_layer_equals_loops_over_pairs(sizes):
    """The last copy behind each prompt, then all copies of every token."""
    right = expected(sizes)
    _, last, out, _, _, start = run(full(), sizes)
    for b, at in enumerate(start):
        np.testing.assert_allclose(last[b], right[b, :, -1, at - 1], atol=3e-6)
        wanted = np.moveaxis(right[b, :, :, at : at + STEPS], 2, 0)
        np.testing.assert_allclose(out[:, b], wanted, atol=3e-6)


def test_the_cache_is_the_vanilla_models():
    """To the bit: originals alone were appended, whatever the number of copies."""
    held = set()
    for sizes in SIZES[:2]:
        state, *_, ended, _ = run(full(), sizes)
        original = tuple(x[:, :, :1] for x in heads(sizes[0]))
        plain = dataclasses.replace(spec_of(sizes), copies=None)
        vanilla = kvjax.full().init(plain)
        length = state.length
        for n in range(int(length.max()) + STEPS):
            one = [jax.device_put(x[:, :, 0, n : n + 1]) for x in original[1:]]
            due = (n < length + STEPS).astype(jnp.int32)
            vanilla = extend(vanilla, *one, due)
        assert jax.tree.all(
            jax.tree.map(
                lambda a, b: np.array_equal(a, b),
                jax.tree.leaves(ended.inner),
                jax.tree.leaves(vanilla),
            )
        )
        held.add(state_bytes(kvjax.full(), plain))
        ring = sum(x.nbytes for x in (ended.ring_k, ended.ring_v, ended.length))
        assert state_bytes(full(), spec_of(sizes)) == max(held) + ring
    assert len(held) == 1


extend = jax.jit(phd.contiguous.extend)


@pytest.mark.parametrize(
    "spec",
    [
        *("quest", "snapkv", "streaming_llm", "refreshkv", "h2o"),
        "dense_layers:first=1+quest",
    ],
)
def test_a_covering_budget_is_full_attention(spec):
    sizes = SIZES[1]
    method = registry.parse(f"phd+{spec}", budget=64, page_size=4, window=4)
    _, last, out, diagnostics, ended, _ = run(method, sizes)
    _, want_last, want, *_ = run(full(), sizes)
    np.testing.assert_allclose(out, want, atol=1e-5)
    for b in last:
        np.testing.assert_allclose(last[b], want_last[b], atol=1e-5)
    assert diagnostics.exact.all()
    assert ended.store is None


def test_copies_share_what_a_method_chooses():
    """Quest's pages are those of Quest alone, given all copies as query heads."""
    sizes = SIZES[1]
    method = registry.parse("phd+quest:budget=8,page_size=4")
    quest = registry.parse("quest:budget=8,page_size=4")
    state, _, out, diagnostics, _, start = run(method, sizes)
    q, k, v = heads(sizes[0])
    alone = quest.finish(phd.folded(state.inner, sizes[0]))
    rows = np.arange(len(start))
    step = jax.jit(functools.partial(drive.step, quest))
    for i in range(3):
        one = [x[rows, :, :, start + i] for x in (q, k, v)]
        folded = one[0].reshape(len(rows), -1, 1, SIZE)
        inputs = [folded, one[1][:, :, :1], one[2][:, :, :1]]
        alone, (first, found) = step(alone, list(map(jax.device_put, inputs)))
        np.testing.assert_array_equal(diagnostics.attended[i], found.attended)
        original = first.reshape(len(rows), HEADS[0], sizes[0], SIZE)[:, :, 0]
        np.testing.assert_array_equal(out[i][:, :, 0], original)
    ring = {}
    for count in (2, 3, 5):
        spec = spec_of((count, 4, 8))
        read = method.traffic(spec, 20)
        copies = spec.copies
        ring[count] = 2 * copies.reach * copies.hidden * SIZE * 4 * HEADS[1] * len(rows)
        plain = dataclasses.replace(spec, copies=None)
        assert read.kv - ring[count] == quest.traffic(plain, 20).kv
        assert read.metadata == quest.traffic(plain, 20).metadata


def test_a_step_writes_in_place():
    """Donated, the cache and the ring are the next state's: nothing is copied."""
    sizes = SIZES[1]
    spec, rows = spec_of(sizes), (sizes[0], SIZE)
    state = jax.eval_shape(lambda: full().finish(full().init(spec)))
    heads = (HEADS[0], HEADS[1], HEADS[1])
    inputs = [jax.ShapeDtypeStruct((4, h, *rows), jnp.float32) for h in heads]
    step = jax.jit(functools.partial(drive.step, full()), donate_argnums=0)
    compiled = step.lower(state, inputs).compile()
    held = compiled.memory_analysis().alias_size_in_bytes
    assert held == state_bytes(full(), spec)


def test_weights_are_those_of_one_softmax():
    """With no query all keys seen weigh alike: originals, own copies and the window."""
    sizes = (3, 4, 8)
    method, spec = full(), spec_of(sizes, batch=1)
    ones = jnp.ones((1, HEADS[1], 3, SIZE))
    none = jnp.zeros((1, HEADS[0], 3, SIZE))
    step = jax.jit(functools.partial(drive.step, method))
    empty = jax.jit(method.prefill)(
        method.init(spec),
        *(jnp.zeros((1, h, 24, SIZE)) for h in (4, 2, 2)),
        jnp.zeros((1,), jnp.int32),
    )[0]  # nothing was read
    state = jax.jit(method.finish)(empty)
    for n in range(11):
        # Values say which copy they are of: the original's is 0.
        v = ones * jax.device_put(np.float32([0, 1, 1])).reshape(1, 1, 3, 1)
        state, (out, _) = step(state, (none, ones, v))
        inside = n % 8  # tokens of the chunk before this one
        for j in range(3):
            own = j
            near = 0 if j == 0 else min(2 * inside, max(4 - (j - 1), 0))
            share = (own + near) / (n + 1 + own + near)
            np.testing.assert_allclose(out[0, :, j], share, atol=1e-6)


# --- models


@pytest.mark.parametrize("sizes", [(2, 16, 8), (3, 5, 8), (5, 3, 4)], ids=str)
def test_decoding_is_the_model_as_trained(sizes):
    """Hidden states behind ragged prompts and of every step, float32."""
    names = ("copies", "copy_window", "copy_chunk")
    model = tiny_model(**dict(zip(names, sizes, strict=True)))
    decoder, lengths, steps = model.decoder, (21, 1, 13), STEPS
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (3, max(lengths) + steps)).astype(np.int32)
    attend = phd_attention(decoder.rope, copies=decoder.copies)
    trained = jax.jit(lambda params, x: decoder.hidden(params, x, attend))
    right = np.asarray(trained(model.params, tokens))
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    read = reader.prefill(model, full(), prompts, max_new_tokens=steps, chunk_size=8)
    fed = [row[n : n + steps] for row, n in zip(tokens, lengths, strict=True)]

    @jax.jit
    def decode(params, states, fed):
        def step(states, token):
            states, hidden = decoder.decode_step(params, states, token, full())
            return states, hidden[:, 0]

        return jax.lax.scan(step, states, fed)[1]

    fed = jax.device_put(np.stack(fed, 1)[:, :, None])
    decoded = np.asarray(decode(model.params, read.states, fed))
    for row, n in enumerate(lengths):
        scale = np.abs(right[row]).max()
        for mine, theirs in (
            (read.hidden[row], right[row, n - 1]),
            (decoded[:, row], right[row, n : n + steps]),
        ):
            np.testing.assert_allclose(mine / scale, theirs / scale, atol=1e-5)


def test_a_prompt_costs_little_more_than_the_vanilla_models():
    """By the operations that the compiler counts in a call of 512 tokens."""
    counted = {}
    for copies, method in ((1, kvjax.full()), (2, full())):
        sizes = dict(copies=2, copy_window=16, copy_chunk=32) if copies > 1 else {}
        decoder = tiny_model(num_layers=1, **sizes).decoder
        specs = kvjax.interface.layer_specs(decoder, 1, 512)
        states = jax.eval_shape(lambda s=specs, m=method: tuple(map(m.init, s)))
        tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        run = jax.jit(decoder.prefill, static_argnums=4)
        args = decoder.param_shapes(), states, tokens, lengths, method
        counted[copies] = run.lower(*args).compile().cost_analysis()["flops"]
    assert 1.03 < counted[2] / counted[1] < 1.1


# --- what is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("phd+retro:window=4+quest", "rows=4 must be 1: .*retro.* revises tokens, phd"),
        ("phd+citrus", "phd cannot wrap .*, which is told where a prompt's question"),
        ("dense_layers+phd+quest", "goes outermost, as in 'phd.dense_layers.quest'"),
        ("phd+phd+quest", "phd cannot wrap .*, which takes the copies of a token"),
        ("phd+critiprefill+full", "critiprefill goes outermost"),
        ("phd+topk_completion", "topk_completion.* estimates what it does not attend"),
        ("phd+dense_layers+subgen:mode=stream", "subgen.* estimates what it does not"),
    ],
)
def test_what_does_not_go_together_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.parse(spec)


def test_a_model_that_repeats_needs_phd():
    model = tiny_model(copies=3)
    with pytest.raises(ValueError, match=r"3 copies of a token: use 'phd\+quest:"):
        reader.prefill(model, "quest:budget=16", [[1, 2]], max_new_tokens=1)
    with pytest.raises(ValueError, match="scores of a prompt: not for models that rep"):
        kvjax.score(model, "phd+full", [[1, 2, 3, 4]], prefill=2)
    with pytest.raises(ValueError, match="methods side by side: not for models that"):
        side_by_side(kvjax.full(), full()).init(spec_of((3, 4, 8)))
    tokens = jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"\(1, 2\) must be \(B, 1\): .* 3 copies"):
        model.decoder.decode_step(model.params, (), tokens, full())


def test_what_is_kept_for_each_query_head_is_refused():
    class Kept(NamedTuple):
        heads: jax.Array

    def init(spec, weights=None):
        return Kept(jnp.zeros((spec.batch, spec.num_q_heads)))

    strange = kvjax.full()._replace(init=init, finish=lambda state: state)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) with 4 heads and \(4, 12\)"):
        kvjax.phd(strange).init(spec_of((3, 4, 8)))


def test_a_model_that_repeats_nothing_is_the_methods():
    spec = dataclasses.replace(spec_of((2, 0, 0)), copies=None)
    states = (jax.eval_shape(lambda m=m: m.init(spec)) for m in (full(), kvjax.full()))
    assert len({jax.tree.structure(state) for state in states}) == 1


def test_the_picture_on_the_page_is_the_mask():
    names = [f"{n}{kind}" for n in range(6) for kind in "oh"]
    lines = ["    " + " ".join(names)]
    for name, sees in zip(names, oracles.phd.mask(6, 2, 2, 3), strict=True):
        pairs = zip(names, sees, strict=True)
        kinds = (other[1] if seen else "." for other, seen in pairs)
        lines.append(f"{name}  " + " ".join(kind.rjust(2) for kind in kinds))
    assert "```\n" + "\n".join(lines) + "\n```" in PAGE.read_text("utf-8")
