"""Places in a cache: cut, joined and turned, against lists."""

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles

from kvjax.interface import CacheSpec
from kvjax.rope import Rope
from kvjax.stores import places

SPEC = CacheSpec(3, 4, 2, 6, 40, "float32", Rope(6))
SLOTS, MOST = 9, 5


def test_cuts_and_joins_are_those_of_lists():
    """Ragged rows, some not due; equal scores go to the earlier token."""
    rng = np.random.default_rng(0)
    held, lists = places.empty(SPEC, SLOTS), [[], [], []]
    drawn = rng.standard_normal((2, 3, 2, 60, 6)).astype(np.float32)
    seen = np.zeros(3, np.int32)
    cut, join = jax.jit(places.cut, static_argnums=2), jax.jit(places.join)
    for turn in range(8):
        scores = rng.integers(0, 4, (3, 1, SLOTS)).astype(np.float32)
        is_due = np.array([True, turn % 2 == 0, turn > 3])
        before = held
        held = cut(held, scores, MOST, is_due)
        for b in range(3):
            if not is_due[b]:
                for old, new in zip(before, held, strict=True):
                    np.testing.assert_array_equal(new[b], old[b])
                continue
            of_slot = {i: scores[b, 0, i] for i in range(len(lists[b]))}
            lists[b] = [lists[b][i] for i in sorted(oracles.best(of_slot, MOST))]
        room = np.array([SLOTS - len(own) for own in lists])
        count = np.minimum(rng.integers(0, 5, 3), room).astype(np.int32)
        new = (
            np.stack([x[b, :, seen[b] : seen[b] + 4] for b in range(3)]) for x in drawn
        )
        held = join(held, *new, seen, count)
        for b in range(3):
            lists[b] += range(seen[b], seen[b] + count[b])
        seen = seen + count
        np.testing.assert_array_equal(
            places.num_held(held.positions), [*map(len, lists)]
        )
        for b, own in enumerate(lists):
            size = len(own)
            assert held.positions[b, 0, :size].tolist() == own
            assert (held.positions[b, 0, size:] == -1).all()
            slots = places.held_slots(held.positions)[b, 0].tolist()
            assert slots == [*range(size), *[-1] * (SLOTS - size)]
            for mine, x in zip(held, drawn, strict=False):
                np.testing.assert_array_equal(mine[b, :, :size], x[b][:, own])
    assert seen.min() > SLOTS


def test_settled_tokens_go_on_at_the_next_place():
    """Turned at their slots, once; what comes later too, and attends to all before."""
    stream = drive.make_stream((7, 3, 0), 2, head_dim=6)
    held = places.empty(SPEC, SLOTS)
    first = jnp.array([4, 0, 0], jnp.int32)  # in the text: four tokens were cut before
    _, k, v, lengths = drive.chunk(stream, [0] * 3, [7, 3, 0], size=7)
    held = places.join(held, k, v, first, lengths)
    settled = places.settle(SPEC, held, first + lengths, SLOTS + 4)
    more = drive.chunk(stream, [7, 3, 0], [2, 1, 2], size=3)
    settled = places.extend(settled, *more[1:])
    out, lse = jax.jit(places.attend_settled)(settled, more[0], more[3])
    for b, (start, count) in enumerate([(7, 2), (3, 1), (0, 2)]):
        used = start + count
        assert int(settled.used[b]) == used
        assert int(settled.length[b]) == first[b] + used
        listed = settled.positions[b, 0].tolist()
        assert listed[:used] == list(range(first[b], first[b] + used))
        keys = np.array(
            [
                [oracles.rotate(x, i) for i, x in enumerate(h[:used])]
                for h in stream.k[b]
            ]
        )
        np.testing.assert_allclose(settled.k[b, :, :used], keys, atol=2e-6)
        for t in range(count):
            for head in range(4):
                query = oracles.rotate(stream.q[b, head, start + t], start + t)
                seen = start + t + 1
                wanted, total, _ = oracles.softmax_attention(
                    query, keys[head // 2, :seen], stream.v[b, head // 2, :seen]
                )
                drive.assert_rows_close(out[b, head, t], wanted)
                np.testing.assert_allclose(lse[b, head, t], total, atol=1e-5)
    one = drive.chunk(stream, [0] * 3, [1] * 3, size=1)
    longer = places.extend(settled, *one[1:3])
    np.testing.assert_array_equal(longer.used, settled.used + 1)
    np.testing.assert_array_equal(
        longer.positions[jnp.arange(3), 0, settled.used], settled.length
    )
