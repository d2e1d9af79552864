"""RetroAttention: past tokens see the union of what was read since; nothing else moves.

Steps with frozen queries, keys and values run in float64 on lists of pages drawn at
random. Whole models, in which revised tokens change their keys: `test_retro_models.py`.
"""

import functools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import retro as definition

import kvjax
from kvjax import dense
from kvjax.interface import CacheSpec
from kvjax.methods.full import full
from kvjax.methods.quest import quest
from kvjax.methods.retro import history
from kvjax.methods.retro.method import retro
from kvjax.stores import buffers, contiguous

PAGE = 4
STARTS = (5, 16, 1)  # lengths of the prompts: inside a page, at its end, hardly any
STEPS = 14
TOTAL = max(STARTS) + STEPS
HEADS = 4, 2
SIZE = 6
# Windows shorter than a page with a list a KV head, and of more than two pages with a
# list a query head.
SHAPES = [(3, 2), (9, 4)]


def draw_pages(lists, listed=4, seed=0):
    """`(B, TOTAL, lists, listed)`: what each position's step reads, its own page too.

    In any order, -1 = none.
    """
    rng = np.random.default_rng(seed)
    table = np.full((len(STARTS), TOTAL, lists, listed), -1, np.int32)
    for b, t, h in np.ndindex(table.shape[:3]):
        own = t // PAGE
        others = rng.permutation(own)[: rng.integers(listed)]
        chosen = np.append(others, own)
        table[b, t, h, rng.permutation(listed)[: len(chosen)]] = chosen
    return table


def listing(table):
    """Quest, but for its choice: step t of row b reads `table[b, t]`."""

    def select(state, q):
        del q
        step = (state.length - 1)[:, None, None, None]
        return jnp.take_along_axis(jnp.asarray(table), step, axis=1)[:, 0]

    return quest(budget=PAGE, page_size=PAGE)._replace(select=select)


def draw_rows(seed=1):
    rng = np.random.default_rng(seed)

    def draw(heads):
        return rng.standard_normal((len(STARTS), heads, TOTAL, SIZE))

    return 2 * draw(HEADS[0]), draw(HEADS[1]), draw(HEADS[1])


def _unrotated(x, positions, length=None):
    del positions, length
    return x


@functools.cache
def program(window, lists):
    """Prompts, then every step fed the frozen rows of its window, in float64."""
    spec = CacheSpec(
        batch=len(STARTS),
        num_q_heads=HEADS[0],
        num_kv_heads=HEADS[1],
        head_dim=SIZE,
        capacity=TOTAL + 1,
        dtype="float64",
        rope=_unrotated,
    )

    @jax.jit
    def run(table, prompt, lengths, inputs):
        method = retro(listing(table), window=window)
        state, _ = method.prefill(method.init(spec), *prompt, lengths)
        state = method.finish(state)

        def step(state, given):
            q, k, v = given
            state, out, diagnostics = method.inspect_step(method.append(state, k, v), q)
            return state, (out, diagnostics.lse, state)

        return state, jax.lax.scan(step, state, inputs)[1]

    def fed(x, i):
        rows = np.full((*x.shape[:2], window, SIZE), drive.PADDING)
        for b, start in enumerate(STARTS):
            for t in definition.window(start, start + i, window):
                rows[b, :, t - start - i - 1] = x[b, :, t]
        return rows

    def call(rows, table):
        with jax.enable_x64(True):
            prompt = [jnp.asarray(x[:, :, : max(STARTS)]) for x in rows]
            steps = [np.stack([fed(x, i) for i in range(STEPS)]) for x in rows]
            first, (out, lse, rest) = run(
                jnp.asarray(table),
                prompt,
                jnp.asarray(STARTS, jnp.int32),
                [jnp.asarray(x) for x in steps],
            )
            # With the state after the prompt in front.
            states = jax.tree.map(
                lambda one, more: np.concatenate([np.asarray(one)[None], more]),
                first,
                rest,
            )
        return np.asarray(out), np.asarray(lse), states

    return call


@functools.cache
def frozen(window, lists):
    return program(window, lists)(draw_rows(), draw_pages(lists))


def decoded(window):
    """`(step, b, t, now, place)` of all rows that a step decoded, the newest last."""
    for i in range(STEPS):
        for b, start in enumerate(STARTS):
            now = start + i
            for t in definition.window(start, now, window):
                yield i, b, t, now, window - 1 - (now - t)


def pages_read(table, b, h):
    """What each step read for list h, as sets."""
    return [set(pages[pages >= 0].tolist()) for pages in table[b, :, h]]


# --- one layer, frozen queries, keys and values


@pytest.mark.parametrize(("window", "lists"), SHAPES)
def test_every_row_attends_to_the_union_of_what_was_read_since(window, lists):
    q, k, v = draw_rows()
    table, (out, lse, _) = draw_pages(lists), frozen(window, lists)
    complete = 0
    for i, b, t, now, place in decoded(window):
        for h in range(HEADS[0]):
            read = pages_read(table, b, h * lists // HEADS[0])
            seen = definition.positions(definition.union(read, t, now), PAGE, t)
            kv = h * HEADS[1] // HEADS[0]
            expected = definition.attention(
                q[b, h, t], k[b, kv, seen], v[b, kv, seen], SIZE**-0.5
            )
            where = f"step {i}, row {b}, head {h}, token {t}"
            np.testing.assert_allclose(
                out[i, b, h, place], expected[0], atol=1e-12, err_msg=where
            )
            assert abs(lse[i, b, h, place] - expected[1]) < 1e-12, where
            complete += len(seen) == t + 1
    assert complete > 20, "some rows end with attention over everything"


@pytest.mark.parametrize(("window", "lists"), SHAPES)
def test_rows_that_no_step_decoded_give_nothing(window, lists):
    out, lse, _ = frozen(window, lists)
    real = np.zeros((*out.shape[:2], window), bool)
    for i, b, _, _, place in decoded(window):
        real[i, b, place] = True
    assert not real.all()
    np.testing.assert_array_equal(np.moveaxis(out, 2, 3)[~real], 0)
    np.testing.assert_array_equal(np.moveaxis(lse, 2, 3)[~real], -np.inf)


@pytest.mark.parametrize(("window", "lists"), SHAPES)
def test_one_number_a_page_says_who_has_seen_it(window, lists):
    table, states = draw_pages(lists), frozen(window, lists)[2]
    for i, b, t, now, _ in decoded(window):
        for h in range(lists):
            last = states.window.last_loaded[i + 1, b, h]
            union = definition.union(pages_read(table, b, h), t, now)
            assert {j for j, loaded in enumerate(last) if loaded >= t} == union


@pytest.mark.parametrize(("window", "lists"), SHAPES)
def test_what_was_seen_only_grows_and_bounds_the_error(window, lists):
    q, k, v = draw_rows()
    out, lse, _ = frozen(window, lists)
    before = {}
    for i, b, t, _, place in decoded(window):
        for h in range(HEADS[0]):
            kv = h * HEADS[1] // HEADS[0]
            keys, values = k[b, kv, : t + 1], v[b, kv, : t + 1]
            truth = definition.attention(q[b, h, t], keys, values, SIZE**-0.5)
            found = lse[i, b, h, place]
            assert before.get((b, t, h), -np.inf) <= found <= truth[1] + 1e-12
            before[b, t, h] = found
            coverage = np.exp(found - truth[1])
            most = 2 * (1 - coverage) * np.linalg.norm(values, axis=-1).max()
            error = np.linalg.norm(out[i, b, h, place] - truth[0])
            assert error <= most + 1e-12


def test_with_queries_of_zero_a_row_counts_what_it_has_seen():
    """Twice the same key, or one of the future, would count."""
    window, lists = SHAPES[1]
    q, k, v = draw_rows()
    table = draw_pages(lists, seed=5)
    out, lse, _ = program(window, lists)((0 * q, k, np.ones_like(v)), table)
    for i, b, t, now, place in decoded(window):
        np.testing.assert_allclose(out[i, b, :, place], 1, atol=1e-12)
        for h in range(lists):
            union = definition.union(pages_read(table, b, h), t, now)
            count = len(definition.positions(union, PAGE, t))
            assert abs(np.exp(lse[i, b, h, place]) - count) < 1e-11


def test_the_order_of_pages_and_lists_for_each_head_change_nothing():
    window, _ = SHAPES[1]
    rows, table = draw_rows(), draw_pages(2)
    turned = np.repeat(table[..., ::-1], 2, axis=2)  # each list for both its heads
    one = program(window, 4)(rows, np.repeat(table, 2, axis=2))
    other = program(window, 4)(rows, turned)
    np.testing.assert_allclose(one[0], other[0], atol=1e-13)
    shared = program(3, 2)(rows, table)
    newest = [x[:, :, :, -1] for x in (one[0], shared[0])]
    np.testing.assert_allclose(*newest, atol=1e-13)


def test_the_future_never_shows():
    """Keys and values after a token change no bit of its output, at any later step."""
    window, lists = SHAPES[1]
    q, k, v = draw_rows()
    table, (out, _, _) = draw_pages(lists), frozen(window, lists)
    cut = 7  # decoded tokens that are as before
    for b, start in enumerate(STARTS):
        k[b, :, start + cut :] += 3.0
        v[b, :, start + cut :] -= 5.0
    other, _, _ = program(window, lists)((q, k, v), table)
    rows = [
        (i, b, place)
        for i, b, t, now, place in decoded(window)
        if t < STARTS[b] + cut <= now
    ]
    assert len(rows) > 50
    for i, b, place in rows:
        np.testing.assert_array_equal(out[i, b, :, place], other[i, b, :, place])
    assert not np.array_equal(out[-1], other[-1])


def test_nothing_new_read_changes_nothing():
    """The first page and the own one, at every step: outputs stay, to the bit."""
    window, lists = SHAPES[1]
    own = np.broadcast_to(np.arange(TOTAL) // PAGE, (len(STARTS), lists, TOTAL))
    table = np.full((len(STARTS), TOTAL, lists, 4), -1, np.int32)
    table[..., 0] = own.swapaxes(1, 2)
    table[..., 2] = np.where(table[..., 0] > 0, 0, -1)
    out, _, _ = program(window, lists)(draw_rows(), table)
    first = {}
    for i, b, t, _, place in decoded(window):
        expected = first.setdefault((b, t), out[i, b, :, place])
        np.testing.assert_array_equal(out[i, b, :, place], expected)


@pytest.mark.parametrize(("window", "lists"), SHAPES)
def test_what_a_step_did_is_told_by_the_windows(window, lists):
    """Pages seen (the exposure), pages new to a row, and how far its output moved."""
    table, (out, _, states) = draw_pages(lists), frozen(window, lists)
    past = window - 1
    revision = jax.jit(history.revision, static_argnums=3)
    num_seen = jax.jit(history.num_seen, static_argnums=2)
    for i in range(STEPS):
        before, after = (
            jax.tree.map(lambda x, at=at: x[at], states.window) for at in (i, i + 1)
        )
        length = states.store.length[i + 1]
        counts = np.asarray(num_seen(after, length, PAGE))
        moved, share = map(np.asarray, revision(before, after, length, PAGE))
        for b, start in enumerate(STARTS):
            now = start + i
            for h, place in np.ndindex(lists, window):
                t, expected = now - past + place, -1
                if t >= start:
                    union = definition.union(pages_read(table, b, h), t, now)
                    expected = sum(j * PAGE <= t for j in union)
                assert counts[b, h, place] == expected
            for place in range(past):  # revised in this step
                t = now - past + place
                if t < start:
                    assert np.isnan(share[b, :, place]).all()
                    assert np.isnan(moved[b, :, place]).all()
                    continue
                for h in range(lists):
                    read = pages_read(table, b, h)
                    new = read[now] - definition.union(read, t, now - 1)
                    new = sum(j * PAGE <= t for j in new) / len(read[now])
                    np.testing.assert_allclose(share[b, h, place], new, rtol=1e-6)
                if place == 0:  # it has left: its new output is not kept
                    assert np.isnan(moved[b, :, place]).all()
                    continue
                new, old = out[i, b, :, place], out[i - 1, b, :, place + 1]
                expected = np.linalg.norm(new - old, axis=-1)
                expected /= np.linalg.norm(new, axis=-1)
                np.testing.assert_allclose(moved[b, :, place], expected, atol=1e-6)


def test_the_newest_row_is_quest():
    """Pages chosen by the newest query alone; frozen rows change no key."""
    options = {"budget": 12, "page_size": 4, "recent": 2}
    stream = drive.make_stream((27, 5), 9, heads=(6, 2))
    method = retro(quest(**options), window=3)
    run = drive.run(method, drive.make_spec(stream), stream)
    drive.assert_matches(run, stream, oracles.quest, **options)


def test_a_window_of_one_is_the_method_itself():
    method = quest(budget=64)
    assert retro(method, window=1) is method


def test_exposure_is_the_mean_share_of_pages_seen_later():
    """Of two tokens after n steps; one that has not come yet does not count."""
    counts = np.array([[[-1, -1, 4]], [[-1, 5, 2]], [[6, 2, 3]], [[3, 3, 1]]])
    # 4 pages, then 5, then 6; 2, 2, 3; 3, 3; 1.
    expected = [1, np.mean([5 / 4, 2 / 2, 3 / 3]), np.mean([6 / 4, 3 / 2])]
    np.testing.assert_allclose(history.exposure(counts), expected)


# --- state, and mistakes


def test_what_the_window_holds_does_not_grow_with_the_context():
    method = retro(quest(budget=16), window=4)

    def state(capacity):
        spec = drive.make_spec(drive.make_stream((4,), 1), capacity=capacity)
        return jax.eval_shape(lambda: method.init(spec))

    short, long = (state(n).window._replace(last_loaded=None) for n in (64, 4096))
    assert buffers.num_bytes(short) == buffers.num_bytes(long) == 4 * (1 + 4 * 3 * 9)


def test_a_later_prompt_ends_the_window():
    """What was decoded before it stays as it is."""
    stream = drive.make_stream((9,), 4)
    spec = drive.make_spec(stream, capacity=24)
    method = retro(quest(budget=8, page_size=4), window=3)
    inputs = drive.step_inputs(stream, rows=3)

    @jax.jit
    def run(prompt, chunk, inputs):
        q, k, v = inputs
        state, _ = method.prefill(method.init(spec), *prompt)
        for i in range(2):
            state = method.append(state, k[i], v[i])
        before, _ = method.prefill(state, *chunk)
        # As if steps had found something.
        held = jax.tree.map(jnp.zeros_like, before.window)
        held = held._replace(start=before.window.start)
        after = method.append(before._replace(window=held), k[3], v[3])
        _, out, diagnostics = method.inspect_step(after, q[3])
        return before.store.pages, after.store.pages, out, diagnostics.lse

    prompt = drive.chunk(stream, (0,), (9,), size=9)
    chunk = drive.chunk(stream, (11,), (1,), size=1)
    before, after, out, lse = run(prompt, chunk, inputs)
    before, after = (x.reshape(1, 2, -1, 16) for x in (before, after))
    np.testing.assert_array_equal(after[:, :, :12], before[:, :, :12])
    assert not np.array_equal(after[:, :, 12], before[:, :, 12])
    np.testing.assert_array_equal(out[:, :, :2], 0)
    lse = np.asarray(lse)
    np.testing.assert_array_equal(lse[:, :, :2], -np.inf)
    assert (lse[:, :, 2] > -np.inf).all()


def test_dense_layers_take_the_new_keys_too():
    """Below a sparse layer they do not change; above one they do."""
    stream = drive.make_stream((3, 1), 4)
    spec, method = drive.make_spec(stream), dense.windowed(full(), 3)
    inputs = drive.step_inputs(stream, rows=3)

    @jax.jit
    def run(prompt, q, k, v):
        state, _ = method.prefill(method.init(spec), *prompt)
        keys = state.store.k
        for i in range(4):
            state = method.append(state, k[i], v[i] + jnp.float32(i))
            state, out, _ = method.inspect_step(state, q[i])
        rotated, positions = contiguous.rotate_queries(spec, q[3], state.store.length)
        return keys, state, out, contiguous.attend(state.store, rotated, positions).out

    prompt = drive.chunk(stream, (0, 0), stream.prompts, size=3)
    keys, state, out, expected = run(prompt, *inputs)
    # The last three were written at the last step, the one before them at its last.
    for b, start in enumerate(stream.prompts):
        values = np.asarray(state.store.v)[b, :, start : start + 4]
        shifts = values - stream.v[b, :, start : start + 4]
        wanted = np.array([2, 3, 3, 3])[:, None] * np.ones((1, 8))
        np.testing.assert_allclose(shifts, np.stack([wanted] * 2), atol=1e-5)
    np.testing.assert_array_equal(state.store.k[0, :, :3], keys[0, :, :3])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: retro(quest(), window=0), "window=0 must be at least 1"),
        (lambda: kvjax.parse("retro+oracle_topk"), "as Method.'oracle_topk'. does not"),
        (lambda: kvjax.parse("retro+entmaxkv"), "as Method.'entmaxkv'. does not: wrap"),
        (lambda: kvjax.parse("retro+dense_layers+quest"), "'dense_layers.retro.quest'"),
        (lambda: kvjax.parse("retro+retro+quest"), "as Method.'retro.quest'. does not"),
        (lambda: dense.windowed(full()._replace(rows=2), 3), "rows=2 must be 1"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_driver_that_feeds_one_row_is_told():
    stream = drive.make_stream((4,), 1)
    spec, method = drive.make_spec(stream), retro(quest(budget=16), window=2)
    _, k, v = (x[0] for x in drive.step_inputs(stream))
    with pytest.raises(ValueError, match=r"rows=1 must be window=2: feed the newest"):
        method.append(method.init(spec), k, v)
    with pytest.raises(ValueError, match=r"state Paged does not keep .*: use full"):
        dense.windowed(quest(), 2).init(spec)
