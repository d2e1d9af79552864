"""Training's attention against plain formulas, prefill, decode and differences."""

import functools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny import tiny_model

from kvjax.methods.full import full
from kvjax.rope import Rope
from kvjax.training import attention as module
from kvjax.training.attention import causal_attention

ALPHAS = [1.0, 4 / 3, 1.5, 2.0]


def _heads(batch, length, heads=(4, 2), size=8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q = 2 * rng.standard_normal((batch, heads[0], length, size))
    k, v = rng.standard_normal((2, batch, heads[1], length, size))
    return [jax.device_put(x.astype(dtype)) for x in (q, k, v)]


def _plain(q, k, v, visible, alpha):
    """All scores at once in float64, probabilities by the oracle's definition;
    `visible` is (B, T, S)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
    visible = np.broadcast_to(visible[:, None], scores.shape)
    p = np.zeros(scores.shape)
    for index in np.ndindex(*scores.shape[:-1]):
        kept = visible[index]
        if not kept.any():
            continue
        if alpha == 1:
            weights = np.exp(scores[index][kept] - scores[index][kept].max())
            p[index][kept] = weights / weights.sum()
        else:
            p[index][kept] = oracles.entmax(scores[index][kept], alpha)
    return np.einsum("bhts,bhsd->bhtd", p, v)


def _causal(length, segments=None):
    visible = np.tri(length, dtype=bool)[None]
    if segments is None:
        return visible
    same = segments[:, :, None] == segments[:, None, :]
    return visible & same & (segments > 0)[:, :, None]


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [1] * 6 + [2] * 4, [0] * 10])


def _unrotated(x, positions, length=None):
    del positions, length
    return x


def _small_steps(monkeypatch, min_block=1, scores=1):
    monkeypatch.setattr(module, "CPU_SCORES", scores)
    monkeypatch.setattr(module, "CPU_MIN_BLOCK", min_block)


# --- values


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("block", [256, 4, 1], ids="block{}".format)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_equals_plain_attention(alpha, block, packed):
    """One block, blocks that do not divide the length, and more blocks than groups."""
    q, k, v = _heads(3, 10)
    segments = SEGMENTS if packed else None
    attend = causal_attention(
        _unrotated,
        alpha=alpha,
        segments=None if segments is None else jnp.asarray(segments),
        block=block,
    )
    out = jax.jit(functools.partial(attend, 0))(q, k, v)
    expected = _plain(q, k, v, _causal(10, segments), alpha)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    if packed:
        assert (np.asarray(out)[2] == 0).all()
        assert (np.asarray(out)[0, :, 8:] == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_groups_of_blocks_end_where_their_queries_do(alpha):
    """Nineteen blocks in groups of three, the last group of one."""
    q, k, v = _heads(1, 37, heads=(3, 1))
    attend = causal_attention(_unrotated, alpha=alpha, block=2)
    plan = module._plan(q.shape, 2, 1.0, alpha)
    assert [b - a for a, b in plan.groups] == [3] * 6 + [1]
    expected = _plain(q, k, v, _causal(37), alpha)
    out = jax.jit(functools.partial(attend, 0))(q, k, v)
    np.testing.assert_allclose(out, expected, atol=3e-6)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_packed_rows_equal_rows_alone(alpha):
    """With rotations that restart, a sequence does not know that it was packed."""
    lengths, rope = (4, 5, 3), Rope(8)
    q, k, v = _heads(1, 12)
    segments = jnp.asarray([np.repeat([1, 2, 3], lengths)])
    positions = jnp.asarray([np.concatenate([np.arange(n) for n in lengths])])
    packed = causal_attention(rope, alpha=alpha, segments=segments, positions=positions)
    out, start = jax.jit(functools.partial(packed, 0))(q, k, v), 0
    attend = jax.jit(functools.partial(causal_attention(rope, alpha=alpha), 0))
    for n in lengths:
        part = [x[:, :, start : start + n] for x in (q, k, v)]
        alone = attend(*part)
        np.testing.assert_allclose(out[:, :, start : start + n], alone, atol=2e-6)
        start += n
    assert np.abs(attend(q, k, v) - out).max() > 0.1


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_bfloat16_accumulates_in_float32(alpha):
    q, k, v = _heads(1, 200)
    low = [np.asarray(x).astype(jnp.bfloat16) for x in (q, k, v)]
    attend = functools.partial(causal_attention(_unrotated, alpha=alpha), 0)

    @jax.jit
    def both(*inputs):
        out, pull = jax.vjp(attend, *inputs)
        return out, pull(out)

    out, grads = jax.tree.map(np.asarray, both(*low))
    wide, expected = both(*(x.astype(np.float32) for x in low))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), wide, atol=0.02)
    for grad, other in zip(grads, jax.tree.map(np.asarray, expected), strict=True):
        assert grad.dtype == jnp.bfloat16
        scale = np.abs(other).max()
        np.testing.assert_allclose(grad.astype(np.float32), other, atol=0.02 * scale)


# --- gradients


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("block", [256, 3], ids="block{}".format)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_gradients_equal_differences_in_float64(alpha, block, packed):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        inputs = _heads(3, 10, dtype=np.float64)
        assert inputs[0].dtype == jnp.float64
        tangents = [jnp.asarray(rng.standard_normal(x.shape)) for x in inputs]
        weight = jnp.asarray(rng.standard_normal(inputs[0].shape))
        attend = causal_attention(
            _unrotated,
            alpha=alpha,
            segments=jnp.asarray(SEGMENTS) if packed else None,
            block=block,
        )

        @jax.jit
        def loss(q, k, v):
            return (attend(0, q, k, v) * weight).sum()

        grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)
        step = 1e-6
        for i, (grad, tangent) in enumerate(zip(grads, tangents, strict=True)):
            ends = []
            for sign in (1, -1):
                moved = list(inputs)
                moved[i] = inputs[i] + sign * step * tangent
                ends.append(loss(*moved))
            expected = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose((grad * tangent).sum(), expected, rtol=1e-6)
            assert np.isfinite(grad).all()
            if packed:
                assert (np.asarray(grad)[2] == 0).all()


# --- the same function as in decoding


@pytest.mark.parametrize("alpha", [1.0, 4 / 3, 1.5])
def test_training_equals_prefill_and_decode(alpha):
    """Teacher-forced: the hidden states that `full` gives, token by token."""
    model = tiny_model(attention_alpha=alpha)
    decoder, params = model.decoder, model.params
    tokens = np.random.default_rng(2).integers(0, 256, (2, 24))
    tokens = jnp.asarray(tokens, jnp.int32)
    spec = decoder.cache_spec(2, 24, 12)
    assert spec.alpha == decoder.alpha == alpha
    attend = causal_attention(spec.rope, alpha=decoder.alpha, block=7)
    hidden = jax.jit(lambda params: decoder.hidden(params, tokens, attend))(params)

    method = full()
    states = tuple(method.init(spec) for _ in range(decoder.num_layers))
    prefill = jax.jit(decoder.prefill, static_argnums=4)
    step = jax.jit(decoder.decode_step, static_argnums=3)
    lengths = jnp.full((2,), 12, jnp.int32)
    states, prompt = prefill(params, states, tokens[:, :12], lengths, method)
    states, outs = tuple(method.finish(s) for s in states), [prompt]
    for t in range(12, 24):
        states, out = step(params, states, tokens[:, t : t + 1], method)
        outs.append(out)
    np.testing.assert_allclose(hidden, jnp.concatenate(outs, 1), atol=2e-5)
    other = causal_attention(spec.rope, alpha=1.0 if alpha > 1 else 1.5)
    changed = jax.jit(lambda params: decoder.hidden(params, tokens, other))(params)
    assert np.abs(changed - hidden).max() > 0.1


def test_equals_the_oracle_with_rotations():
    stream = drive.make_stream((9,), 0)
    attend = causal_attention(Rope(8), alpha=1.5, sm_scale=0.2)
    out = jax.jit(functools.partial(attend, 0))(*map(jax.device_put, stream[:3]))
    row = stream.row(0)._replace(sm_scale=0.2)
    expected = oracles.full(row, 1.5).out.swapaxes(0, 1)
    drive.assert_rows_close(np.asarray(out)[0], expected)


def test_remat_changes_nothing_but_memory():
    model = tiny_model(attention_alpha=1.5)
    decoder = model.decoder
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 256, (1, 9)), jnp.int32)
    attend = causal_attention(decoder.config.rope, alpha=1.5)

    def loss(params, remat):
        hidden = decoder.hidden(params, tokens, attend, remat=remat)
        return (decoder.logits(params, hidden) ** 2).mean()

    plain = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = plain(model.params, False)
    again, grads_again = plain(model.params, True)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    text = {
        r: str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(model.params, r))
        for r in (False, True)
    }
    assert "remat2" in text[True]
    assert "remat2" not in text[False]


# --- memory


@pytest.fixture
def optimised():
    """The suite compiles without optimisations; here they are the subject."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def _temporaries(attend, length):
    shapes = [
        jax.ShapeDtypeStruct((1, heads, length, 8), jnp.float32) for heads in (2, 1, 1)
    ]

    def grads(q, k, v):
        return jax.grad(lambda *x: attend(0, *x).sum(), (0, 1, 2))(q, k, v)

    compiled = jax.jit(grads).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_memory_is_linear_in_the_length(alpha, optimised, monkeypatch):
    _small_steps(monkeypatch, min_block=32)
    attend = causal_attention(_unrotated, alpha=alpha, block=32)
    short, long = (_temporaries(attend, n) for n in (2048, 4096))
    assert long < 2.2 * short
    assert long < 2 * 4096**2 * 4 / 8  # an eighth of the scores of all queries


def test_memory_of_all_scores_at_once_is_not(optimised):
    """What the bound is there to notice."""

    def plain(layer, q, k, v):
        del layer
        k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
        scores = jnp.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
        masked = jnp.where(_causal(q.shape[2])[:, None], scores, -1e30)
        return jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(masked, -1), v)

    short, long = (_temporaries(plain, n) for n in (512, 1024))
    assert long > 3 * short


# --- errors


def test_wrong_arguments(unchecked_shapes):
    for options, message in [
        ({"alpha": 0.5}, "alpha=0.5 must be at least 1"),
        ({"alpha": float("nan")}, "alpha=nan must be at least 1"),
        ({"block": 0}, "block=0 must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            causal_attention(Rope(8), **options)
    q, k, v = _heads(3, 10)
    with pytest.raises(ValueError, match="shapes disagree"):
        causal_attention(Rope(8))(0, q, k[:, :, :9], v)
    for name in ("segments", "positions"):
        given = {name: jnp.ones((3, 9), jnp.int32)}
        with pytest.raises(ValueError, match=rf"{name} \(3, 9\) must be .*\(3, 10\)"):
            causal_attention(Rope(8), **given)(0, q, k, v)
