"""The stream of SubGen: no bias, bounded errors, and appends that equal rebuilds.

Laws are over draws: every row of a batch has a seed of its own, and one prompt.
"""

import functools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import centres, reservoirs
from kvjax.interface import CacheSpec
from kvjax.methods.subgen import bound, stream
from kvjax.methods.subgen.method import subgen
from kvjax.methods.subgen.options import Options
from kvjax.stores.contiguous import Contiguous

SEEDS, FOLDED, DIM, HEADS, GROUP = 2000, 40, 6, 2, 2
OPTIONS = Options(
    budget=30,
    mode="stream",
    window=1,
    num_sinks=2,
    per_cluster=3,
    samples=8,
    clusters=5,
    delta=1.8,
    lam=1.0,
    norm_cap=False,
    seed=0,
)
END = FOLDED + OPTIONS.num_sinks  # of the tokens that are folded
WINDOW = OPTIONS.newest


# For bits: a longer window, and clusters that fill up where keys are long.
BITS = Options(**vars(OPTIONS) | {"window": 4, "budget": 33, "delta": 2.0})
SCALE = 0.5


def unrotated(x, positions, length=None):
    del positions, length
    return x


def spec_of(batch, capacity=64, dtype="float32", sm_scale=1.0):
    return CacheSpec(
        batch,
        GROUP * HEADS,
        HEADS,
        DIM,
        capacity,
        dtype,
        unrotated,
        max_new_tokens=20,
        sm_scale=sm_scale,
    )


def tokens(alike=False):
    """Heads of one row, the mean of whose values is far from 0.

    Keys that are `alike` lie near five points, in an order of each head.
    """
    rng = np.random.default_rng(0)
    shape = (1, HEADS, END + WINDOW, DIM)
    q = rng.standard_normal((1, GROUP * HEADS, 1, DIM))
    q *= 0.8 / np.linalg.norm(q, axis=-1, keepdims=True)
    lengths = rng.uniform(0.3, 2, (*shape[:3], 1))
    v = lengths * (0.5 + rng.standard_normal(shape))
    k = rng.standard_normal(shape)
    if alike:
        k = 0.1 * k + 4 * np.eye(DIM)[rng.integers(0, 5, shape[:3])]
    return tuple(x.astype(np.float32) for x in (q, k, v))


def keys_of(rows):
    """A key for each row."""
    return jax.vmap(lambda i: jax.random.key_data(jax.random.key(i)))(jnp.arange(rows))


def prompt_state(options, spec, k, v, key, length=None):
    """A prompt's end for rows of the same tokens, with keys of their own."""
    padding = ((0, 0), (0, 0), (0, spec.capacity - k.shape[2]), (0, 0))

    def rows(x):
        x = jnp.pad(jnp.asarray(x, spec.dtype), padding, constant_values=1e30)
        return jnp.broadcast_to(x, (spec.batch, *x.shape[1:]))

    length = k.shape[2] if length is None else length
    length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), (spec.batch,))
    store = Contiguous(spec, rows(k), rows(v), length)
    return stream.finish(options, stream.StreamPrompt(store, key))


def appended(options, state, k, v):
    """Takes the tokens one by one, the same in every row."""

    def one(state, x):
        k, v = (jnp.broadcast_to(y[:, :, None], (rows, HEADS, 1, DIM)) for y in x)
        return stream.append(options, state, k, v), None

    rows = state.length.shape[0]
    ahead = tuple(jnp.moveaxis(jnp.asarray(x, state.k.dtype), 2, 0) for x in (k, v))
    return jax.lax.scan(one, state, ahead)[0]


@jax.jit
def run(keys, q, k, v):
    half, spec = END - FOLDED // 2, spec_of(len(keys))
    state = prompt_state(OPTIONS, spec, k[:, :, :half], v[:, :, :half], keys)
    state = appended(OPTIONS, state, k[:, :, half:], v[:, :, half:])
    rows = jnp.broadcast_to(q, (len(keys), *q.shape[1:]))
    mean, log_z = stream.numerator(state.folded, rows, 1.0)
    tau = jnp.exp(stream.log_tau(state.folded, rows, 1.0))
    return state, tau[..., 0], (jnp.exp(log_z)[..., None] * mean)[:, :, 0]


@functools.cache
def many(alike=False):
    """States of 2,000 seeds, half of whose tokens were appended; tau and z of each."""
    state, tau, z = run(keys_of(SEEDS), *tokens(alike=alike))
    return state, np.asarray(tau, float), np.asarray(z, float)


def truth(q, k, v):
    """`e (Hq, n)`, values `(Hq, n, D)` of the folded tokens, float64, by query head."""
    k, v = (
        np.repeat(np.asarray(x[0, :, OPTIONS.num_sinks : END], float), GROUP, axis=0)
        for x in (k, v)
    )
    return np.exp(np.einsum("hd,hnd->hn", q[0, :, 0].astype(float), k)), v


def labels_of(k):
    found = centres.online(
        jnp.asarray(k[:, :, OPTIONS.num_sinks : END]),
        jnp.ones((1, HEADS, FOLDED), bool),
        OPTIONS.delta,
        OPTIONS.most,
    )
    return found, np.asarray(found.labels[0])


def test_both_sums_are_without_bias():
    """The mean of 2,000 seeds within 4 standard errors of the truth, in every number:
    of those that were drawn at once, and of those drawn one by one."""
    state, tau, z = many()
    e, v = truth(*tokens())
    for actual, expected in ((tau, e.sum(1)), (z, np.einsum("hn,hnd->hd", e, v))):
        error = actual.std(0) / np.sqrt(SEEDS)
        assert (np.abs(actual.mean(0) - expected) < 4 * error).all()
        assert (error < 0.05 * np.abs(expected).max()).all()
    np.testing.assert_array_equal(state.folded.counts.sum(-1), FOLDED)
    mass = (v[::GROUP] ** 2).sum((1, 2))
    np.testing.assert_allclose(state.folded.mass, np.tile(mass, (SEEDS, 1)), rtol=1e-6)


def test_variances_are_those_of_independent_draws():
    """Of the numerator (mu sum e^2 - |N|^2) / s; of the normaliser by cluster."""
    _, tau, z = many()
    q, k, v = tokens()
    e, values = truth(q, k, v)
    n = np.einsum("hn,hnd->hd", e, values)
    mass = (values**2).sum((1, 2))
    expected = (mass * (e**2).sum(1) - (n**2).sum(1)) / OPTIONS.drawn
    found = ((z - n) ** 2).sum(-1).mean(0)
    np.testing.assert_allclose(found, expected, rtol=0.1)
    _, labels = labels_of(k)
    expected = np.zeros(len(e))
    for h, cluster in np.ndindex(len(e), OPTIONS.most):
        own = e[h, labels[h // GROUP] == cluster]
        if len(own):
            expected[h] += len(own) ** 2 / OPTIONS.per_cluster * own.var()
    np.testing.assert_allclose(tau.var(0), expected, rtol=0.1)


@pytest.mark.parametrize("alike", [False, True])
def test_the_normaliser_is_within_its_bound_for_every_seed(alike):
    """The widest cluster's diameter times |x|; twice a radius is no less."""
    _, tau, _ = many(alike)
    q, k, v = tokens(alike)
    found, labels = labels_of(k)
    keys = k[0, :, OPTIONS.num_sinks : END].astype(float)
    apart = np.linalg.norm(keys[:, :, None] - keys[:, None], axis=-1)
    apart *= labels[:, :, None] == labels[:, None]
    diameter = np.repeat(apart.max((1, 2)), GROUP)
    nats = diameter * np.linalg.norm(q[0, :, 0], axis=-1)
    error = np.abs(np.log(tau) - np.log(truth(q, k, v)[0].sum(1)))
    assert (error <= nats).all()
    assert (error.max(0) > 0.1 * nats).all()
    promised = bound.normaliser(found, jnp.asarray(q)).ravel()
    assert (nats <= promised).all()
    assert (promised <= 2 * nats).all()


def test_the_numerator_is_within_its_bound_and_falls_as_more_are_drawn():
    """The root mean square of the error by the root of the number of samples."""
    rows, most = 400, 512
    q, k, v = tokens()
    e, values = truth(q, k, v)
    n, p = np.einsum("hn,hnd->hd", e, values), e / e.sum(1, keepdims=True)
    folded = (jnp.asarray(x[:, :, OPTIONS.num_sinks : END]) for x in (k, v))
    key = keys_of(rows)

    @jax.jit
    def numerators(key, k, v):
        k, v = (jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (k, v))
        weights = stream.squared_norm(v)
        won = reservoirs.race_weighted(key, weights, most).positions[..., None]
        pair = stream.paired(*(jnp.take_along_axis(x, won, axis=2) for x in (k, v)))
        mass, found = weights.sum(-1), []
        asked = jnp.broadcast_to(q, (rows, *q.shape[1:]))
        for size in (8, 64, most):
            own = [x[:, :, :size] for x in pair]
            race = jnp.zeros(own[0].shape[:3])
            of = stream.Folded(*[None] * 4, *own, race, mass, *[None] * 3)
            mean, factor = stream.numerator(of, asked, 1.0)
            found.append((jnp.exp(factor)[..., None] * mean)[:, :, 0])
        return found

    weights = jnp.asarray(p, jnp.float32)[None, :, None]
    held = jnp.asarray(values, jnp.float32)[None]
    errors = []
    for size, z in zip((8, 64, most), numerators(key, *folded), strict=True):
        squares = ((np.asarray(z, float) - n) ** 2).sum(-1).mean(0)
        error = np.sqrt(squares) / e.sum(1)
        promised = np.asarray(bound.numerator(weights, held, size))[0, :, 0]
        widest = [np.linalg.norm(x, 2) for x in values]
        by_norm = widest * np.linalg.norm(p, axis=1) * np.sqrt(DIM / size)
        assert (error <= promised).all()
        assert (promised <= by_norm * (1 + 1e-6)).all()
        errors.append(error)
    slope = np.log(errors[-1] / errors[0]) / np.log(most / 8)
    np.testing.assert_allclose(slope, -0.5, atol=0.05)


# --- bits


@functools.partial(jax.jit, static_argnums=0)
def rebuilt(ahead, k, v, length):
    """The state of all tokens but the last few, and these appended; ragged rows."""
    rows = k.shape[0]
    key = reservoirs.row_keys(0, 3, rows)
    store = Contiguous(spec_of(rows, sm_scale=SCALE), k, v, length - ahead)
    state = stream.finish(BITS, stream.StreamPrompt(store, key))

    def one(state, _):
        at = state.length[:, None, None, None]
        k_next, v_next = (jnp.take_along_axis(x, at, axis=2) for x in (k, v))
        return stream.append(BITS, state, k_next, v_next), None

    return jax.lax.scan(one, state, None, ahead)[0]


def ragged():
    """Rows 0 and 3 are equal; keys of head 1 are short; row 5 has no values."""
    rng = np.random.default_rng(4)
    shape = (6, HEADS, 64, DIM)
    k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    k[:, 1] *= 0.4
    k[3], v[3] = k[0], v[0]
    v[4, :, 10:20] = 0
    v[5] = 0
    lengths = jnp.asarray((50, 21, 22, 50, 64, 40), jnp.int32)
    return jnp.asarray(k), jnp.asarray(v), lengths


@functools.cache
def states():
    """Of prompts alone, and of prompts with 20 tokens appended."""
    return rebuilt(0, *ragged()), rebuilt(20, *ragged())


def test_appends_are_a_rebuild_bit_for_bit():
    """From rows of which nothing was folded, to rows whose clusters are full; but for
    the order in which one sum was added up."""
    one, other = states()
    held = np.asarray(stream.newest(BITS.split(one.spec), one.length)) >= 0
    for name in ("k", "v"):
        a, b = (np.where(held[..., None], getattr(x, name), 0) for x in (one, other))
        np.testing.assert_array_equal(a, b)
    is_used = np.asarray(one.folded.counts)[..., None] > 0
    is_sampled = np.repeat(is_used, BITS.per_cluster, axis=2)
    is_drawn = np.isfinite(one.folded.value_race)[..., None]
    filled = {"centres": is_used, "sample_k": is_sampled}
    filled |= {"sample_race": is_sampled[..., 0]}
    filled |= {"value_k": is_drawn, "value_u": is_drawn}
    for name, a in one.folded._asdict().items():
        b = getattr(other.folded, name)
        if name == "mass":
            np.testing.assert_allclose(a, b, rtol=1e-6)
        else:
            a, b = (np.where(filled.get(name, True), x, 0) for x in (a, b))
            np.testing.assert_array_equal(a, b, err_msg=name)
    is_full = is_used[..., 0].all(-1)
    assert is_full[:, 0].all()
    assert not is_full[:, 1].any()
    assert (np.asarray(one.folded.crowded) > 0)[is_full].all()
    assert (np.asarray(one.folded.crowded) == 0)[~is_full].all()


def test_a_row_draws_the_same_wherever_it_is():
    """Row 0 again as row 3; no two tokens, heads or slots draw alike."""
    state, _ = states()
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[3], x[0]), state)
    race = np.asarray(state.folded.value_race[:3])
    assert len(np.unique(race)) == race.size


# --- what is exact, and what the error is


@pytest.mark.parametrize("folded", [1, 5])
def test_one_token_or_one_that_repeats_is_exact(folded):
    """The samples of clusters and values are all the same token."""
    first = OPTIONS.num_sinks
    last = first + folded
    made = drive.make_stream((last, last + 1), 1, head_dim=DIM)
    for x in (made.k, made.v):
        x[:, :, first:last] = x[:, :, first : first + 1]
    options = vars(OPTIONS) | {"window": 2, "norm_cap": True}
    spec = drive.make_spec(made, capacity=40, rope=unrotated)
    run = drive.run(subgen(**options), spec, made)
    for b, prompt in enumerate(made.prompts):
        row = made.row(b)
        expected = [
            drive.softmax_attention(
                row.q[h, prompt],
                row.k[h // 2, : prompt + 1],
                row.v[h // 2, : prompt + 1],
            )[0]
            for h in range(4)
        ]
        drive.assert_rows_close(run.out[0, b], expected)
    # It is not said: nothing proves it.
    assert not run.diagnostics.exact[0, 1].any()


CAPPED = Options(**vars(BITS) | {"norm_cap": True})


@functools.cache
def answers():
    """Steps of queries that are small, and of such as have one key in mind.

    With the terms e and the values of every token, by query head, in float64.
    """
    state, _ = states()
    k, v, length = ragged()
    rng = np.random.default_rng(8)
    q = rng.standard_normal((6, GROUP * HEADS, 1, DIM)).astype(np.float32)

    @jax.jit
    def ask(state, q):
        _, out, _ = stream.inspect_step(BITS, state, q)
        mean, log_z = stream.numerator(state.folded, q, SCALE)
        tau = stream.log_tau(state.folded, q, SCALE)
        free, capped = (
            stream.estimate(options, state.folded, q, SCALE).out
            for options in (BITS, CAPPED)
        )
        return out, jnp.exp(log_z)[..., None] * mean, tau, free, capped

    found = []
    for factor in (1, 4):
        logits = np.einsum(
            "bhd,bhnd->bhn",
            factor * q[:, :, 0].astype(float) * SCALE,
            np.repeat(np.asarray(k, float), GROUP, axis=1),
        )
        e = np.exp(logits) * (np.arange(64) < np.asarray(length)[:, None, None])
        asked = ask(state, jnp.asarray(factor * q))
        found.append((e, *(np.asarray(x, float)[:, :, 0] for x in asked)))
    slots, end = np.arange(64), np.asarray(length)[:, None, None] - BITS.newest
    inside = (slots >= BITS.num_sinks) & (slots < end)
    return found, inside, np.repeat(np.asarray(v, float), GROUP, axis=1)


def test_the_error_of_a_step_is_that_of_its_two_sums():
    """out - full = ((z - N) - (tau - Z) full) / (Z_E + tau)."""
    ((e, out, z, log_tau, *_), _), inside, v = answers()
    total, tau = e.sum(-1, keepdims=True), np.exp(log_tau)[..., None]
    full = np.einsum("bhn,bhnd->bhd", e, v) / total
    n = np.einsum("bhn,bhnd->bhd", e * inside, v)
    folded = (e * inside).sum(-1, keepdims=True)
    error = ((z - n) - (tau - folded) * full) / (total - folded + tau)
    np.testing.assert_allclose(out - full, error, atol=2e-5)
    assert np.abs(error).max() > 0.1


def test_the_cap_never_makes_the_estimate_worse():
    """Against the true average of what is folded, in every row and head."""
    (_, (e, *_, free, capped)), inside, v = answers()
    weights = e * inside
    y = np.einsum("bhn,bhnd->bhd", weights, v) / weights.sum(-1, keepdims=True)
    longest = (np.linalg.norm(v, axis=-1) * inside).max(-1)
    size = np.linalg.norm(free, axis=-1)
    assert (np.linalg.norm(capped, axis=-1) <= longest * (1 + 1e-6)).all()
    assert (size > 2 * longest).any()
    before, after = (np.linalg.norm(x - y, axis=-1) for x in (free, capped))
    assert (after <= before + 1e-5 * size).all()
    assert (after < 0.9 * before).any()
    is_short = size < 0.999 * longest
    np.testing.assert_allclose(free[is_short], capped[is_short], rtol=1e-6)
    assert is_short.any()


def test_values_of_zero_are_never_drawn_but_have_mass():
    """Some of them, and nothing else: the estimate is 0, and nothing is NaN."""
    for state in states():
        drawn = np.asarray(state.folded.value_u)
        assert (np.abs(drawn[4]).max(-1) > 0).all()
        assert np.isinf(state.folded.value_race[5]).all()
        expected = state.length[:, None] - BITS.num_sinks - BITS.newest
        assert (np.asarray(state.folded.counts.sum(-1)) == expected).all()
    for _, out, _, log_tau, *_ in answers()[0]:
        assert np.isfinite(out).all()
        assert (out[5] == 0).all()
        assert np.isfinite(log_tau).all()
