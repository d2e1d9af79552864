"""Feature maps and the bookkeeping around them: the properties of the method's spec.

Every estimate is compared with direct sums over the unread tokens in float64, so that
conservation, subtraction and merging are one check; then what theory says of each map.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import completion as oracle

from kvjax.attention import partials
from kvjax.methods.topk_completion import (
    estimators,
    feature_maps,
    linear_attention,
    moments,
)

HEADS, GROUP, SIZE, DIM, FEATURES = 2, 2, 30, 6, 4
SCALE = DIM**-0.5
TRAINING_FREE = ("anchor", "anchor_hard", "mean", "rank1_tilted", "favor")
LOWER_BOUNDS = ("anchor", "anchor_hard", "mean", "rank1_tilted")
# Relative error of a float32 sum of tens of terms, and of the difference of two.
CLOSE = 1e-5


class Heads:
    """Two rows: the middle of the first is [2, 25), that of the second [3, 9)."""

    def __init__(self, seed=0, scale=1.0):
        rng = np.random.default_rng(seed)
        shape = (2, HEADS, SIZE, DIM)
        mean = 0.7 * rng.standard_normal((2, HEADS, 1, DIM))
        self.k = (scale * (mean + rng.standard_normal(shape))).astype(np.float32)
        self.v = rng.standard_normal(shape).astype(np.float32)
        slots = np.arange(SIZE)
        bounds = ((2, 25), (3, 9))
        inside = np.array([(slots >= a) & (slots < b) for a, b in bounds])
        self.middle = np.broadcast_to(inside[:, None], shape[:3])
        # What is not of the middle is not to be touched, nor the last queries of row 1.
        self.k[~self.middle] = 1e30
        self.v[~self.middle] = 1e30
        self.x = rng.standard_normal((2, HEADS, 12, DIM)).astype(np.float32)
        self.x += mean.astype(np.float32)
        self.is_query = np.array([[True] * 12, [True] * 7 + [False] * 5])
        self.x[1, :, 7:] = 1e30
        self.q = rng.standard_normal((2, HEADS, GROUP, DIM)).astype(np.float32) * 2

    def retrieved(self, count, seed=1):
        """`(slots, valid)` of `(2, HEADS, GROUP, 24)`: `count` tokens of the middle."""
        rng = np.random.default_rng(seed)
        slots = np.zeros((2, HEADS, GROUP, 24), np.int32)
        valid = np.zeros(slots.shape, bool)
        for index in np.ndindex(slots.shape[:3]):
            inside = np.flatnonzero(self.middle[index[:2]])
            chosen = rng.permutation(inside)[: min(count, len(inside))]
            slots[index][: len(chosen)] = chosen
            valid[index][: len(chosen)] = True
            slots[index][~valid[index]] = 29  # poison
        return slots, valid

    def left(self, slots, valid, index):
        """Slots of the middle that are not retrieved."""
        taken = set(slots[index][valid[index]])
        return [j for j in np.flatnonzero(self.middle[index[:2]]) if j not in taken]


def residual_by_feature(summary, log_queries, retrieved, num_left):
    """The paper's own form (eqs. 38-43): F times D numbers a list."""
    product = linear_attention.product
    batch, heads, group, _ = log_queries.shape
    lists = retrieved.valid.shape[2]
    shift = summary.shift[:, :, None, None]
    features = jnp.where(
        retrieved.valid[..., None], jnp.exp(retrieved.log_features - shift), 0.0
    )
    v = jnp.where(retrieved.valid[..., None], retrieved.v.astype(jnp.float32), 0.0)
    # u_C = max(u - u_R, 0), T_C = T - T_R; noise alone counts for nothing.
    mass = summary.mass[:, :, None] - features.sum(3)
    values = summary.values[:, :, None] - product("bhrnf,bhrnd->bhrfd", features, v)
    noise = linear_attention.NOISE * summary.mass[:, :, None]
    is_left = (mass > noise) & (num_left > 0)[..., None]
    safe = jnp.where(is_left, mass, 1.0)
    means = jnp.where(is_left[..., None], values / safe[..., None], 0.0)
    # Eq. 41: a_f = g_f + c_f + log u_C,f
    terms = log_queries + summary.shift[:, :, None]
    terms = terms.reshape(batch, heads, lists, group // lists, -1)
    terms = terms + jnp.where(is_left, jnp.log(safe), -jnp.inf)[:, :, :, None]
    lse = jax.nn.logsumexp(terms, axis=-1)
    shares = jnp.exp(terms - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    out = product("bhrpf,bhrfd->bhrpd", shares, means)
    shape = log_queries.shape[:3]
    return partials.Partial(out.reshape(*shape, -1), lse.reshape(shape))


def paper_tokens(features, head_dim):
    """n_off: tokens that a summary in the cache's dtype equals."""
    return -(-(features * head_dim + 2 * features) // (2 * head_dim))


@functools.cache
def program(name):
    """Fit, summary and residual, compiled once a map; both forms of it."""
    estimator = moments.moment()
    if name != "moment":
        feature_map = feature_maps.named(name, FEATURES)
        estimator = estimators.of_features(feature_map)

    @jax.jit
    def run(k, v, middle, x, is_query, q, slots, valid):
        params = estimator.fit(feature_maps.Prompt(k, middle, x, is_query))
        summary = estimator.summarise(params, k, v, middle)

        def of(buffer):
            flat = slots.reshape(2, HEADS, -1, 1)
            return jnp.take_along_axis(buffer, flat, 2).reshape(*slots.shape, DIM)

        count = middle.sum(-1, dtype=jnp.int32)[..., None]
        left = count - valid.sum(-1, dtype=jnp.int32)
        found = estimator.residual(params, summary, q, of(k), of(v), valid, left, SCALE)
        if name == "moment":
            return params, found, found
        kept = jnp.where(valid[..., None], of(k), 0.0).reshape(2, HEADS, -1, DIM)
        ell = feature_map.log_keys(params, kept).reshape(*slots.shape, -1)
        g = feature_map.log_queries(params, q[:, :, :, None], SCALE)[:, :, :, 0]
        by_feature = residual_by_feature(
            summary, g, linear_attention.Retrieved(ell, of(v), valid), left
        )
        return params, found, by_feature

    def call(heads, slots, valid, q=None):
        q = heads.q if q is None else q
        arrays = (
            heads.k,
            heads.v,
            heads.middle,
            heads.x,
            heads.is_query,
            q,
            slots,
            valid,
        )
        return jax.tree.map(np.asarray, run(*map(jnp.asarray, arrays)))

    return call


def fitted(name, heads, index, params):
    """The oracle's map of one KV head; a query for `moment`."""
    keys = np.float64(heads.k[index][heads.middle[index]])
    x = np.float64(heads.x[index][heads.is_query[index[0]]])
    if name == "moment":
        return x.mean(0)
    directions = None
    if name == "favor":
        directions = np.float64(params.directions[index])
    return oracle.feature_map(name, keys, x, FEATURES, directions)


@pytest.mark.parametrize("name", [*TRAINING_FREE, "moment"])
def test_what_is_left_by_direct_sums(name):
    """K from none to all: mass, mean, both forms; hull; bounds; nothing by count."""
    heads = Heads()
    for count in (0, 1, 5, 20, 23):
        slots, valid = heads.retrieved(count)
        params, found, by_feature = program(name)(heads, slots, valid)
        for index in np.ndindex(2, HEADS, GROUP):
            maps = fitted(name, heads, index[:2], params)
            left = heads.left(slots, valid, index)
            keys, values = (np.float64(y[index[:2]][left]) for y in (heads.k, heads.v))
            q = np.float64(heads.q[index]) * SCALE
            if not left:
                for part in (found, by_feature):
                    assert part.lse[index] == -np.inf
                    assert not part.out[index].any()
                continue
            estimate = oracle.moment if name == "moment" else oracle.completed
            log_mass, mean = estimate(maps, q, keys, values)
            # Differences of sums: an error in units of all that is in the summary.
            inside = np.flatnonzero(heads.middle[index[:2]])
            whole = [np.float64(y[index[:2]][inside]) for y in (heads.k, heads.v)]
            total, _ = estimate(maps, q, *whole)
            unit = CLOSE * max(math.exp(total - log_mass), 1)
            for part in (found, by_feature):
                assert abs(part.lse[index] - log_mass) < unit, (count, index)
                np.testing.assert_allclose(part.out[index], mean, atol=10 * unit)
            if name != "moment":
                low, high = values.min(0), values.max(0)
                slack = 10 * unit
                assert (found.out[index] >= low - slack).all()
                assert (found.out[index] <= high + slack).all()
            if count == 0 and name in LOWER_BOUNDS:
                true = np.log(np.exp(keys @ q).sum())
                assert found.lse[index] <= true + CLOSE
    if name == "favor":
        assert params.directions.shape == (2, HEADS, FEATURES, DIM)


@pytest.mark.parametrize("name", ["anchor", "moment"])
def test_logits_of_hundreds_are_safe(name):
    heads = Heads()
    slots, valid = heads.retrieved(5)
    _, found, by_feature = program(name)(heads, slots, valid, heads.q * 60)
    for part in (found, by_feature):
        assert np.isfinite(part.out).all()
        assert not np.isnan(part.lse).any()
        assert (part.lse < np.inf).all()


def test_equal_keys_are_no_approximation():
    """Every map that knows the mean key is exact where all keys are that; any K."""
    heads = Heads()
    heads.k = np.where(heads.middle[..., None], heads.k[:, :, 5:6], heads.k)
    for name in ("mean", "rank1_tilted", "anchor"):
        slots, valid = heads.retrieved(3)
        _, found, _ = program(name)(heads, slots, valid)
        for index in np.ndindex(2, HEADS, GROUP):
            left = heads.left(slots, valid, index)
            key = np.float64(heads.k[index[:2]][left[0]])
            logit = key @ np.float64(heads.q[index]) * SCALE
            assert abs(found.lse[index] - logit - math.log(len(left))) < 1e-4
            mean = np.float64(heads.v[index[:2]][left]).mean(0)
            np.testing.assert_allclose(found.out[index], mean, atol=1e-4)


def test_an_anchor_at_the_query_is_full_attention():
    """Hard and at x itself, for every K: the anchor's sums are the truth there."""
    heads = Heads()
    centres = jnp.asarray(heads.q * np.float32(SCALE))  # GROUP anchors, one each

    @jax.jit
    def run(k, v, middle, q, slots, valid):
        params = feature_maps.anchors_at(centres, k, middle, chunk=7)
        estimator = estimators.of_features(feature_maps.anchor(GROUP, hard=True))
        summary = estimator.summarise(params, k, v, middle)
        flat = slots.reshape(2, HEADS, -1, 1)
        kept, values = (
            jnp.take_along_axis(y, flat, 2).reshape(*slots.shape, DIM) for y in (k, v)
        )
        left = middle.sum(-1, dtype=jnp.int32)[..., None]
        left -= valid.sum(-1, dtype=jnp.int32)
        return estimator.residual(params, summary, q, kept, values, valid, left, SCALE)

    for count in (0, 4):
        slots, valid = heads.retrieved(count)
        arrays = heads.k, heads.v, heads.middle, heads.q, slots, valid
        found = run(*map(jnp.asarray, arrays))
        for index in np.ndindex(2, HEADS, GROUP):
            left = heads.left(slots, valid, index)
            keys, values = (np.float64(y[index[:2]][left]) for y in (heads.k, heads.v))
            logits = keys @ np.float64(heads.q[index]) * SCALE
            log_mass = np.log(np.exp(logits).sum())
            np.testing.assert_allclose(found.lse[index], log_mass, atol=1e-4)
            mean = oracle.softmax(logits) @ values
            np.testing.assert_allclose(found.out[index], mean, atol=1e-4)


def test_the_true_kernel_gives_full_attention():
    """One feature a token, phi_k one-hot: merged with what is read, exact for every K.

    And the error of reading alone is Z_C / (Z_E + Z_C) (y_C - y_E), the paper's eq. 5.
    """
    rng = np.random.default_rng(4)
    k, v = rng.standard_normal((2, 1, 1, SIZE, DIM)).astype(np.float32)
    q = 3 * rng.standard_normal((1, 1, 1, DIM)).astype(np.float32)
    logits = (q[0, 0, 0] @ k[0, 0].T).astype(np.float64)
    truth = oracle.softmax(logits) @ v[0, 0]

    def one_hot(ids):  # ell of tokens by their ids
        is_mine = np.arange(SIZE)[None, None, None] == ids[..., None]
        return jnp.asarray(np.where(is_mine, 0.0, -np.inf).astype(np.float32))

    everything = np.arange(SIZE)[None, None]
    full = jnp.ones((1, 1, SIZE), bool)
    empty = linear_attention.empty((1, 1, SIZE), DIM)
    summary = linear_attention.fold(empty, one_hot(everything), jnp.asarray(v), full)
    g = jnp.asarray(logits.astype(np.float32))[None, None, None]
    residual = jax.jit(linear_attention.residual)
    for count in (1, 7, SIZE - 1, SIZE):
        ids = np.argsort(-logits)[:count]
        padded = np.concatenate([ids, np.zeros(SIZE - count, int)])[None, None, None]
        valid = jnp.asarray(np.arange(SIZE) < count)[None, None, None]
        listed = linear_attention.Retrieved(
            one_hot(padded), jnp.asarray(v[0, 0][padded]), valid
        )
        left = jnp.full((1, 1, 1), SIZE - count, jnp.int32)
        part = residual(summary, g, listed, left)
        weights = oracle.softmax(logits[ids])
        alone = weights @ v[0, 0][ids]
        z = np.log(np.exp(logits[ids]).sum())
        exact = partials.Partial(
            jnp.asarray(alone.astype(np.float32))[None, None, None],
            jnp.full((1, 1, 1), z, jnp.float32),
        )
        merged = np.asarray(partials.merge(exact, part).out)[0, 0, 0]
        np.testing.assert_allclose(merged, truth, atol=3e-6)
        if count < SIZE:
            rest = np.setdiff1d(np.arange(SIZE), ids)
            share = np.exp(
                np.asarray(part.lse)[0, 0, 0] - np.logaddexp(z, part.lse[0, 0, 0])
            )
            left_over = oracle.softmax(logits[rest]) @ v[0, 0][rest]
            np.testing.assert_allclose(
                truth - alone, share * (left_over - alone), atol=3e-6
            )


def test_a_summary_does_not_depend_on_how_it_came():
    """Chunks, order, and tokens folded in one by one: exactly the same sums."""
    heads = Heads(scale=3.0)
    k, v, middle = (jnp.asarray(x) for x in (heads.k, heads.v, heads.middle))
    centres = jnp.asarray(heads.x[:, :, :FEATURES])

    def log_keys(k):
        return jnp.einsum("bhfd,bhnd->bhnf", centres, k)

    summarise = jax.jit(linear_attention.summarise, static_argnums=(0, 4))
    whole = summarise(log_keys, k, v, middle, SIZE)
    order = np.random.default_rng(5).permutation(SIZE)
    turned = summarise(log_keys, k[:, :, order], v[:, :, order], middle[:, :, order], 7)
    part = summarise(log_keys, k, v, middle & (np.arange(SIZE) < 20), 7)
    fold = jax.jit(
        lambda summary, k, v, valid: linear_attention.fold(
            summary, log_keys(jnp.where(valid[..., None], k, 0.0)), v, valid
        )
    )
    for j in range(20, 26):
        part = fold(part, *(x[:, :, j : j + 1] for x in (k, v, middle)))
    for other in (turned, part):
        np.testing.assert_allclose(other.shift, whole.shift, rtol=1e-6)
        np.testing.assert_allclose(other.mass, whole.mass, rtol=CLOSE)
        np.testing.assert_allclose(other.values, whole.values, rtol=1e-4, atol=CLOSE)
    assert (np.asarray(whole.mass) >= 1 - CLOSE).all()  # the largest term is 1


def test_a_constant_in_g_scales_the_mass_and_nothing_else():
    """And the cap and the gain touch the mass alone."""
    rng = np.random.default_rng(6)
    mass = jnp.asarray(rng.uniform(1, 5, (1, 1, FEATURES)), jnp.float32)
    values = jnp.asarray(rng.standard_normal((1, 1, FEATURES, DIM)), jnp.float32)
    summary = linear_attention.Summary(jnp.log(mass), mass, values)
    g = jnp.asarray(rng.standard_normal((1, 1, 1, FEATURES)), jnp.float32)
    nothing = linear_attention.Retrieved(
        jnp.zeros((1, 1, 1, 1, FEATURES), jnp.float32),
        jnp.zeros((1, 1, 1, 1, DIM), jnp.float32),
        jnp.zeros((1, 1, 1, 1), bool),
    )
    left = jnp.full((1, 1, 1), 9, jnp.int32)
    residual = jax.jit(linear_attention.residual)
    part = residual(summary, g, nothing, left)
    raised = residual(summary, g + jnp.float32(300), nothing, left)
    np.testing.assert_allclose(raised.lse - part.lse, 300, rtol=1e-6)
    np.testing.assert_allclose(raised.out, part.out, rtol=1e-4)  # 300's last bit
    logit = part.lse - jnp.float32(4)
    capped = linear_attention.cap_mass(part, logit, left)
    np.testing.assert_allclose(capped.lse, logit + math.log(9), rtol=1e-6)
    assert (linear_attention.cap_mass(part, part.lse, left).lse == part.lse).all()
    halved = linear_attention.scale_mass(part, jnp.full((1, 1, 1), 0.5, jnp.float32))
    np.testing.assert_allclose(part.lse - halved.lse, math.log(2), rtol=1e-6)
    gone = linear_attention.scale_mass(part, jnp.zeros((1, 1, 1), jnp.float32))
    assert (gone.lse == -jnp.inf).all()


def test_random_features_are_unbiased():
    """The mean mass over 2,000 draws is the true one, for logits that spread by 0.3."""
    rng = np.random.default_rng(7)
    k = (0.55 * rng.standard_normal((1, 1, 20, DIM)) + 0.3).astype(np.float32)
    x = (0.5 * rng.standard_normal((1, 1, 8, DIM))).astype(np.float32)
    prompt = feature_maps.Prompt(
        jnp.asarray(k),
        jnp.ones((1, 1, 20), bool),
        jnp.asarray(x),
        jnp.ones((1, 8), bool),
    )
    favor = feature_maps.favor(2)
    params = favor.fit(prompt)
    draw = functools.partial(
        feature_maps.orthogonal_directions, features=2, head_dim=DIM
    )

    @jax.jit
    @jax.vmap
    def mass(key):
        drawn = params._replace(directions=draw(key)[None, None])
        ell = favor.log_keys(drawn, prompt.k)
        g = favor.log_queries(drawn, prompt.x[:, :, :1, None], 1.0)
        return jnp.exp(ell[0, 0] + g[0, 0, 0]).sum()

    found = mass(jax.random.split(jax.random.key(0), 2000))
    truth = np.exp(np.float64(k[0, 0]) @ np.float64(x[0, 0, 0])).sum()
    assert abs(np.asarray(found, np.float64).mean() / truth - 1) < 0.05
    rows = np.float64(draw(jax.random.key(1), features=DIM + 1))
    inner = rows[:DIM] @ rows[:DIM].T
    off = inner - np.diag(np.diag(inner))
    assert np.abs(off).max() < 1e-5 * np.diag(inner).max()  # orthogonal in a block


def test_outliers_are_the_keys_a_map_overestimates():
    """By hand: exp(shat) - exp(s), in the mean over queries, of the worst head."""
    rng = np.random.default_rng(8)
    ell, g = rng.standard_normal((1, 1, 5, 3)), rng.standard_normal((1, 1, 2, 4, 3))
    logits, lse = rng.standard_normal((1, 1, 2, 4, 5)), np.full((1, 1, 2, 4), 2.0)
    valid = np.array([True, True, True, False])[None, None, None]
    given = [np.float32(x) for x in (ell, g, logits, lse)]
    found = linear_attention.overestimates(*map(jnp.asarray, (*given, valid)))
    shat = np.log(np.exp(g[..., None, :] + ell[:, :, None, None]).sum(-1))
    excess = np.maximum(np.exp(shat - 2) - np.exp(logits - 2), 0)[..., :3, :]
    np.testing.assert_allclose(found, excess.mean(3).max(2), rtol=CLOSE)


@pytest.mark.parametrize(
    ("context", "share", "features", "budget", "alone", "off", "completed"),
    [
        (16384, 0.01, 128, 164, 144, 65, 79),
        (16384, 0.03, 64, 492, 472, 33, 439),
        (16384, 0.05, 64, 820, 800, 33, 767),
        (4096, 0.02, 64, 82, 62, 33, 29),
        (2000, 0.01, 64, 20, 0, 33, 0),
    ],
)
def test_the_papers_budgets(context, share, features, budget, alone, off, completed):
    assert linear_attention.budget_tokens(context, share) == budget
    assert paper_tokens(features, features) == off
    assert linear_attention.num_retrieved(budget, 4, 16) == alone
    assert linear_attention.num_retrieved(budget, 4, 16, charged=off) == completed
