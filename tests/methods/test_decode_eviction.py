"""Generated tokens are evicted too, whenever budget + every slots are full."""

import drive
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import kvjax
from kvjax import accounting
from kvjax.methods.decode_eviction import decode_eviction
from kvjax.methods.h2o import h2o
from kvjax.methods.quest import quest
from kvjax.methods.snapkv import snapkv
from kvjax.rope import Rope
from kvjax.stores.buffers import kv_bytes

SNAPKV = {"window": 3, "kernel": 3, "pooling": "max", "group_reduce": "max"}
BUDGET, EVERY = 7, 4


def made(every=EVERY, **options):
    return decode_eviction(snapkv(budget=BUDGET, **(SNAPKV | options)), every=every)


@pytest.mark.parametrize(
    ("heads", "every", "options"),
    [
        ((4, 2), 4, {}),
        ((4, 1), 3, {"pooling": "mean", "group_reduce": "mean", "kernel": 5}),
    ],
)
def test_equals_float64_loops(heads, every, options):
    """Prompts below, at and above the budget: rows evict at steps of their own."""
    stream = drive.make_stream((1, 6, 7, 8, 30), 16, heads=heads)
    spec = drive.make_spec(stream)
    run = drive.run(made(every, **options), spec, stream)
    given = SNAPKV | options
    drive.assert_matches(
        run, stream, oracles.decode_eviction, budget=BUDGET, every=every, **given
    )
    sizes = (run.diagnostics.attended >= 0).sum(-1)
    assert sizes.max() == BUDGET + every
    assert (np.diff(sizes[:, 4, 0]) == 1 - every).sum() == 15 // every


def test_what_scores_by_keys_alone_is_evicted_too():
    """The norms of keys: no queries, and the lowest stay (of importance any rule)."""
    stream = drive.make_stream((12,), 9)
    inner = snapkv(budget=BUDGET, **SNAPKV)

    def importance(state):
        store = state.store
        slots = jnp.arange(store.k.shape[2], dtype=jnp.int32)
        norms = -jnp.linalg.norm(store.k, axis=-1)
        return jnp.where(slots < store.length[:, None, None], norms, -np.inf)

    method = decode_eviction(inner._replace(importance=importance), every=EVERY)
    run = drive.run(method, drive.make_spec(stream), stream)
    for head in range(2):
        norms = np.linalg.norm(stream.k[0, head].astype(np.float64), axis=-1)
        kept = set(np.argsort(norms[:12], kind="stable")[:BUDGET].tolist())
        for i in range(9):
            kept.add(12 + i)
            listed = {p for p in run.diagnostics.attended[i, 0, head] if p >= 0}
            assert listed == kept
            if len(kept) == BUDGET + EVERY:
                kept = set(sorted(kept, key=norms.__getitem__)[:BUDGET])


def test_keys_are_rotated_where_they_stand_under_frequencies_that_stretch():
    """As the method alone rotates them, until something is evicted."""
    rope = Rope(8, theta=100.0, kind="dynamic", factor=4.0, original_context=8)
    stream = drive.make_stream((14,), 4)
    spec = drive.make_spec(stream, rope=rope)
    expected = drive.run(snapkv(budget=BUDGET, **SNAPKV), spec, stream)
    found = drive.run(made(), spec, stream)
    np.testing.assert_allclose(found.out, expected.out, rtol=1e-5, atol=1e-6)


def test_memory_is_fixed_whatever_is_generated():
    stream = drive.make_stream((40,), 5, heads=(4, 2))
    method = made()
    sizes = [
        accounting.state_bytes(
            method, drive.make_spec(stream, capacity, max_new_tokens=new)
        )
        for capacity, new in ((64, 5), (640, 500))
    ]
    assert sizes[0] == sizes[1]
    spec = drive.make_spec(stream)
    read = method.traffic(spec, 40)
    slots = BUDGET + EVERY
    assert read.kv == kv_bytes(spec, slots)
    assert read.metadata == -(-kv_bytes(spec, slots) // 2 // EVERY)
    queries = 4 * 3 * 8 * 4
    step = 2 * 2 * 8 * 4
    held = kv_bytes(spec, slots) + 4 * 2 * slots + queries + step + 2 * 4
    assert accounting.state_bytes(method, spec) == held


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_value_or_the_fix():
    spec = drive.make_spec(drive.make_stream((4,), 1))
    with pytest.raises(ValueError, match="every=0 must be at least 1 token"):
        decode_eviction(snapkv(), every=0)
    with pytest.raises(
        ValueError,
        match=r"which quest:.* does not tell: wrap .*decode_eviction.snapkv'",
    ):
        decode_eviction(quest())
    with pytest.raises(ValueError, match="every=8 must be at least 32, the window"):
        kvjax.parse("decode_eviction:every=8+snapkv").init(spec)
    heavy = h2o()._replace(importance=lambda state: state.scores)
    with pytest.raises(ValueError, match="scores by scores of a whole prompt, which"):
        decode_eviction(heavy).init(spec)
