"""Quantised caches: a method on them is the method on the numbers that are read."""

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantiser

import kvjax
from kvjax import accounting, registry
from kvjax.methods.full import full
from kvjax.methods.quantize import quantize
from kvjax.methods.quest import quest
from kvjax.testing import subject
from kvjax.testing.oracle import softmax_attention
from pallas_kernels.shared.quantized import Quantized, as_stored, floats

PROMPTS, STEPS, SIZE = (1, 5, 30, 21), 8, 8


def unrotated(x, positions, length=None):
    """A model without positions: what is cached is what came."""
    del positions, length
    return x


def read_again(stream, keys, values, rotate=True, group=SIZE):
    """The stream of the numbers that a quantised cache gives back."""

    def kept(x, bits):
        return quantiser.read_again(x, bits, group, rotate).astype(np.float32)

    return stream._replace(k=kept(stream.k, keys), v=kept(stream.v, values))


# Transforms of quantised methods too; each keeps its tokens in another way.
METHODS = (
    "full",
    "streaming_llm",
    "snapkv",
    "h2o",
    "tova",
    "knorm",
    "keydiff",
    "expected_attention",
    "random",
    "subgen",
    "subgen:mode=stream",
    "quest",
    "hip:budget=16,prefill=sparse",
    "token_select",
    "oracle_topk",
    "squeezed",
    "refreshkv",
    "topk_completion:charge=none",
    "topk_completion:charge=none,selector=pages",
    "retro+quest",
    "head_budgets+snapkv",
    "decode_eviction+snapkv",
    "duo+quest",
)


def parsed(spec):
    return registry.parse(spec, **subject.SMALL)


@pytest.mark.parametrize("spec", METHODS)
def test_is_the_method_on_the_numbers_that_are_read(spec):
    """Keys in 8 bits and values in 4, turned: attention and what is attended to."""
    stream = drive.make_stream(PROMPTS, STEPS, head_dim=SIZE)
    made = drive.make_spec(stream, rope=unrotated, layer=7)
    run = drive.run(
        quantize(parsed(spec), keys=8, values=4, prompt="quantized"), made, stream
    )
    alike = read_again(stream, 8, 4)
    expected = drive.run(parsed(spec), made, alike)
    np.testing.assert_array_equal(
        run.diagnostics.attended, expected.diagnostics.attended
    )
    np.testing.assert_allclose(run.out, expected.out, atol=3e-5)
    for ours, theirs in zip(run.prompt_out, expected.prompt_out, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)
    assert not run.diagnostics.exact.any()


@pytest.mark.parametrize("spec", METHODS)
def test_an_exact_prompt_is_quantised_when_it_ends(spec):
    """As if its rows had been those numbers when the method chooses, and from then on;
    until then it is read as the method reads it."""
    stream = drive.make_stream(PROMPTS, STEPS, head_dim=SIZE)
    made = drive.make_spec(stream, rope=unrotated, layer=7)
    inner = parsed(spec)
    run = drive.run(quantize(inner, keys=8, values=4), made, stream)
    always = quantize(inner, keys=8, values=4, prompt="quantized")
    parts = always.init(made)
    held = jax.eval_shape(lambda: always.finish(parts))
    assert jax.tree.structure(run.state) == jax.tree.structure(held)
    numbers = jax.tree.leaves(parts, is_leaf=lambda x: isinstance(x, Quantized))

    def finish(state):
        leaves, structure = jax.tree.flatten(state)
        read = [
            as_stored(like, leaf) if isinstance(like, Quantized) else leaf
            for like, leaf in zip(numbers, leaves, strict=True)
        ]
        return inner.finish(jax.tree.unflatten(structure, read))

    alike = read_again(stream, 8, 4)
    for b, prompt in enumerate(PROMPTS):
        for x, came in ((alike.k, stream.k), (alike.v, stream.v)):
            x[b, :, :prompt] = came[b, :, :prompt]
    expected = drive.run(inner._replace(finish=finish), made, alike)
    np.testing.assert_array_equal(
        run.diagnostics.attended, expected.diagnostics.attended
    )
    np.testing.assert_allclose(run.out, expected.out, atol=3e-5)
    for ours, theirs in zip(run.prompt_out, expected.prompt_out, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not run.diagnostics.exact.any()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 4},
        {"bits": 4, "rotate": False},
        {"bits": 8, "rotate": False},
        {"keys": 4, "values": 8},
        {"bits": 4, "group": 4},
    ],
)
def test_equals_float64_attention(options):
    """Over the numbers that are read, which another quantiser gives too.

    Keys are quantised as they are cached, rotated by their positions: by float32's, so
    that a code in a thousand may be its neighbour, and a row with it.
    """
    stream = drive.make_stream(PROMPTS, STEPS, head_dim=SIZE)
    run = drive.run(quantize(full(), **options), drive.make_spec(stream), stream)
    bits = options.get("bits", 8)
    keys, values = options.get("keys", bits), options.get("values", bits)
    rotate, group = options.get("rotate", True), options.get("group", SIZE)
    read = [np.asarray(floats(x), np.float64) for x in (run.state.k, run.state.v)]
    others = 0
    for b, prompt in enumerate(PROMPTS):
        end = prompt + STEPS
        q, k, v = (x[b, :, :end] for x in stream[:3])
        q, k = (
            np.asarray([[drive.rotate(row, t) for t, row in enumerate(h)] for h in x])
            for x in (q, k)
        )
        alike = read_again(stream._replace(k=k, v=v), keys, values, rotate, group)
        for found, expected in zip(read, (alike.k, alike.v), strict=True):
            gap = np.abs(found[b, :, :end] - expected)
            others += (gap > 1e-5).any(-1).sum()
            assert gap.max() < 0.5
        for step, head in np.ndindex(STEPS, len(q)):
            last = prompt + step
            kv = (x[b, head // 2, : last + 1] for x in read)
            out, _, _ = softmax_attention(q[head, last], *kv)
            np.testing.assert_allclose(run.out[step, b, head], out, atol=2e-5)
    assert others <= 3  # of 356 rows


@pytest.mark.parametrize(
    ("options", "row", "spare"),
    [
        ({}, 128 + 2 + 128 + 2, 0),
        # Pages have nine scales a row, in room for 16.
        ({"keys": 8, "values": 4}, 128 + 2 + 64 + 4 * 4, 7 * 2),
        ({"bits": 4}, 2 * (64 + 4 * 4), 0),
        ({"bits": 4, "group": 64}, 2 * (64 + 2 * 4), 0),
    ],
)
def test_bytes_are_those_of_codes_and_scales(options, row, spare):
    """Read and held, by the one accounting: a head of 128 at float32 has 1,024."""
    stream = drive.make_stream((40,), 1, head_dim=128)
    spec = drive.make_spec(stream, capacity=64, max_new_tokens=8)
    whole, inner = quantize(full(), **options), quest(budget=16, page_size=8)
    heads = spec.num_kv_heads
    assert whole.traffic(spec, 40) == kvjax.Traffic(40 * heads * row, 0)
    assert accounting.state_bytes(whole, spec) == 64 * heads * row + 4
    summaries, row = inner.traffic(spec, 40).metadata, row + spare
    paged = quantize(inner, **options)
    assert paged.traffic(spec, 40) == kvjax.Traffic(16 * heads * row, summaries)
    assert accounting.token_bytes(paged, spec) == heads * row
    assert accounting.token_bytes(whole, spec) == heads * (row - spare)
    held = accounting.state_bytes(paged, spec)
    assert held - accounting.state_bytes(inner, spec) == 64 * heads * (row - 1024)
    retro = registry.get("retro")(quantize(inner, **options), window=2)
    assert retro.traffic(spec, 40).kv == 16 * heads * row
    kept = registry.parse("quantize+decode_eviction:every=4+snapkv:budget=16,window=4")
    first = quantize(full()).traffic(spec, 20).kv
    assert kept.traffic(spec, 40).kv == first


@pytest.mark.parametrize(
    "spec",
    [
        "retro:window=2+quantize+quest",
        "dense_layers+quantize+snapkv",
        "head_budgets+quantize:prompt=quantized+snapkv",
        "decode_eviction+quantize:prompt=quantized+snapkv",
        "duo+quantize+quest",
    ],
)
def test_what_is_made_of_a_lossy_method_is_lossy(spec):
    """A budget of everything: near full attention, and exact at no step."""
    stream = drive.make_stream((5, 21), STEPS, head_dim=SIZE)
    made = drive.make_spec(stream, layer=7)
    method = registry.parse(spec, **(subject.SMALL | {"budget": 64}))
    run, truth = (drive.run(one, made, stream) for one in (method, full()))
    assert method.lossy
    assert not run.diagnostics.exact.any()
    if not spec.startswith("duo"):  # whose other heads see a window
        gap = np.abs(run.out - truth.out).max()
        assert 1e-4 < gap < 0.1


def test_what_is_not_there_is_refused(unchecked_shapes):
    stream = drive.make_stream((4,), 1, head_dim=80)
    spec = drive.make_spec(stream)
    with pytest.raises(ValueError, match=r"group=32 must divide head_dim=80.*group=16"):
        quantize(full(), bits=4, group=32).init(spec)
    with pytest.raises(ValueError, match="bits=5 must be one of 8, 4"):
        quantize(full(), bits=5)
    with pytest.raises(ValueError, match=r"bits=8.0 must be one of 8, 4"):
        quantize(full(), bits=8.0)
    with pytest.raises(ValueError, match="bits='5' must be one of 8, 4"):
        registry.parse("quantize:bits=5+full")
    with pytest.raises(ValueError, match="rotate='yes' must be of type bool"):
        quantize(full(), rotate="yes")
    for name in ("head_budgets", "decode_eviction"):
        with pytest.raises(ValueError, match="with transforms outside"):
            registry.parse(f"{name}+quantize+snapkv:budget=64")
    with pytest.raises(ValueError, match="is quantised already: use quantize once"):
        quantize(quantize(full()))
    with pytest.raises(ValueError, match=r"cascade.* keeps no keys"):
        quantize(registry.parse("cascade", **subject.SMALL)).init(spec)


def test_no_leaf_of_the_cache_is_left_in_floats():
    """Of every method: what grows with the text is codes, scales or summaries."""
    stream = drive.make_stream((4,), 1, head_dim=64)
    for spec in METHODS:
        if spec.startswith("duo"):
            continue
        sizes = []
        for capacity in (512, 1024):
            made = drive.make_spec(stream, capacity=capacity, layer=7)
            method = quantize(parsed(spec), bits=4, group=64, prompt="quantized")
            state = jax.eval_shape(method.init, made)
            leaves = jax.tree.leaves(state)
            sizes.append(sum(x.size * x.dtype.itemsize for x in leaves))
        rows = 2 * 512 * (32 + 4)  # of one of keys and values, two heads
        scores = 2 * 512 * 4 * 3  # of those that score tokens
        summaries = 2 * 128 * 64 * 4 * 4  # of pages of 4
        assert sizes[1] - sizes[0] <= 2 * rows + scores + summaries, spec


def test_a_state_says_what_it_holds():
    stream = drive.make_stream((4,), 1, head_dim=64)
    method = quantize(full(), keys=4)
    state = method.init(drive.make_spec(stream, dtype="bfloat16"))
    assert isinstance(state.k, jax.Array)
    state = method.finish(state)
    assert isinstance(state.k, Quantized)
    assert state.k.dtype == jnp.bfloat16
    assert state.k.shape == (1, 2, 5, 64)
    assert state.k.codes.shape[-1] == 32
    assert state.v.codes.shape[-1] == 64
