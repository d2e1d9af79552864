"""Every token of a row, in slots or in pages: what methods do alike with either store.

Pages carry the extremes of their keys, slots do not.
"""

from collections.abc import Callable
from typing import TypeVar

from jaxtyping import Array, Float, Int

from kvjax.attention.partials import Partial
from kvjax.stores import contiguous, offloaded, paged
from pallas_kernels.shared.quantized import Rows

Store = contiguous.Contiguous | paged.Paged
AnyStore = TypeVar("AnyStore", bound=Store)


def extend(
    store: AnyStore,
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"] | None = None,
) -> AnyStore:
    """Rotates and writes the next tokens of each row; `lengths=None` means all T."""
    return _pick(store, contiguous.extend, paged.extend)(store, k, v, lengths)


def attend_all(
    store: Store, q: Float[Array, "B Hq T D"], positions: Int[Array, "B T"]
) -> Partial:
    """Attends causally from rotated queries at `positions` to every token."""
    return _pick(store, contiguous.attend, paged.attend_all)(store, q, positions)


def views(store: Store) -> tuple[Float[Rows, "B Hkv S D"], Float[Rows, "B Hkv S D"]]:
    """Returns keys and values with every token in the slot of its position."""
    if isinstance(store, paged.Paged):
        return paged.views(store)
    return store.k, store.v


def keys(store: Store) -> Float[Rows, "B Hkv S D"]:
    """Returns the keys, every token's in the slot of its position."""
    return paged.views(store)[0] if isinstance(store, paged.Paged) else store.k


def num_slots(store: Store) -> int:
    """Counts the tokens that a row has room for."""
    if isinstance(store, paged.Paged):
        return store.pages.shape[2] * store.pages.shape[3]
    return store.v.shape[2]


def fetch(
    store: AnyStore, positions: Int[Array, "B H N"]
) -> tuple[AnyStore, Float[Array, "B H N D"], Float[Array, "B H N D"]]:
    """Reads keys and values at `positions`, -1 = anything; H is Hkv, or Hq lists.

    Each is read once, whatever is made of it. What lies in the host's memory, pages or
    values, is brought.

    Returns:
        The store, with what was brought; keys and values.
    """
    batch, lists, size = positions.shape
    merged = positions.reshape(batch, store.spec.num_kv_heads, -1)
    if isinstance(store, paged.Paged):
        store, k, v = paged.fetch(store, merged)
    else:
        keys, k = offloaded.gather(store.k, merged, store.length)
        values, v = offloaded.gather(store.v, merged, store.length)
        store = store._replace(k=keys, v=values)
    k, v = (x.reshape(batch, lists, size, -1) for x in (k, v))
    return store, k, v


def _pick(store: Store, slots: Callable, pages: Callable) -> Callable:
    return pages if isinstance(store, paged.Paged) else slots
