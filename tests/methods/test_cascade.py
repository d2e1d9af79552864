"""A cascade keeps, slot by slot, what a loop over single tokens keeps."""

import functools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from kvjax import accounting
from kvjax.methods.cascade import rings, schedule
from kvjax.methods.cascade.method import cascade
from kvjax.methods.cascade.schedule import Plan
from kvjax.rope import Rope

FRESH = 11  # new tokens at once, more than most rings have slots


@functools.cache
def jitted(plan: Plan):
    """One insertion by index: tokens and scores move as `sources` says."""

    @jax.jit
    def step(seen, count, tokens, scores, new_scores):
        src = schedule.sources(plan, seen, count, scores, new_scores)
        new = seen[:, None, None] + jnp.arange(FRESH, dtype=jnp.int32)
        new = jnp.broadcast_to(new, new_scores.shape)
        tokens = jnp.take_along_axis(jnp.concatenate([tokens, new], 2), src, 2)
        scores = jnp.concatenate([scores, new_scores], 2)
        scores = jnp.take_along_axis(scores, src, 2)
        return tokens, scores, schedule.layout(plan, seen + count)

    return step


def run(plan, counts, score_of, heads=1):
    """Inserts chunk by chunk; yields what is held after each, and the layout."""
    rows = counts.shape[1]
    seen = np.zeros(rows, np.int32)
    tokens = np.full((rows, heads, plan.window), -1, np.int32)
    scores = np.zeros((rows, heads, plan.window), np.float32)
    for count in counts:
        new = score_of(seen, (rows, heads, FRESH))
        inputs = seen, count, tokens, scores, new
        tokens, scores, now = jax.tree.map(np.asarray, jitted(plan)(*inputs))
        yield seen, count, new, tokens, scores, now
        seen = seen + count


@pytest.mark.parametrize(
    "plan",
    [
        Plan(2, 4, 1),
        Plan(2, 3, 4),
        Plan(1, 3, 4, eager_fill=False),
        Plan(4, 5, 2, eager_fill=False),
        Plan(5, 4, 3, periods=(1, 2, 3, 5)),
        Plan(0, 3, 2, eager_fill=False, periods=(1, 3, 4)),
    ],
    ids=str,
)
def test_positions_and_slots_are_those_of_a_loop_over_tokens(plan):
    """Ragged rows, chunks of 0 to 11 tokens, hundreds of tokens, few distinct scores:
    ties are common. Sinks, whatever their score, stay.
    """
    rng = np.random.default_rng(0)
    counts = rng.integers(0, FRESH + 1, (40, 3)).astype(np.int32)
    counts[:, 1] = np.minimum(counts[:, 1], 1)  # a row that grows token by token

    def score_of(seen, shape):
        return rng.integers(0, 4, shape).astype(np.float32)

    shape = (3, 2)
    loops = [
        [
            oracles.CascadeRings(
                plan.num_sinks,
                plan.num_rings,
                plan.width,
                plan.eager_fill,
                plan.periods,
            )
            for _ in range(shape[1])
        ]
        for _ in range(shape[0])
    ]
    for seen, count, new, tokens, scores, now in run(plan, counts, score_of, shape[1]):
        for b, h in np.ndindex(shape):
            loop = loops[b][h]
            for j in range(count[b]):
                loop.insert(int(seen[b]) + j, float(new[b, h, j]))
            held = loop.slots()
            for slot in range(plan.window):
                expected = held.get(slot, (-1, 0.0))
                assert (tokens[b, h, slot], scores[b, h, slot]) == expected
            kept = loop.kept()
            place = {slot: kept.index(token) for slot, (token, _) in held.items()}
            expected = [place.get(slot, -1) for slot in range(plan.window)]
            np.testing.assert_array_equal(now.positions[b], expected)
            assert now.sinks[b] == len(loop.sinks)
            assert now.next[b] == len(kept) == plan.num_held(int(seen[b] + count[b]))
            assert [len(ring) for ring in loop.rings] == now.stored[b].tolist()


STEADY = Plan(2, 3, 4)  # C = 12, spans up to 4 * 7 = 28 tokens


@pytest.mark.parametrize("scores", ["none", "fixed"])
def test_old_tokens_thin_out_by_halves(scores):
    """In the steady state: one entry a block of 2**i tokens, its last best one."""
    table = np.random.default_rng(1).random(400).astype(np.float32)
    if scores == "none":
        table[:] = 0  # the younger wins: every block keeps its last

    def score_of(seen, shape):
        return table[seen[:, None, None] + np.arange(FRESH)]

    counts = np.full((24, 1), FRESH, np.int32)
    counts[::3] = 5
    checked = 0
    for seen, count, _, tokens, _, now in run(STEADY, counts, score_of):
        after = int(seen[0] + count[0]) - STEADY.num_sinks  # non-sink tokens
        if after <= STEADY.window + 2 * STEADY.width * 4:
            continue
        checked += 1
        newest = after - 1
        oldest = newest
        for i in range(3):
            held = np.sort(tokens[0, 0, i * 4 : i * 4 + 4]) - STEADY.num_sinks
            blocks = held >> i
            np.testing.assert_array_equal(np.diff(blocks), 1)
            oldest = min(oldest, held[0])
            for block, token in zip(blocks[:-1], held[:-1], strict=True):
                rivals = STEADY.num_sinks + (block << i) + np.arange(2**i)
                best = rivals[::-1][table[rivals[::-1]].argmax()]
                assert token + STEADY.num_sinks == best
        span = newest - oldest + 1
        assert 4 * 7 - 8 < span <= 4 * 7
        # Order in the cache is order in the stream.
        order = tokens[0, 0][np.argsort(now.positions[0])]
        assert (np.diff(order) > 0).all()
    assert checked > 10


# --- tokens move, keys turn


def make_rings(plan, rope, dtype="float32"):
    """Of three rows and two heads."""
    stream = drive.make_stream((1, 1, 1), 0, heads=(4, 2), head_dim=6)
    return rings.empty(plan, drive.make_spec(stream, dtype=dtype, rope=rope))


def test_one_by_one_equals_all_at_once_and_no_key_is_lost():
    """With scores frozen. A key that moved between rings still fits its position."""
    plan, rope = Plan(2, 3, 2), Rope(6, kind="yarn", factor=4.0, original_context=16)
    at_once = make_rings(plan, rope)
    single = at_once
    rng = np.random.default_rng(2)
    length = 45
    k, v = rng.standard_normal((2, 3, 2, length + FRESH, 6)).astype(np.float32)
    score = rng.random((3, 2, length + FRESH)).astype(np.float32)
    start, counts = (
        np.zeros(3, int),
        np.array([[11, 3, 0], [11, 11, 11], [0, 9, 5]] * 2),
    )
    one = jax.jit(lambda *x: rings.insert_one(plan, rope, *x))
    for count in counts:

        def piece(x, start=start):
            rows = zip(x, start, strict=True)
            return jnp.asarray(np.stack([r[:, s : s + FRESH] for r, s in rows]))

        new = piece(k), piece(v), piece(score)
        at_once = rings.insert(plan, rope, at_once, *new, jnp.asarray(count, jnp.int32))
        for j in range(max(count)):
            row = (x[:, :, j : j + 1] for x in new)
            single = one(single, *row, jnp.asarray(j < count))
        start = start + count
        np.testing.assert_array_equal(single.seen, start)
        np.testing.assert_array_equal(single.tokens, at_once.tokens)
        np.testing.assert_array_equal(single.scores, at_once.scores)
        held = np.asarray(at_once.tokens)
        for b, h, c in zip(*np.nonzero(held >= 0), strict=True):
            token = held[b, h, c]
            key = jnp.asarray(k[b, h, token])[None, None, None]
            turned = rope(key, jnp.asarray([[c % plan.width]]))[0, 0, 0]
            for which in (at_once, single):
                np.testing.assert_allclose(which.k[b, h, c], turned, atol=2e-6)
                np.testing.assert_array_equal(which.v[b, h, c], v[b, h, token])
                assert which.scores[b, h, c] == score[b, h, token]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)]
)
def test_a_turned_query_is_turned_keys(dtype, tolerance):
    """What decoding reads without turning a key, prefill reads with all keys turned;
    and a chunk's scores are those of its tokens, decayed by their age.
    """
    plan, rope = Plan(2, 3, 4), Rope(6, kind="yarn", factor=4.0, original_context=16)
    held = make_rings(plan, rope, dtype)
    rng = np.random.default_rng(3)

    def draw(heads, rows):
        return jnp.asarray(rng.standard_normal((3, heads, rows, 6)), jnp.dtype(dtype))

    for count in ([11, 1, 0], [11, 1, 11], [11, 0, 8]):
        scores = jnp.asarray(rng.random((3, 2, FRESH)), jnp.float32)
        count = jnp.asarray(count, jnp.int32)
        kv = draw(2, FRESH), draw(2, FRESH)
        held = rings.insert(plan, rope, held, *kv, scores, count)
    q, k, v = draw(4, 1), draw(2, 1), draw(2, 1)
    fast, weights, own = rings.attend_one(plan, rope, held, q, k, v, sm_scale=0.7)
    zero = jnp.zeros(3, jnp.int32)
    slow, received = rings.attend_chunk(
        plan, rope, held, q, k, v, zero, zero + 1, sm_scale=0.7, beta=0.5
    )
    np.testing.assert_allclose(fast.out, slow.out, atol=tolerance)
    np.testing.assert_allclose(fast.lse, slow.lse, atol=tolerance)
    both = jnp.concatenate([weights, own], axis=2)
    np.testing.assert_allclose(both, received, atol=tolerance)


def test_heads_are_reduced_as_asked():
    received = np.random.default_rng(4).random((2, 8, 5)).astype(np.float32)
    grouped = received.reshape(2, 2, 4, 5)
    lower = np.sort(grouped, axis=2)[:, :, 1]
    for how, expected in [
        ("mean", grouped.mean(2)),
        ("max", grouped.max(2)),
        ("median", lower),
    ]:
        actual = schedule.reduce_heads(jnp.asarray(received), 2, how)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    shared = schedule.reduce_heads(jnp.asarray(received), 2, "median", True)
    expected = np.sort(received, axis=1)[:, 3]
    np.testing.assert_array_equal(shared, np.stack([expected] * 2, 1))


def test_scores_decay_by_query():
    """Even for a beta that float32 cannot tell from its neighbour."""
    beta, queries = 1 - 1e-7, jnp.asarray([1000], jnp.int32)
    scores = schedule.ema(jnp.ones((1, 1, 1)), jnp.zeros((1, 1, 1)), beta, queries)
    assert abs(1 - float(scores[0, 0, 0]) - 1e-4) < 1e-7


# --- the method


@pytest.mark.parametrize(
    ("heads", "prompts", "options"),
    [
        (
            (6, 2),
            (1, 4, 17, 38),
            {"budget": 12, "num_cascades": 3, "num_sinks": 2, "stride": 5},
        ),
        (
            (4, 2),
            (0, 26),
            {
                "budget": 11,
                "num_cascades": 2,
                "num_sinks": 0,
                "stride": 7,
                "head_reduction": "median",
                "homogeneous_heads": True,
                "eager_fill": False,
            },
        ),
    ],
    ids=["eager", "selective"],
)
def test_equals_float64_loops(heads, prompts, options):
    """Strides that end inside a chunk; decode steps that wrap every ring."""
    options = {"beta": 0.9, "head_reduction": "mean"} | options
    stream = drive.make_stream(prompts, 19, heads=heads)
    chunks = []
    left = np.array(prompts)
    for size in (13, 3, 9, 40):
        chunks.append(tuple(int(n) for n in np.minimum(left, size)))
        left = left - chunks[-1]
    spec = drive.make_spec(stream)
    result = drive.run(cascade(**options), spec, stream, chunks)
    drive.assert_matches(result, stream, oracles.cascade, **options)


@pytest.mark.parametrize("stride", [1, 6])
def test_one_ring_is_streaming_llm(stride):
    """At stride 1 in every output; at any stride in what is kept and decoded.

    As `test_streaming_llm.py` says what that is.
    """
    stream = drive.make_stream((1, 5, 26), 21, heads=(4, 2))
    method = cascade(budget=9, num_sinks=3, num_cascades=1, stride=stride)
    result = drive.run(method, drive.make_spec(stream), stream)
    if stride > 1:
        for b, prompt in enumerate(stream.prompts):
            trace = oracles.streaming_llm(stream.row(b), budget=9, num_sinks=3)
            result.prompt_out[b] = trace.out[:prompt].swapaxes(0, 1)
    options = {"budget": 9, "num_sinks": 3}
    drive.assert_matches(result, stream, oracles.streaming_llm, **options)
    assert not result.diagnostics.exact[-1].any()
    assert result.diagnostics.exact[0, 1].all()


def test_half_precision_stays_so():
    """Cache and output in bfloat16, scores in float32."""
    stream = drive.make_stream((6, 9), 1, dtype="bfloat16")
    spec = drive.make_spec(stream, dtype="bfloat16")
    method = cascade(budget=12, num_cascades=2, num_sinks=2, stride=8)

    def all_of_it(prompt, inputs):
        state, prompt_out = method.prefill(method.init(spec), *prompt)
        return drive.step(method, method.finish(state), inputs), prompt_out

    prompt = drive.chunk(stream, (0, 0), stream.prompts, "bfloat16", size=9)
    inputs = [x[0] for x in drive.step_inputs(stream, "bfloat16")]
    (state, (out, _)), prompt_out = jax.eval_shape(all_of_it, prompt, inputs)
    halves = state.k, state.v, state.held.k, state.held.v, state.held.sink_k
    assert {x.dtype.name for x in (out, prompt_out, *halves)} == {"bfloat16"}
    assert {x.dtype.name for x in (state.score, state.held.scores)} == {"float32"}


def test_memory_does_not_depend_on_the_context():
    stream = drive.make_stream((3,), 2)
    method = cascade(budget=64, stride=16)
    held = [
        [
            count(method, drive.make_spec(stream, capacity=capacity))
            for count in (accounting.prompt_bytes, accounting.state_bytes)
        ]
        for capacity in (64, 1 << 20)
    ]
    assert held[0] == held[1]
    spec = drive.make_spec(stream)
    at = [method.traffic(spec, length) for length in (1, 30, 61, 62, 63, 10**6)]
    tokens = [traffic.kv // (2 * 2 * 8 * 4) for traffic in at]
    # 4 sinks, 4 rings of 14 and the current token: 61 of the 64.
    assert tokens == [1, 30, 61, 61, 61, 61]
    assert at[-1].metadata == 2 * 56 * 4 + 4 * 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 8}, r"budget=8 must be at least 9: num_sinks=4"),
        ({"num_cascades": 0}, r"num_cascades=0 must be at least 1"),
        ({"num_sinks": -1}, r"num_sinks=-1 must be at least 0"),
        ({"beta": 0.0}, r"beta=0.0 must be in \(0, 1\]"),
        ({"beta": 1.5}, r"beta=1.5 must be in \(0, 1\]"),
        ({"stride": 0}, r"stride=0 must be at least 1"),
        ({"head_reduction": "sum"}, r"head_reduction='sum' must be one of mean"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_both_values(options, message):
    with pytest.raises(ValueError, match=message):
        cascade(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, 0, 4), "num_rings=0"),
        ((0, 2, 0), "width=0"),
        ((-1, 2, 4), "num_sinks=-1"),
        ((0, 2, 4, True, (1,)), r"periods=\(1,\) must be num_rings=2"),
        ((0, 2, 4, True, (2, 4)), r"periods=\(2, 4\).* first of them 1"),
    ],
)
def test_a_plan_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(*options)
