"""CritiPrefill: segments and their choice of blocks, against float64 loops."""

import dataclasses
import functools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny

import kvjax
from kvjax import accounting, registry
from kvjax.methods import critiprefill as module
from kvjax.methods.critiprefill import critiprefill

SEGMENT, BLOCK, BUDGET, DENSE = 8, 4, 8, 8
SIZES = dict(segment=SEGMENT, block=BLOCK, budget=BUDGET, dense_tokens=DENSE)
PROMPTS = (5, 47, 40)
ROWS = 48  # of a call, padded: one compilation for all prompts
LAYER = 3
# Of one row; two to three times the largest seen.
TOLERANCE = 2e-6


@functools.cache
def method_of(inner="full", **options):
    return critiprefill(kvjax.parse(inner), **(SIZES | options))


@functools.cache
def jitted(method):
    return jax.jit(method.hooks.prefill_after)


def spec_of(stream, **changes):
    """Of a capacity that no block divides, and no page of two."""
    return drive.make_spec(stream, capacity=51, layer=LAYER, **changes)


def stream_of(seed=0, heads=(4, 2), prompts=PROMPTS, **more):
    return drive.make_stream(prompts, 1, heads=heads, seed=seed, **more)


def read(method, stream, chunks=None, below=None, spec=None):
    """The state behind the prompts, their outputs a row, and what was handed last."""
    state, step = method.init(spec or spec_of(stream)), jitted(method)
    start, outs, above = np.zeros(len(stream.prompts), int), [], None
    for lengths in [stream.prompts] if chunks is None else chunks:
        inputs = drive.chunk(stream, start, lengths, size=ROWS)
        state, out, above = step(state, *inputs, below)
        outs.append([np.asarray(out)[b, :, :n] for b, n in enumerate(lengths)])
        start += np.asarray(lengths)
    rows = [np.concatenate(row, axis=1) for row in zip(*outs, strict=True)]
    return state, rows, above


def handed_weights(above, row, prompt):
    """What a row's sparse segments hand up in a call of the whole prompt."""
    found = {}
    for s in range(DENSE // SEGMENT, prompt // SEGMENT):
        for kv in range(above.shape[1]):
            weights = np.asarray(above)[row, kv, s]
            assert not weights[s * SEGMENT // BLOCK :].any()
            found[s, kv] = weights[: s * SEGMENT // BLOCK].tolist()
    return found


def close(rows, stream, layers):
    for b, (found, layer) in enumerate(zip(rows, layers, strict=True)):
        error = np.abs(found - layer.out.swapaxes(0, 1)).max(initial=0)
        assert error < TOLERANCE, (b, error)


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        ("full", {}),
        # Two of the method's own pages a block, and the options that are not official.
        ("quest:page_size=2", {"score": "bound", "group_reduce": "max"}),
    ],
)
def test_equals_float64_loops(inner, options):
    """Two layers with fusion, ragged rows: outputs, lists and what is handed up."""
    method, below, expected = method_of(inner, **options), None, [None] * len(PROMPTS)
    loops = SIZES | {"fusion": 0.25} | options
    for seed in (1, 2):
        stream = stream_of(seed)
        _, rows, below = read(method, stream, below=below)
        layers = [
            oracles.critiprefill(stream.row(b), below=expected[b], **loops)
            for b in range(len(PROMPTS))
        ]
        close(rows, stream, layers)
        expected = [layer.weights for layer in layers]
        for b, prompt in enumerate(PROMPTS):
            found = handed_weights(below, b, prompt)
            assert found.keys() == expected[b].keys()
            for key, weights in found.items():
                np.testing.assert_allclose(weights, expected[b][key], atol=1e-6)
                assert abs(sum(weights) - 1) < 1e-6


def test_without_fusion_the_layer_below_is_ignored():
    """And nothing is handed up; a layer can be read alone."""
    stream, method = stream_of(3), method_of(fusion=0.0)
    _, rows, above = read(method, stream)
    layers = [
        oracles.critiprefill(stream.row(b), fusion=0.0, **SIZES)
        for b in range(len(PROMPTS))
    ]
    close(rows, stream, layers)
    assert above is None
    handed = jnp.ones((3, 2, 7, 13))
    for found, row in zip(read(method, stream, below=handed)[1], rows, strict=True):
        np.testing.assert_array_equal(found, row)
    empty = method.init(spec_of(stream))
    assert jax.eval_shape(method.prefill, empty, *whole(stream))[1].shape[2] == ROWS


def whole(stream):
    return drive.chunk(stream, [0] * len(stream.prompts), stream.prompts, size=ROWS)


def test_nearly_all_fusion_chooses_as_the_layer_below():
    """A value in one block shows which blocks were read."""
    first, second = stream_of(4), stream_of(5)
    method = method_of(fusion=0.999)
    _, _, below = read(method, first)
    _, rows, above = read(method, second, below=below)
    np.testing.assert_allclose(above, below, atol=2e-3)
    for b, prompt in enumerate(PROMPTS):
        row = second.row(b)
        chosen = oracles.critiprefill(first.row(b), fusion=0.0, **SIZES).chosen
        visible = oracles.critiprefill(row, fusion=0.0, **SIZES).visible
        attention = oracles.Attention(row)
        for s, kv in chosen:
            t = s * SEGMENT
            seen = visible[t][kv] & set(range(t, t + SEGMENT))
            seen |= {j * BLOCK + i for j in chosen[s, kv] for i in range(BLOCK)}
            out = attention(t, kv * row.group, sorted(seen))[0]
            np.testing.assert_allclose(rows[b][kv * row.group, t], out, atol=1e-5)
        assert prompt < 2 * SEGMENT or chosen


@pytest.mark.parametrize("options", [{"fusion": 0.5, "score": "bound"}, {}])
def test_a_budget_over_the_prompt_is_full_attention(options):
    stream = stream_of(6)
    method = method_of(budget=48, **options) if options else method_of(first=LAYER + 1)
    _, rows, _ = read(method, stream)
    for b, prompt in enumerate(PROMPTS):
        expected = oracles.full(stream.row(b)).out[:prompt].swapaxes(0, 1)
        np.testing.assert_allclose(rows[b], expected, atol=TOLERANCE)


CALLS = {  # of the prompts (5, 47, 40)
    "whole": [(0, 8, 16), (5, 24, 0), (0, 15, 24)],
    "cut": [(2, 11, 20), (3, 19, 1), (0, 17, 19)],
}


def test_cuts_at_segments_change_no_bit_and_others_keep_what_was_exact():
    """Segments count from position 0 of the text, not from where a call begins."""
    stream, method = stream_of(7), method_of()
    _, at_once, _ = read(method, stream)
    _, aligned, _ = read(method, stream, CALLS["whole"])
    _, cut, _ = read(method, stream, CALLS["cut"])
    for b, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(aligned[b], at_once[b])
        exact = oracles.full(stream.row(b)).out[:prompt].swapaxes(0, 1)
        was_exact = np.abs(at_once[b] - exact).max((0, 2)) < TOLERANCE
        gap = np.abs(cut[b] - exact).max((0, 2))
        assert (gap[was_exact] < TOLERANCE).all()
        if prompt > 16:
            assert (gap < TOLERANCE).sum() > was_exact.sum() > 0
        ends = tuple(np.cumsum([0, *(lengths[b] for lengths in CALLS["cut"])]))
        loops = oracles.critiprefill(stream.row(b), cuts=ends, fusion=0.25, **SIZES)
        np.testing.assert_allclose(cut[b], loops.out.swapaxes(0, 1), atol=TOLERANCE)


def changed(stream, name, where, by=3.0):
    """The stream with tokens of its second row changed."""
    array = getattr(stream, name).copy()
    array[1, :, where] += by * np.sin(1.0 + np.arange(array.shape[3]))
    return stream._replace(**{name: array})


def test_no_token_sees_a_later_one():
    """Of its own segment too: a later token's value, and all that comes behind it."""
    stream, method = stream_of(8), method_of()
    _, before, _ = read(method, stream)
    other = stream
    for name in ("q", "k", "v"):
        other = changed(other, name, slice(24, None))
    _, after, _ = read(method, other)
    np.testing.assert_array_equal(after[1][:, :24], before[1][:, :24])
    assert (np.abs(after[1] - before[1]).max((0, 2))[24:] > 1e-3).all()
    np.testing.assert_array_equal(after[2], before[2])  # another row
    # Positions 24-31 are one segment.
    _, after, _ = read(method, changed(stream, "v", slice(29, 30)))
    gap = np.abs(after[1] - before[1]).max((0, 2))
    assert not gap[:29].any()
    assert (gap[29:32] > 1e-3).all()


def test_the_last_query_of_a_segment_has_a_say_for_its_first():
    stream, method = stream_of(9), method_of()
    _, before, _ = read(method, stream)
    _, after, _ = read(method, changed(stream, "q", slice(31, 32), by=60.0))
    gap = np.abs(after[1] - before[1]).max((0, 2))
    assert gap[24] > 1e-3
    assert not gap[:24].any()
    assert not gap[32:].any()


def test_every_token_of_a_list_counts_once():
    """All keys alike to a query of 0: an output is the mean of the values read."""
    stream = stream_of(10)
    stream.q[:] = 0.0
    stream.v[:] = 1.0
    _, rows, _ = read(method_of(), stream)
    for row in rows:
        np.testing.assert_allclose(row, 1.0, atol=TOLERANCE)
    for token in (3, 17, 26):
        stream.v[:] = 0.0
        stream.v[:, :, token] = 1.0
        _, rows, _ = read(method_of(), stream)
        for t in range(16, 40):  # of sparse segments with enough before them
            mean = 1 / (BUDGET + t % SEGMENT + 1)
            found = np.unique(np.round(rows[2][:, t], 6))
            assert set(found) <= {0.0, np.round(np.float32(mean), 6)}, (token, t)
            if token // SEGMENT == t // SEGMENT:
                assert (found > 0).all() == (token <= t)
        # Where the budget is more than there is, each of all tokens counts once too.
        _, rows, _ = read(method_of(dense_tokens=0, budget=16), stream)
        for t in range(24):
            expected = (token <= t) / (t + 1)
            np.testing.assert_allclose(rows[2][:, t], expected, atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT])
def test_short_prompts_are_finite_and_exact(length):
    """Fewer blocks than the budget, from the first token on."""
    stream = stream_of(11, prompts=(length, 0, length))
    _, rows, above = read(method_of(dense_tokens=0, budget=16), stream)
    expected = oracles.full(stream.row(0)).out[:length].swapaxes(0, 1)
    np.testing.assert_allclose(rows[0], expected, atol=TOLERANCE)
    assert np.isfinite(above).all()


def test_rows_do_not_see_each_other_nor_padding():
    """A short row beside a long one keeps every bit; padding holds 1e4."""
    stream, method = stream_of(12), method_of()
    _, before, _ = read(method, stream)
    _, after, _ = read(method, stream._replace(prompts=(5, 13, 40)))
    np.testing.assert_array_equal(after[2], before[2])
    np.testing.assert_array_equal(after[1][:, :8], before[1][:, :8])
    # Of a segment that is cut here and comes whole there, two blocks are all.
    np.testing.assert_allclose(after[1], before[1][:, :13], atol=TOLERANCE)


def test_groups_of_heads():
    """One query head a KV head: either reduction; heads in another order move along."""
    stream = stream_of(13, heads=(2, 2))
    found = [read(method_of(group_reduce=how), stream)[1] for how in ("mean", "max")]
    for mean, most in zip(*found, strict=True):
        np.testing.assert_array_equal(mean, most)
    stream = stream_of(14)
    _, before, _ = read(method_of(), stream)
    kv, q = [1, 0], [2, 3, 0, 1]
    moved = stream._replace(q=stream.q[:, q], k=stream.k[:, kv], v=stream.v[:, kv])
    _, after, _ = read(method_of(), moved)
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b[q])


# --- what it wraps


def exact_methods():
    """Every method whose prompt attention is exact, and a transform of one."""
    for name in registry.names(1.0):
        method = registry.parse(name, **tiny.SMALL)
        if method.exact_prompt:
            yield method
    yield registry.parse("dense_layers:first=4+quest:budget=16,page_size=4")


def test_the_methods_own_state_is_as_without_it():
    """Of every method, bit for bit; and behind the prompt nothing else is held."""
    stream = stream_of(15)
    spec, methods = spec_of(stream), list(exact_methods())
    wrapped = [critiprefill(one, **SIZES) for one in methods]

    @jax.jit
    def states(chunk):
        alone = [one.prefill(one.init(spec), *chunk)[0] for one in methods]
        inside = [
            one.hooks.prefill_after(one.init(spec), *chunk, None)[0].inner
            for one in wrapped
        ]
        return alone, inside

    alone, inside = states(whole(stream))
    assert len(methods) > 10
    assert jax.tree.structure(inside) == jax.tree.structure(alone)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)
    for one, own in zip(wrapped, methods, strict=True):
        held = accounting.state_bytes(one, spec)
        assert held == accounting.state_bytes(own, spec)
        extra = accounting.prompt_bytes(one, spec) - accounting.prompt_bytes(own, spec)
        token = 3 * 2 * 8 * 4  # rows, KV heads, elements of a vector, bytes
        pages = -(-51 // BLOCK)
        separate = 2 * token * pages * BLOCK + 2 * token * pages + 3 * 4
        has_pages = module.has_pages(own.init(spec), BLOCK)
        assert extra == (0 if has_pages else separate)


def test_pages_of_the_method_serve_if_they_divide_a_block():
    spec = spec_of(stream_of())

    def store_of(inner):
        return method_of(inner).init(spec).store

    assert store_of("quest:page_size=4,budget=8") is None
    assert store_of("quest:page_size=8,budget=8").pages.shape[2:4] == (13, 4)
    assert store_of("quantize+quest:page_size=4,budget=8") is None
    assert store_of("offload:memory=device+quest:page_size=4,budget=8") is not None
    assert method_of("full").init(dataclasses.replace(spec, layer=0)).spec.layer == 0


def test_work_is_the_pairs_of_a_mask():
    """As the reader cuts a prompt: its last segment never comes whole."""
    spec = spec_of(stream_of())
    for options in ({}, {"budget": 32}, {"dense_tokens": 0}, {"dense_tokens": 17}):
        method, loops = method_of(**options), SIZES | options
        for length in (1, 7, 8, 9, 24, 25, 47):
            stream = stream_of(16, prompts=(length,), heads=(1, 1))
            last = ((length - 1) // SEGMENT * SEGMENT) + 1  # inside of it, or its end
            layer = oracles.critiprefill(
                stream.row(0), cuts=(last,), fusion=0.0, **loops
            )
            pairs = sum(len(seen) for (seen,) in layer.visible)
            assert method.hooks.work(spec, length) == pairs, (options, length)
    dense = dataclasses.replace(spec, layer=0)
    assert method_of().hooks.work(dense, 47) == 47 * 48 // 2


# --- what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 100}, "budget=100 must be a positive multiple of block=32"),
        ({"segment": 0}, "segment=0 must be a positive multiple of block=32"),
        ({"block": 0}, "block=0 must be at least 1 token"),
        ({"dense_tokens": -1}, "dense_tokens=-1 must be at least 0 tokens"),
        ({"first": -1}, "first=-1 must be at least 0 layers"),
        ({"fusion": 1.0}, r"fusion=1.0 must be in \[0, 1\)"),
        ({"score": "best"}, "score='best' must be one of midrange, bound"),
        ({"group_reduce": "sum"}, "group_reduce='sum' must be one of mean, max"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_the_options_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        critiprefill(kvjax.full(), **options)


@pytest.mark.parametrize(
    "inner",
    [
        *("streaming_llm", "cascade", "duo:share=0.5+quest", "quantize+streaming_llm"),
        *("quantize+duo:share=0.5+quest", "quantize:prompt=quantized+full"),
    ],
)
def test_a_method_with_a_prompt_attention_of_its_own_is_refused(inner):
    method = registry.parse(f"critiprefill+{inner}")
    with pytest.raises(ValueError, match="prompt attention of its own: use it alone"):
        method.init(spec_of(stream_of()))


@pytest.mark.parametrize("outer", ["refresh", "offload", "retro", "dense_layers"])
def test_it_goes_outermost(outer):
    for inner in ("critiprefill+quest", "critiprefill+retro+quest"):
        with pytest.raises(ValueError, match=r"critiprefill goes outermost, as in 'cr"):
            registry.parse(f"{outer}+{inner}")


def test_a_layer_alone_needs_no_fusion():
    stream = stream_of()
    method = method_of()
    with pytest.raises(ValueError, match=r"fusion=0.25 mixes .* use fusion=0, or"):
        method.prefill(method.init(spec_of(stream)), *whole(stream))
    ended = method.finish(method.init(spec_of(stream)))
    assert jax.eval_shape(method.prefill, ended, *whole(stream))


def test_the_defaults_are_the_official_ones():
    method = critiprefill(kvjax.quest(budget=1024))
    assert "budget=2048,segment=512,block=32,dense_tokens=4096" in str(method)
    assert "first=1,fusion=0.25,score=midrange,group_reduce=mean" in str(method)
    assert method.hooks.granule == 512
    assert not method.exact_prompt


def test_a_second_reading_is_the_methods():
    stream = stream_of(17)
    method, alone = method_of("kvzip:budget=8"), kvjax.kvzip(budget=8)
    state, _, _ = read(method, stream)
    again = jax.jit(method.reread.prefill)(state, *whole(stream))[0]
    own = jax.jit(alone.reread.prefill)(state.inner, *whole(stream))[0]
    np.testing.assert_array_equal(again.inner.scores, own.scores)
    assert again.store is state.store or again.store.length.tolist() == list(PROMPTS)


def test_bfloat16_is_scored_and_summed_in_float32():
    """On numbers that are rounded before: what is handed up is as of float32."""
    stream = stream_of(18, dtype="bfloat16")
    method, spec = method_of(), spec_of(stream, dtype="bfloat16")
    chunk = drive.chunk(stream, [0] * 3, stream.prompts, "bfloat16", size=ROWS)
    _, out, above = jitted(method)(method.init(spec), *chunk, None)
    assert (out.dtype, above.dtype) == (jnp.bfloat16, jnp.float32)
    for b, prompt in enumerate(PROMPTS):
        layer = oracles.critiprefill(stream.row(b), fusion=0.25, **SIZES)
        found = np.asarray(out.astype(jnp.float32))[b, :, :prompt]
        gap = np.abs(found - layer.out.swapaxes(0, 1)).max((0, 2))
        assert np.median(gap) < 2e-2, (b, gap)
        for (s, kv), weights in layer.weights.items():
            handed = above[b, kv, s, : len(weights)]
            np.testing.assert_allclose(handed, weights, atol=2e-2)
