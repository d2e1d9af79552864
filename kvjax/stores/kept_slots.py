"""A cache of the tokens that were chosen, in slots of their own for each KV head."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.interface import CacheSpec, Method
from kvjax.stores import buffers, contiguous
from pallas_kernels.shared.quantized import Holds, Rows, every_token


class Kept(NamedTuple):
    """A chosen few tokens of a row, each with the position it came from."""

    spec: CacheSpec
    k: Float[Rows, "B Hkv N D"]  # rotated at absolute positions
    v: Float[Rows, "B Hkv N D"]
    positions: Int[Array, "B H N"]  # -1 = empty; H is Hkv, or 1 if all heads agree
    length: Int[Array, "B"]  # tokens seen, not slots used

    ROWS = buffers.KEYS_AND_VALUES
    KEEPS_NEWEST = True


def take(
    store: contiguous.Contiguous, positions: Int[Array, "B H N"], spare: int = 0
) -> Kept:
    """Copies the tokens at `positions` (-1 = none) out of `store`.

    `spare` empty slots follow for tokens to come.
    """

    def copy(
        buffer: Float[Rows, "B Hkv S D"], holds: Holds
    ) -> Float[Rows, "B Hkv N D"]:
        taken = buffers.take(buffer, positions)
        if not spare:
            return taken
        free = buffers.allocate_rows(store.spec, (*taken.shape[:2], spare), holds)
        return buffers.joined([taken, free], axis=2)

    padding = ((0, 0), (0, 0), (0, spare))
    padded = jnp.pad(positions, padding, constant_values=-1)
    k, v = copy(store.k, "keys"), copy(store.v, "values")
    return Kept(store.spec, k, v, padded, store.length)


@functools.cache
def budget_of(method: Method, spec: CacheSpec) -> int:
    """Returns the tokens of a prompt that a method keeps for each KV head.

    Of methods that keep every later token too, in slots behind these.

    Raises:
        ValueError: if the method is no such one.
    """
    state = jax.eval_shape(lambda: method.finish(method.init(spec)))
    if not isinstance(state, Kept):
        raise ValueError(
            f"a method whose state becomes {type(state).__name__} does not keep a "
            "number of the prompt's tokens for each KV head: use snapkv."
        )
    return state.positions.shape[-1] - spec.max_new_tokens


def spec_of(method: Method, spec: CacheSpec) -> CacheSpec:
    """Returns the spec of what a method keeps, which may be another than it is given.

    Of methods that :func:`budget_of` takes.
    """
    return jax.eval_shape(lambda: method.finish(method.init(spec))).spec


def num_kept(kept: Kept) -> Int[Array, "B"]:
    """Counts the slots in use, the same for every head."""
    return (kept.positions[:, 0] >= 0).sum(-1, dtype=jnp.int32)


def next_slot(kept: Kept, victim: Int[Array, "B H"]) -> Int[Array, "B H"]:
    """Returns the first empty slot, or that of the `victim` where none is left."""
    used = num_kept(kept)[:, None]
    return jnp.where(used < kept.positions.shape[-1], used, victim)


def write(
    kept: Kept,
    slots: Int[Array, "B H"],
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
) -> Kept:
    """Writes the next token of each row into `slots`, over whatever was there."""
    length = kept.length + 1
    position = kept.length[:, None]
    k = kept.spec.rope(k, position, length)
    heads = k.shape[1]
    where = jnp.broadcast_to(slots[..., None], (*slots.shape[:1], heads, 1))
    valid = jnp.ones_like(where, bool)
    held = slots.shape[1]
    fresh = jnp.broadcast_to(position[..., None], (*slots.shape, 1))

    def put(buffer: Float[Rows, "B Hkv N D"], row: Float[Array, "B Hkv 1 D"]) -> Any:
        written = buffers.write(every_token(buffer), row, where, valid)
        is_real = jnp.ones_like(position, bool)
        return buffers.keep_newest(buffer, written, row, position, is_real)

    return kept._replace(
        k=put(kept.k, k),
        v=put(kept.v, v),
        positions=buffers.write(
            kept.positions, fresh, slots[..., None], valid[:, :held]
        ),
        length=length,
    )


def holds_all(
    attended: Int[Array, "B H N"], length: Int[Array, "B"], num_q_heads: int
) -> Bool[Array, "B Hq"]:
    """Says of every head whether its list of distinct positions has every token.

    H divides `num_q_heads`.

    What :class:`kvjax.interface.Diagnostics` calls exact, for methods with no better
    proof than having attended to everything.
    """
    count = (attended >= 0).sum(-1, dtype=jnp.int32)
    return jnp.repeat(count == length[:, None], num_q_heads // count.shape[1], axis=1)


def turns_alike(spec: CacheSpec, length: Int[Array, "B"]) -> Bool[Array, "B 1"]:
    """Rows whose keys, rotated now, are those rotated when they came.

    Not beyond the original context under `dynamic` RoPE, whose frequencies go with the
    length: :func:`kvjax.full` keeps keys as they were rotated, and a method that
    rotates them anew is then another model, however many tokens it keeps.
    """
    until = getattr(spec.rope, "static_until", math.inf)  # of a function there is none
    if math.isinf(until):
        return jnp.ones_like(length, bool)[:, None]
    return (length <= int(until))[:, None]
