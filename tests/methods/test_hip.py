"""HiP reads the pages that its search comes to, with sinks and a window of pages."""

import functools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import kvjax
from kvjax import accounting
from kvjax.methods.hip import stages
from kvjax.methods.hip.method import hip
from kvjax.stores import buffers, paged

# 6 pages: one of sinks, two of the window, three to search for.
SMALL = {"budget": 24, "page_size": 4, "num_sinks": 3, "window": 8}
STREAM = drive.make_stream((1, 59, 60, 61, 0, 24), 12)
SPEC = drive.make_spec(STREAM)


@functools.cache
def run(spec_text, stream_of=None):
    stream = STREAM if stream_of is None else stream_of()
    method = kvjax.parse(spec_text, **SMALL)
    return drive.run(method, drive.make_spec(stream), stream)


def tokens(diagnostics, step, row, head=0):
    return {int(j) for j in diagnostics.attended[step, row, head] if j >= 0}


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((4, 2), {}),
        ((2, 2), {"representative": "first"}),
        ((6, 2), {"per": "query", "key_stride": 3}),
        ((4, 1), {"group_reduce": "mean", "representative": "last", "key_stride": 4}),
        ((4, 2), {"budget": 8, "window": 4, "num_sinks": 0}),
        ((4, 2), {"budget": 40, "num_sinks": 9, "page_size": 1, "window": 2}),
    ],
)
def test_equals_float64_loops(heads, options):
    """Prompts that end one token before, at and after a page; a tiny one; none."""
    stream = drive.make_stream(STREAM.prompts, 6, heads=heads)
    options = SMALL | options
    found = drive.run(hip(**options), drive.make_spec(stream), stream)
    drive.assert_matches(found, stream, oracles.hip, **options)


def test_is_exact_as_long_as_the_budget_has_every_page():
    """Exactly so long, and whatever the keys; to the last slot of a cache."""
    stream = drive.make_stream((17, 20), 11)
    spec = drive.make_spec(stream, capacity=31)
    found = drive.run(hip(**SMALL), spec, stream)
    for i in range(stream.steps):
        for b, prompt in enumerate(stream.prompts):
            wanted = -(-(prompt + i + 1) // 4) <= 6
            assert (found.diagnostics.exact[i, b] == wanted).all()


def test_half_precision_is_consistent():
    stream = drive.make_stream((30, 45), 5, dtype="bfloat16")
    spec = drive.make_spec(stream, dtype="bfloat16")
    found = drive.run(hip(**SMALL), spec, stream)
    drive.assert_consistent(found, stream, "bfloat16")


# --- what is always read


@pytest.mark.parametrize("stride", [1, 8])
def test_sinks_and_window_are_read_at_every_step(stride):
    """Also while a list is held, over the borders of pages: no token falls between."""
    found = run(f"refresh:stride={stride}+hip")
    every = run("hip").diagnostics
    for i in range(STREAM.steps):
        for b, prompt in enumerate(STREAM.prompts):
            t = prompt + i
            always = {*range(min(4, t + 1)), *range(max(0, t - 8 + 4), t + 1)}
            for head in range(2):
                kept = tokens(found.diagnostics, i, b, head)
                assert always <= kept
                assert max(kept) == t
                if stride == 1:
                    assert kept == tokens(every, i, b, head)
    if stride == 8:
        np.testing.assert_array_equal(found.state.refreshes, 2)


def test_lists_are_revised_by_retro():
    """The keys of a page that was rewritten have no extremes to be taken again."""
    found = run("retro:window=3+hip")
    wanted = run("hip")
    # The newest token's own query chooses, whatever the rows before it.
    np.testing.assert_array_equal(
        found.diagnostics.attended, wanted.diagnostics.attended
    )
    assert found.state.store.page_min is None


# --- what is read to choose


@functools.cache
def ended():
    state, _ = drive.prefill(hip(**SMALL), SPEC, STREAM)
    return state


@functools.cache
def one_step():
    return jax.jit(functools.partial(drive.step, hip(**SMALL)))


def stepped(change=None, query=None):
    """The first step, after a change of the pages and of the queries."""
    state, (q, k, v) = ended(), (x[0] for x in drive.step_inputs(STREAM))
    if change is not None:
        state = state._replace(pages=change(state.pages))
    _, (out, diagnostics) = one_step()(state, (q if query is None else query, k, v))
    return np.asarray(out), jax.tree.map(np.asarray, diagnostics)


def test_only_representatives_and_what_is_listed_are_read():
    """Any other key may hold anything; of what is scored one changes the list."""
    row, head = 3, 0
    found = oracles.Hip(STREAM.row(row), **SMALL)
    listed = found.pages(STREAM.prompts[row], 0)
    (searched,) = found.searches
    out, diagnostics = stepped()
    unread = set(range(62 // 4 + 1)) - {*searched.scored, *listed}
    scored = set(searched.scored) - set(listed)
    assert unread
    assert scored

    def spoil(page, pages):
        return pages.at[row, head, page, :, :8].set(1e3)

    for page in unread:
        again, same = stepped(functools.partial(spoil, page))
        np.testing.assert_array_equal(again, out)
        np.testing.assert_array_equal(same.attended, diagnostics.attended)
    changed = [stepped(functools.partial(spoil, page))[1].attended for page in scored]
    assert any((x != diagnostics.attended).any() for x in changed)


def test_a_logit_of_exactly_0_can_be_the_highest():
    """All other keys are turned away from the query; one page's see nothing of it."""
    row = 3

    def found(page):  # of the pages 1 to 13
        score = lambda p: 0.0 if p == page else -1.0  # noqa: E731
        return oracles.tree_search(score, 1, 13, 3).found

    page = max(p for p in range(1, 14) if p in found(p))
    assert page not in found(None)
    q = np.zeros_like(drive.step_inputs(STREAM)[0][0])
    q[..., 7] = 1.0  # the slowest frequency: hardly turned by position

    def change(pages):
        pages = pages.at[row, :, :15, :, :8].set(0.0)
        away = pages.at[row, :, :15, :, 7].set(-1.0)
        return away.at[row, :, page, :, :8].set(0.0)

    _, diagnostics = stepped(change, jnp.asarray(q))
    for listed in diagnostics.attended[row]:
        assert {4 * page, 4 * page + 3} <= set(listed.tolist())


def equal_heads():
    stream = drive.make_stream((61, 43), 4, heads=(6, 2), seed=4)
    stream.q[:] = np.repeat(stream.q[:, ::3], 3, axis=1)
    return stream


def test_equal_heads_share_their_lists():
    """And then the highest and the mean of a group are the same."""
    by_kv = run("hip", equal_heads).diagnostics.attended
    for options in ("per=query", "group_reduce=mean"):
        other = run(f"hip:{options}", equal_heads).diagnostics.attended
        other = other[:, :, ::3] if options == "per=query" else other
        np.testing.assert_array_equal(by_kv, other)


def test_the_stride_is_over_the_keys_of_a_page():
    """With the largest, a page is as good as its first key."""
    stream = drive.make_stream((61, 47), 1)
    method = hip(**SMALL, key_stride=4)
    state, _ = drive.prefill(method, drive.make_spec(stream), stream)
    step = jax.jit(functools.partial(drive.step, method))
    inputs = [x[0] for x in drive.step_inputs(stream)]
    _, (_, before) = step(state, inputs)
    others = state._replace(pages=state.pages.at[:, :, :10, 1:, :8].set(9.0))
    _, (_, after) = step(others, inputs)
    np.testing.assert_array_equal(before.attended, after.attended)


def test_bytes_bound_what_is_read():
    """Those of a search bound the keys that loops look at, from below too."""
    method, row = hip(**SMALL), STREAM.row(3)
    spec = drive.make_spec(STREAM, capacity=4096)
    seen = {}
    for t in (0, 3, 4, 11, 16, 23, 24, 25, 30, 47, 61, 72):
        found = oracles.Hip(row, **SMALL)
        listed = {page for h in (0, 2) for page in found.pages(t, h)}
        traffic = method.traffic(spec, t + 1)
        key = buffers.row_bytes(spec, 1, "keys")
        most = max(len(searched.scored) for searched in found.searches)
        assert traffic.metadata >= most * 4 * key
        assert traffic.metadata <= 2 * most * 4 * key
        pages = min(-(-(t + 1) // 4), 6)
        assert traffic.kv == buffers.kv_bytes(spec, 4 * pages)
        assert len(listed) >= pages
        seen[t] = traffic.metadata
    assert seen[23] < seen[72]
    # A key in four, of lists of their own.
    strided = hip(**SMALL, key_stride=3, per="query").traffic(spec, 73)
    assert strided.metadata == 2 * seen[72] // 2
    assert strided.kv == 2 * method.traffic(spec, 73).kv


def test_a_search_grows_with_the_logarithm():
    """Of the context: a doubling adds a round of the same size to what is read."""
    spec = drive.make_spec(STREAM, capacity=1 << 20)
    method = hip(budget=1024)
    read = [method.traffic(spec, 2**power).metadata for power in range(14, 21)]
    assert len(set(np.diff(read))) == 1
    assert read[-1] < 3 * read[0]


def test_nothing_is_held_beside_the_pages():
    spec = drive.make_spec(STREAM)
    pages = -(-spec.capacity // 4) * 4
    held = accounting.state_bytes(hip(**SMALL), spec)
    assert held == buffers.kv_bytes(spec, pages) + 4 * len(STREAM.prompts)


# --- a sparse prompt

SPARSE = SMALL | {"prefill": "sparse", "query_block": 6}


def oracle_of(options):
    return {k: v for k, v in options.items() if k != "prefill"}


@pytest.mark.parametrize(
    ("heads", "options"),
    [((4, 2), {}), ((4, 2), {"per": "query", "query_block": 1, "key_stride": 2})],
)
def test_a_sparse_prompt_equals_searches_by_the_block(heads, options):
    """As steps that search at every multiple of the block; blocks split pages."""
    stream = drive.make_stream((1, 59, 60, 61, 0, 24), 2, heads=heads)
    options = SPARSE | options
    found = drive.run(hip(**options), drive.make_spec(stream), stream)
    drive.assert_matches(found, stream, oracles.hip, **oracle_of(options))


def test_a_sparse_prompt_is_the_same_in_any_chunks():
    """To the last bit: a block goes on where the chunk before it ended."""
    method, stream = hip(**SPARSE), drive.make_stream((40, 53), 1)
    spec = drive.make_spec(stream)
    outs = []
    for cuts in (
        [(40, 53)],
        [(7, 0), (0, 20), (33, 33)],
        [(1, 5), (5, 1), (0, 6), (20, 9), (14, 32)],
    ):
        step, state = jax.jit(method.prefill), method.init(spec)
        start, rows = np.zeros(2, int), [[], []]
        for lengths in cuts:
            inputs = drive.chunk(stream, start, lengths, size=53)
            state, out = step(state, *inputs)
            for b in range(2):
                rows[b].append(np.asarray(out)[b, :, : lengths[b]])
            start += lengths
        outs.append([np.concatenate(row, axis=1) for row in rows])
    for other in outs[1:]:
        for mine, theirs in zip(outs[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("transform", ["refresh:stride=4", "retro:window=2", "offload"])
def test_transforms_of_a_sparse_prompt(transform):
    """What lists pages once it has ended can be wrapped; nothing moves keys away."""
    spec_text = f"{transform}+hip:prefill=sparse,query_block=6"
    if transform == "offload":
        with pytest.raises(ValueError, match="hip, whose search walks over all k"):
            kvjax.parse(spec_text, **SMALL)
        return
    found = run(spec_text)
    drive.assert_matches(
        found._replace(out=found.out[:0], diagnostics=found.diagnostics),
        STREAM._replace(steps=0),
        oracles.hip,
        **oracle_of(SPARSE),
    )
    wanted = run("hip:prefill=sparse,query_block=6")
    np.testing.assert_array_equal(
        found.diagnostics.attended[0], wanted.diagnostics.attended[0]
    )


# --- stages

# Sinks 4, window 8, four pages of 4; chunks of 16, then 8, then pages.
STAGES = {"budget": 28, "page_size": 4, "num_sinks": 4, "window": 8, "search": "stages"}
STAGES |= {"chunks": "16/8", "kept": "32/24", "strides": "8/4/2"}


@pytest.mark.parametrize(
    ("options", "of_stages"),
    [
        ({}, [(16, 32, 8), (8, 24, 4), (4, 16, 2)]),
        ({"chunks": "12", "kept": "24", "strides": "1/1"}, [(12, 24, 1), (4, 16, 1)]),
        ({"chunks": "", "kept": "", "strides": "3"}, [(4, 16, 3)]),
    ],
)
def test_stages_equal_float64_loops(options, of_stages):
    """Lists are held by stage; of chunks that the window cuts short, what is there."""
    stream = drive.make_stream((1, 93, 96, 97, 0, 40), 11)
    method = hip(**STAGES | options)
    found = drive.run(method, drive.make_spec(stream), stream)
    sizes = {k: STAGES[k] for k in ("budget", "page_size", "num_sinks", "window")}
    drive.assert_matches(found, stream, oracles.in_stages, stages=of_stages, **sizes)


def test_chunks_of_one_token_are_an_exact_top_k():
    """Pages of one token and one stage: the best token of all heads."""
    stream = drive.make_stream((50, 33), 4)
    options = STAGES | {"page_size": 1, "budget": 20, "window": 4}
    options |= {"chunks": "", "kept": "", "strides": "1"}
    found = drive.run(hip(**options), drive.make_spec(stream), stream)
    for b, prompt in enumerate(stream.prompts):
        attention = oracles.Attention(stream.row(b))
        for i in range(stream.steps):
            t = prompt + i
            scores = {}
            for j in range(4, t - 3):
                keys = [attention.k[h // 2][j] for h in range(4)]
                scores[j] = max(attention.q[h, t] @ key for h, key in enumerate(keys))
            best = oracles.best(scores, 12) | {*range(4), *range(t - 3, t + 1)}
            assert tokens(found.diagnostics, i, b) == best


def test_a_walk_ends_below_the_best_and_turns_left_where_halves_are_equal():
    """Few different logits, of chunks of every size; two heads look for others."""
    logits = np.random.default_rng(0).integers(0, 5, 40).astype(np.float32)
    spec = drive.make_spec(drive.make_stream((40,), 0, heads=(2, 1)))
    keys = np.zeros((1, 1, 10, 4, 16), np.float32)
    keys[..., 0] = logits.reshape(10, 4)
    store = paged.paged(spec, 4, extremes=False)._replace(pages=jnp.asarray(keys))
    q = np.zeros((1, 2, 1, 8), np.float32)
    q[0, :, 0, 0] = 1, -1
    chunks = [(c, z) for z in range(1, 17) for c in range(41 - z)]
    starts, sizes = (
        jnp.asarray(x, jnp.int32)[None, None] for x in np.transpose(chunks)
    )
    found = np.asarray(stages.chunk_scores(store, jnp.asarray(q), starts, sizes, 16))
    for (start, size), score in zip(chunks, found[0, 0], strict=True):
        ends = [
            oracles.walk(lambda j, sign=sign: sign * logits[j], start, size)
            for sign in (1, -1)
        ]
        assert score == max(ends)
        part = logits[start : start + size]
        assert score <= max(part.max(), -part.min())
        assert size > 1 or score == max(part[0], -part[0])


def test_stages_keep_what_they_are_told():
    method = hip(**STAGES)
    state = jax.eval_shape(lambda: method.init(drive.make_spec(STREAM, capacity=4096)))
    assert [chunks.shape[-1] for chunks in state.kept] == [2, 3, 4]
    # 10 pages between sinks and window: 3 chunks, of which 2; 4 parts, of which 3; ...
    spec = drive.make_spec(STREAM, capacity=4096)
    key = 2 * buffers.row_bytes(spec, 1, "keys")  # of both heads of a group
    traffic = method.traffic(spec, 4 + 40 + 8)
    read = -(-3 * 5 * key // 8) + 4 * 4 * key // 4 + -(-6 * 3 * key // 2)
    assert traffic.metadata == read + 4 * spec.batch * (2 + 3 + 4)
    assert traffic.kv == buffers.kv_bytes(spec, 28)


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 24}, r"budget=24.*page_size=16"),
        ({"page_size": 0}, "page_size=0"),
        ({"num_sinks": -1}, "num_sinks=-1 must be at least 0"),
        ({"window": 24}, "window=24.*page_size=16"),
        ({"window": 0}, "window=0.*page_size=16"),
        (
            {"budget": 64, "num_sinks": 17, "window": 32},
            "budget=64 leaves no page to search for beside num_sinks=17 and window=32",
        ),
        ({"key_stride": 17}, r"key_stride=17 must be in \[1, page_size=16\]"),
        ({"key_stride": 0}, "key_stride=0"),
        ({"representative": "best"}, "representative='best' must be one of centre"),
        ({"per": "head"}, "per='head' must be one of kv, query"),
        ({"prefill": "hip"}, "prefill='hip' must be one of full, sparse"),
        ({"search": "all"}, "search='all' must be one of tree, stages"),
        ({"group_reduce": "sum"}, "group_reduce='sum' must be one of mean, max"),
        ({"query_block": 0}, "query_block=0"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_both_values(options, message):
    with pytest.raises(ValueError, match=message):
        hip(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": "sparse"}, "prefill='sparse' needs search='tree'"),
        ({"num_sinks": 3}, "num_sinks=3 must be a multiple of page_size=4"),
        ({"chunks": "20/8"}, "chunks: 20 must be a multiple of 8"),
        ({"chunks": "12/6"}, "chunks: 6 must be a multiple of 4"),
        ({"kept": "32/48"}, "kept: 32 must be at least 48"),
        ({"kept": "32/8"}, "kept: 8 must be at least 16"),
        ({"kept": "40/24"}, "kept=40 must be a multiple of chunks=16"),
        ({"strides": "6/4/2"}, "strides: 6 must be a multiple of 4"),
        ({"strides": "4/2"}, "chunks='16/8' and kept='32/24' must have a number for"),
        ({"chunks": "16,8"}, "chunks='16,8' must be positive numbers"),
        ({"strides": "8/0/2"}, "strides='8/0/2' must be positive numbers"),
        ({"strides": "32/4/2"}, "strides='32/4/2' lets 8 begin before the first"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_of_stages_name_both_values(options, message):
    with pytest.raises(ValueError, match=message):
        hip(**STAGES | options)


def test_numbers_of_stages_are_numbers_where_none_is_searched():
    with pytest.raises(ValueError, match="strides='16/x' must be positive numbers"):
        hip(strides="16/x")


@pytest.mark.parametrize("transform", ["refresh", "retro", "offload"])
def test_stages_hold_lists_of_their_own(transform):
    """And so no transform does; in one line that says what it wraps instead."""
    with pytest.raises(ValueError, match="wrap quest"):
        kvjax.parse(f"{transform}+hip:search=stages")


@pytest.mark.parametrize("budget", [32, 48, 64, 784, 1024])
def test_defaults_are_the_papers_shares_in_whole_pages(budget):
    """And leave a page to search for, whatever the budget."""
    left_out = hip(budget=budget)
    options = {
        32: {"num_sinks": 0, "window": 16},
        48: {"num_sinks": 0, "window": 16},
        64: {"num_sinks": 16, "window": 16},
        784: {"num_sinks": 16, "window": 256},
        1024: {"num_sinks": 16, "window": 320},
    }[budget]
    wanted = hip(budget=budget, page_size=16, key_stride=1, **options)
    bound = [method.inspect_step.args[0] for method in (left_out, wanted)]
    assert bound[0] == bound[1]
    assert bound[0].representative == "centre"
    assert bound[0].per == "kv"
