"""The kernels of Hopper GPUs over caches in 8 and 4 bits, simulated.

They make of codes the numbers that `test_quantized.py` is about, as operands: rounded.
"""

import functools

import jax
import jax.numpy as jnp
import listed_pages
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_attention import page_attention
from pallas_kernels.shared import cases, hopper, quantized
from pallas_kernels.shared.quantized import Format, Layout

needs_mosaic = pytest.mark.skipif(
    hopper.plgpu is None,
    reason=f"Mosaic GPU kernels need jax >= 0.11; this is {jax.__version__}",
)
D, BLOCK = 128, hopper.BLOCK
NAN = 0x7FC0  # as a scale
# Two to three times the largest relative error of a row: weights are bfloat16.
TOLERANCE = 4e-3
# A tile of numbers has two scales, or one for both of its halves.
FORMATS = {
    "K8V4": (Format(D, 8, D, turned=True), Format(D, 4, 32)),
    "K4V8": (Format(D, 4, 128), Format(D, 8, D, turned=True)),
    "int4": (Format(D, 4, 32, turned=True), Format(D, 4, 64, turned=True)),
}

encode = jax.jit(quantized.encode, static_argnums=0)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that each fills the places of its ring again."""
    monkeypatch.setattr(hopper, "PROGRAMS", 4)


def poison(rows, where):
    """A scale that is no number in every row where it should not be read."""
    return rows._replace(scales=jnp.where(where[..., None], NAN, rows.scales))


def defined(run, q, kept, rest):
    """What the definition makes of the numbers, in the dtype that they are read in."""
    keys, values = kept if len(kept) == 2 else quantized.split(*kept)
    turned = quantized.turned(keys, q)
    out, *others = run(turned, *map(quantized.numbers, kept), *rest)
    return quantized.turned(values, out), *others


def check(operation, arguments, kept, poisoned, races=False, **static):
    """Compares with the definition, which reads no poison."""
    interpret = hopper.plgpu.InterpretGPUParams(detect_races=races)
    named = {"implementation": "mosaic_gpu", "interpret": interpret}
    q, *rest = arguments
    run = functools.partial(operation, sm_scale=0.2, **static)
    found = jax.jit(functools.partial(run, **named))(q, *poisoned, *rest)
    exact = functools.partial(run, implementation="xla")
    expected = jax.jit(functools.partial(defined, exact))(q, kept, rest)
    size = np.maximum(np.linalg.norm(expected[0], axis=-1), 1e-30)
    error = np.linalg.norm(found[0] - expected[0], axis=-1) / size
    assert error.max() < TOLERANCE, error.max()
    assert len(found) == len(expected)
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=4e-6)


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "page_size", "masked"), [("K8V4", 64, False), ("int4", 128, True)]
)
def test_attention_over_listed_pages(name, page_size, masked):
    """Cut pages and an empty list; pages of two blocks, of which rows see their own."""
    ids = [[[4, -1, 0, 2, 1, 3], [-1, 4, -1, 3, -1, -1]]]
    rows = 3 if masked else 1
    at = [[4 * page_size + 5, 2 * page_size, 9 * page_size][:rows]]
    q, pages, ids, at = listed_pages.draw(
        head_dim=D,
        num_pages=5,
        page_size=page_size,
        rows=rows,
        ids=ids,
        positions=at,
        dtype="bfloat16",
    )
    mask = None
    if masked:
        mask = np.random.default_rng(1).random((*ids.shape, rows)) < 0.5
        mask[0, 0, :, 1] = False
        mask = jnp.asarray(mask)
    kept = encode(Layout(FORMATS[name], "bfloat16"), pages)
    # Values of a page that some row sees are read to its end.
    end = -(-(at.max(1) + 1) // BLOCK) * BLOCK - 1
    read = listed_pages.poisoned(jnp.ones((*pages.shape[:4], 1)), ids, end[:, None])
    poisoned = poison(kept, jnp.isnan(read[..., 0]))
    check(
        page_attention,
        (q, ids, at, mask),
        [kept],
        [poisoned],
        races=not masked,
    )


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "slots", "held", "options"),
    [
        ("K8V4", 200, False, {"with_logits": True}),
        ("K4V8", 136, True, {"window": 50, "soft_cap": 2.0}),
    ],
    ids=["logits", "ring"],
)
def test_attention_over_slots(name, slots, held, options):
    """Blocks that no row sees are not read; the last begins in the one before."""
    rng = np.random.default_rng(0)
    at = np.array([[60], [195], [-1]], np.int32)
    batch = len(at)
    q = jnp.asarray(rng.standard_normal((batch, 2, 1, D)), jnp.bfloat16)
    kept = [
        encode(
            Layout((part,), "bfloat16"),
            jnp.asarray(rng.standard_normal((batch, 1, slots, D)), jnp.bfloat16),
        )
        for part in FORMATS[name]
    ]
    unread = np.zeros((batch, 1, slots), bool)
    own = None
    if held:
        own = jnp.asarray(rng.permutation(slots)[None, None] - 20, jnp.int32)
        own = jnp.maximum(own, -1)
    else:
        unread = np.arange(slots) // BLOCK > at[..., None] // BLOCK
    poisoned = [poison(x, unread) for x in kept]
    check(decode_attention, (q, jnp.asarray(at), own), kept, poisoned, **options)


@needs_mosaic
def test_what_float16_cannot_hold_is_its_largest_number():
    """A scale is rounded up, and what its largest code stands for may be beyond."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, *shape, D)), jnp.float16)
        for shape in ((2, 1), (1, BLOCK), (1, BLOCK))
    )
    q = q.at[..., 3].set(2**-14)
    parts = Format(D, 8, D), Format(D, 4, 32)
    kept = [
        encode(Layout((part,), "float16"), x.at[:, :, 5, 3].set(65504))
        for part, x in zip(parts, (k, v), strict=True)
    ]
    for x in kept:
        wide = x._replace(layout=Layout(x.layout.parts, "float32"))
        assert jnp.isinf(quantized.numbers(wide).astype(jnp.float16)).any()
    at = jnp.asarray([[BLOCK - 1]], jnp.int32)
    check(decode_attention, (q, at, None), kept, kept)


def refusal(operation, *arguments):
    run = functools.partial(operation, sm_scale=0.2)
    jax.eval_shape(run, *arguments)
    with pytest.raises(NotImplementedError) as error:
        jax.eval_shape(functools.partial(run, implementation="mosaic_gpu"), *arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("size", "page_size", "bits", "reason"),
    [
        (128, 32, (8, 8), "P=32 of quantised pages must be a multiple of 64"),
        (64, 64, (8, 4), "D=64 must be a multiple of 128 for 4 bits"),
    ],
    ids=["pages", "D"],
)
def test_what_the_kernels_cannot(size, page_size, bits, reason):
    arguments = (
        cases.array(1, 4, 1, size),
        cases.stored(1, 2, 9, page_size, 2 * size, bits=bits),
        cases.array(1, 2, 4, dtype="int32"),
        cases.array(1, 1, dtype="int32"),
    )
    assert reason in refusal(page_attention, *arguments)


def test_groups_are_not_smaller_than_half_a_tile():
    part = Format(D, 4, 16)
    k = encode(Layout((part,), "bfloat16"), jnp.ones((1, 2, 64, D), jnp.bfloat16))
    q, at = jnp.ones((1, 4, 1, D), jnp.bfloat16), jnp.zeros((1, 1), jnp.int32)
    said = refusal(decode_attention, q, k, k, at)
    assert "groups of 16 must be multiples of 32" in said
