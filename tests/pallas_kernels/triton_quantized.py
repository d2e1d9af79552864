"""Triton kernels over caches in 8 and 4 bits, in Triton's interpreter; in a process of
its own, as `triton_interpreted.py`.

What they make of codes is what float64 loops, or the definition, make of their numbers.
"""

import functools

import jax
import jax.numpy as jnp
import listed_pages
import numpy as np
import oracles
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_attention import Surrogate, page_attention
from pallas_kernels.page_attention import triton as page_attention_triton
from pallas_kernels.page_entmax import page_entmax
from pallas_kernels.shared import quantized
from pallas_kernels.shared.quantized import Format, Layout

pytest_plugins = ("interpreting",)

D, BLOCK = 32, 16  # numbers of a head; tokens of a block, of float32
# Relative error of a row, three times the largest seen.
TOLERANCE = {"float32": 4e-6, "bfloat16": 8e-3}
NAN = 0x7FC0  # as a scale
# Of keys, of values: (bits, group, turned).
FORMATS = {
    "int8": ((8, D, False), (8, D, False)),
    "K8V4": ((8, D, True), (4, 8, False)),
    "K4V8": ((4, 16, False), (8, D, True)),
    "int4": ((4, 8, True), (4, 8, True)),
}

triton = {"implementation": "triton", "interpret": True}
encode = jax.jit(quantized.encode, static_argnums=0)
floats = jax.jit(quantized.floats)


def store(rows, *formats):
    parts = [Format(D, bits, group, turned) for bits, group, turned in formats]
    return encode(Layout(tuple(parts), rows.dtype.name), rows)


def poison(rows, where):
    """A scale that is no number in every row where it should not be read."""
    return rows._replace(scales=jnp.where(where[..., None], NAN, rows.scales))


def draw_pages(name, **sizes):
    """A problem of listed pages, stored with poison, and again in numbers."""
    q, pages, ids, at = listed_pages.draw(head_dim=D, **sizes)
    kept = store(pages, *FORMATS[name])
    read = listed_pages.poisoned(jnp.ones((*pages.shape[:4], 1)), ids, at)
    stored = poison(kept, jnp.isnan(read[..., 0]))
    return (q, stored, ids, at), (q, floats(kept), ids, at)


@pytest.mark.parametrize(
    ("name", "splits", "dtype"),
    [
        ("int8", 1, "float32"),
        ("K8V4", 3, "float32"),
        ("K4V8", 3, "float32"),
        ("int4", 1, "bfloat16"),
    ],
    indirect=["splits"],
)
@pytest.mark.usefixtures("splits")
def test_attention_over_listed_pages(name, dtype):
    """Ragged lists, cut pages; what no row sees is not read."""
    stored, numbers = draw_pages(
        name, ids=listed_pages.IDS, positions=[141, 30], dtype=dtype
    )
    found = jax.jit(functools.partial(page_attention, sm_scale=0.4, **triton))(*stored)
    listed_pages.assert_close(found, numbers, TOLERANCE[dtype], 0.4)


@pytest.mark.usefixtures("eager")
def test_a_cache_of_more_than_2_to_the_31_bytes():
    """They are never touched but for two pages, 2**31 bytes apart."""
    q, pages, ids, _ = listed_pages.draw(
        head_dim=D, ids=[[[1, 0]]], positions=[0], heads=(2, 1), page_size=64
    )
    kept = store(pages, *FORMATS["K8V4"])
    last = 2**31 // kept.codes[0, 0, 0].size + 5

    def apart(x):
        held = np.zeros((1, 1, last + 1, *x.shape[3:]), x.dtype)
        held[0, 0, [2, last]] = x[0, 0, :2]
        return held

    out, lse = page_attention_triton.page_attention(
        *(q, jax.tree.map(apart, kept), jnp.array([[[last, 2]]])),
        jnp.array([[last * 64 + 63]]),
        sm_scale=0.4,
        interpret=True,
    )
    problem = q, floats(kept), ids, np.array([[127]])
    listed_pages.assert_close((out, lse), problem, 4e-6, 0.4)


@pytest.mark.parametrize("splits", [3], indirect=True)
@pytest.mark.parametrize("name", ["K8V4", "K4V8"])
@pytest.mark.usefixtures("splits")
def test_weights_of_two_kinds_from_one_read(name):
    """From where other tokens left it; a list for a query head; masks; another sum."""
    first = 21
    ids = np.array([[[0, 1, 2, 3], [3, 1, -1, -1], [-1, 0, -1, 2], [-1] * 4]])
    stored, numbers = draw_pages(name, rows=3, ids=ids, positions=[[20, 17, 60]])
    mask = np.random.default_rng(1).random((*ids.shape, 3)) < 0.8
    initial, surrogate = oracles.beside(numbers)
    run = functools.partial(page_attention, sm_scale=0.4, first_position=first)
    out, lse, taken, mass = jax.jit(functools.partial(run, **triton))(
        *stored, jnp.asarray(mask), initial=initial, surrogate=Surrogate(*surrogate)
    )
    inputs = [np.asarray(x, np.float64) for x in numbers[:2]]
    inputs += [np.asarray(x) for x in (*numbers[2:], mask)]
    expected = oracles.page_attention(
        *inputs, sm_scale=0.4, initial=initial, first_position=first
    )
    size = np.maximum(np.linalg.norm(expected[0], axis=-1), 1e-30)
    assert (np.linalg.norm(out - expected[0], axis=-1) / size).max() < 4e-6
    np.testing.assert_allclose(lse, expected[1], rtol=1e-6, atol=4e-6)
    wanted, total = oracles.page_weighed(*inputs, surrogate, first)
    np.testing.assert_allclose(mass, total, rtol=3e-6)
    unit = np.abs(wanted).max()
    np.testing.assert_allclose(taken, wanted, rtol=0, atol=3e-6 * unit)


@pytest.mark.parametrize("splits", [3], indirect=True)
@pytest.mark.parametrize(("name", "tau"), [("K8V4", None), ("K4V8", 0.3)])
@pytest.mark.usefixtures("splits")
def test_entmax_over_listed_pages(name, tau):
    stored, numbers = draw_pages(name, ids=listed_pages.IDS, positions=[141, 30])
    if tau is not None:
        tau = np.full(numbers[0].shape[:3], tau, np.float32)
    run = functools.partial(page_entmax, sm_scale=0.4, alpha=1.5, **triton)
    found = jax.jit(run)(*stored, None, tau)
    listed_pages.assert_close(found, numbers, 2e-5, sm_scale=0.4, alpha=1.5, tau=tau)


@pytest.mark.parametrize(
    ("name", "splits", "slots", "positions", "held", "options"),
    [
        # A row that sees nothing, cut blocks, all slots.
        ("int8", 1, 77, [[-1], [29], [76], [99]], None, {"with_logits": False}),
        # More rows than a program takes, each with another end and another beginning.
        ("K8V4", 3, 100, [np.arange(55, 95)], None, {"window": 23}),
        ("K4V8", 3, 77, [[60, 3], [20, 40]], (1, 2), {"soft_cap": 3.0}),
        ("int4", 1, 50, [[60, 3], [20, 40]], (2, 1), {"window": 20}),
        ("K8V4", 3, 77, [[60, 3], [20, 40]], None, {"window": 9, "soft_cap": 2.0}),
    ],
    ids=["ends", "prompt", "ring", "ring-window", "window-cap"],
    indirect=["splits"],
)
@pytest.mark.usefixtures("splits")
def test_attention_over_slots(name, slots, positions, held, options):
    """And its logits; values of blocks before a window and behind the end not read."""
    rng = np.random.default_rng(0)
    at = np.asarray(positions, np.int32)
    batch, rows = at.shape
    q = jnp.asarray(rng.standard_normal((batch, 4, rows, D)), jnp.float32)
    own = np.arange(slots)[None, None]
    if held is not None:
        own = rng.integers(-1, slots, (*held, slots), np.int32)
        held = jnp.asarray(own)
    first, last = (x[:, None, None] for x in (at.min(1), at.max(1)))
    oldest = np.maximum(first - options.get("window", 1000) + 1, 0)
    shape = batch, 2, slots
    unread = (own < 0) | (own > last)
    unseen = np.broadcast_to(unread | (own < oldest), shape)
    if held is None:
        unread = unread | (own < oldest // BLOCK * BLOCK)
    unread = np.broadcast_to(unread, shape)
    kept = [
        store(jnp.asarray(rng.standard_normal((*shape, D)), jnp.float32), kind)
        for kind in FORMATS[name]
    ]
    stored = [poison(x, where) for x, where in zip(kept, (unseen, unread), strict=True)]
    attend = functools.partial(decode_attention, sm_scale=0.4)
    options = {"with_logits": True} | options
    expected = attend(q, *map(floats, kept), jnp.asarray(at), held, **options)
    run = jax.jit(functools.partial(attend, **options, **triton))
    found = run(q, *stored, jnp.asarray(at), held)
    size = np.maximum(np.linalg.norm(expected[0], axis=-1), 1e-30)
    assert (np.linalg.norm(found[0] - expected[0], axis=-1) / size).max() < 4e-6
    assert len(found) == len(expected) == 2 + options["with_logits"]
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=4e-6, atol=4e-6)


def test_what_float16_cannot_hold_is_its_largest_number():
    """A scale is rounded up, and what its largest code stands for may be beyond."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, *shape, D)), jnp.float16)
        for shape in ((2, 1), (1, BLOCK), (1, BLOCK))
    )
    q = q.at[..., 3].set(2**-14)
    kept = [
        store(x.at[:, :, 5, 3].set(65504), kind)
        for x, kind in zip((k, v), ((8, D, False), (4, 8, False)), strict=True)
    ]
    # The interpreter's operands are float32, which does not round them otherwise.
    wide = [floats(x._replace(layout=Layout(x.layout.parts, "float32"))) for x in kept]
    assert all(x.max() > 65520 for x in wide)  # what becomes an infinity
    at = jnp.asarray([[BLOCK - 1]], jnp.int32)
    attend = functools.partial(decode_attention, sm_scale=0.4)
    expected = attend(
        q.astype(jnp.float32), *(jnp.minimum(x, 65504.0) for x in wide), at
    )
    found = jax.jit(functools.partial(attend, **triton))(q, *kept, at)
    size = np.linalg.norm(expected[0], axis=-1)
    assert (np.linalg.norm(found[0] - expected[0], axis=-1) / size).max() < 4e-6
    np.testing.assert_allclose(found[1], expected[1], rtol=4e-6, atol=4e-6)
