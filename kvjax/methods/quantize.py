"""A transform: the keys and values of a method in 8 or 4 bits."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import choices
from kvjax.attention.typed import lossy, typed
from kvjax.interface import CacheSpec, Method, RewindFn, State, Traffic
from kvjax.stores import buffers
from kvjax.stores.hosted import Hosted
from pallas_kernels.shared import quantized
from pallas_kernels.shared.quantized import (
    SPARE,
    Format,
    Holds,
    Layout,
    Quantized,
    Storage,
    WithNewest,
)

Bits = Literal[8, 4]
Prompt = Literal["exact", "quantized"]

GROUP = 32  # numbers of 4 bits that share a scale, where that divides the head


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`quantize`, the wrapped method among them."""

    method: Method
    keys: Bits
    values: Bits
    group: int | None
    rotate: bool
    prompt: Prompt
    residual: int

    def __post_init__(self) -> None:
        choices.check_choices(self)
        if self.residual < 0:
            raise ValueError(f"residual={self.residual} must be at least 0 tokens.")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1 number.")

    def storage(self, head_dim: int) -> Storage:
        """Returns how keys and values of heads of that size are kept."""
        return Storage(*(self.format(b, head_dim) for b in (self.keys, self.values)))

    def format(self, bits: Bits, head_dim: int) -> Format:
        """Returns the format of a row of a head in so many bits."""
        if bits == 8:
            return Format(head_dim, bits, head_dim, self.rotate)
        group = self.group or math.gcd(GROUP, head_dim)
        if head_dim % 2 or head_dim % group:
            raise ValueError(
                f"{group=} must divide head_dim={head_dim}, which must be even for 4 "
                f"bits: use group={math.gcd(group, head_dim)}, or bits=8."
            )
        return Format(head_dim, bits, group, self.rotate)


@typed
def quantize(
    method: Method,
    *,
    bits: Literal[8, 4] = 8,
    keys: Literal[8, 4] | None = None,
    values: Literal[8, 4] | None = None,
    group: int | None = None,
    rotate: bool = True,
    prompt: Literal["exact", "quantized"] = "exact",
    residual: int = 0,
) -> Method:
    """Keeps the keys and values of `method` in 8 or 4 bits.

    Rows of heads are quantised, keys rotated as `method` caches them. 8 bits are
    symmetric, code * scale, with one scale a token and head: the largest magnitude over
    127. 4 bits are asymmetric, offset + code * scale, with a scale and an offset for
    every `group` numbers: the smallest, and the range over 15. Scales and offsets are
    bfloat16, rounded outwards.

    With `rotate` a row is stored as its Hadamard transform, orthonormal, which spreads
    what stands out in one channel over all. Scores and outputs are those of the row
    itself, but for rounding: queries are transformed, and outputs back.

    Attention reads codes, a block at a time: there is no copy of the cache in floats.
    The prompt is read as `method` reads it, and quantised when it ends; or, with less
    memory and more loss, its tokens are when they come, and later ones read them so.
    What `method` keeps of pages or queries stays in the cache dtype.

    With a `residual`, each query reads so many positions up to its own as they came,
    of what `method` keeps, from a ring beside the codes; of a prompt that is quantised
    as it comes, none. A query more than 16 positions before the newest, as of a long
    window of `retro`, has what the ring still holds. Pages are chosen by what is stored
    of their keys.

    Args:
        method: any whose keys and values stay as they were cached.
        bits: of keys and values.
        keys: bits of keys, where they differ.
        values: bits of values, where they differ.
        group: numbers of 4 bits that share a scale; 32, or less where the head needs
            it, if not given.
        rotate: store every row as its transform.
        prompt: `exact` keeps its tokens as they are until it ends; `quantized` never.
        residual: newest tokens that are read as they came. KIVI: 128.

    Returns:
        A :class:`kvjax.Method` whose state is that of `method`, with
        :class:`pallas_kernels.shared.quantized.Quantized` for keys and values.

    State: that of `method`; a row of a head is D bytes and a scale of 2, or D/2 bytes
        and 4 for every group. A `residual` is residual + 16 rows in the cache dtype,
        each with its position. While an `exact` prompt is read, that of `method`. What
        is appended is kept or evicted as `method` does.
    Reads per step and layer: as `method`, in these bytes instead of the cache dtype's,
        and 2*(residual + 16)*D*Hkv elements.
    Exact when: never; the limit of `method` as scales go to 0.

    Raises:
        ValueError: if `method` is quantised already; from `init`, if a group does not
            divide the head, or `method` moves keys so that they would be quantised
            again and again, or with a `residual` keeps tokens so that the newest cannot
            be told, or is of entmax attention; from `rewind`, for more than 16 tokens.

    Source:
        Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        ICML 2024, arXiv:2402.02750, Sec. 3.1 (the asymmetric quantiser); Ashkboos et
        al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024,
        arXiv:2404.00456, Sec. 4 (Hadamard transforms of keys and values).
    Deviations:
        KIVI groups keys by channel over tokens, up to 128 of which wait in its
        residual; here keys too go by token, so that one can be written or evicted
        alone, and the residual is always full. QuaRot folds the transform of values
        into the weights; here outputs are transformed. Scales are bfloat16, not
        float16. Transforms that choose by importance go inside:
        `quantize+head_budgets+snapkv`.

    Example:
        >>> method = kvjax.quantize(kvjax.quest(budget=256), bits=4)
        >>> state = method.init(spec)
    """
    choices.check_choice("bits", bits, Bits)
    if method.lossy:
        raise ValueError(f"{method} is quantised already: use quantize once.")
    keys, values = keys or bits, values or bits
    options = Options(method, keys, values, group, rotate, prompt, residual)
    made = method._replace(
        init=functools.partial(init, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=False,
    )
    if prompt == "exact":
        made = made._replace(
            init=functools.partial(init_exact, options),
            finish=functools.partial(finish, options),
            exact_prompt=method.exact_prompt,
            importance=None,  # of rows that are not quantised yet
            hooks=method.hooks._replace(seal=None),  # which is of other numbers
        )
    if residual:
        made = made._replace(
            init=functools.partial(init_beside, options),
            finish=functools.partial(finish, options),
            importance=None,  # `finish` is not for others to replace
            listed=None,  # the newest tokens are read beside
            verifies=False,  # a chunk would find other tokens as they came
            rewind=method.rewind and functools.partial(rewind, method.rewind, residual),
        )
    return lossy(made)


def init(options: Options, spec: CacheSpec, weights: Any = None) -> State:
    """Makes the method's state, whose rows are quantised."""
    state = options.method.init(stored(options, spec), weights)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Quantized | Hosted))
    if any(isinstance(leaf, Hosted) for leaf in leaves):
        raise ValueError(
            f"{options.method} has keys and values in the host's memory: put quantize "
            "inside: 'offload+quantize+...'."
        )
    if not any(isinstance(leaf, Quantized) for leaf in leaves):
        raise ValueError(
            f"{options.method} keeps no keys and values that stay as they were cached, "
            "which quantize could store in fewer bits: wrap another method."
        )
    return state


def init_exact(options: Options, spec: CacheSpec, weights: Any = None) -> State:
    """Makes the method's state, once it is known to be one that can be quantised."""
    jax.eval_shape(lambda: init(options, spec))
    return options.method.init(spec, weights)


def init_beside(options: Options, spec: CacheSpec, weights: Any = None) -> State:
    """Makes the method's state, once it is known that its newest tokens can be told."""
    start = init_exact if options.prompt == "exact" else init
    jax.eval_shape(lambda: finish(options, start(options, spec, weights)))
    return start(options, spec, weights)


def finish(options: Options, state: State) -> State:
    """Quantises the rows of the prompt, and lets the method choose among them.

    With a residual, the newest of them stay beside what was chosen as they came.
    """
    is_exact = options.prompt == "exact"
    chosen = options.method.finish(quantised(options, state) if is_exact else state)
    if not options.residual:
        return chosen
    if not getattr(chosen, "KEEPS_NEWEST", False):
        raise ValueError(
            f"residual={options.residual} is for methods that tell tokens by their "
            f"positions, such as full, quest and snapkv; {options.method} keeps a "
            f"{type(chosen).__name__}: use residual=0, or inside of a transform, as in "
            "'dense_layers+quantize:residual=128+quest'."
        )
    return beside(chosen, functools.partial(with_newest, options, state))


def with_newest(
    options: Options, prompt: State, rows: Quantized, holds: Holds
) -> WithNewest:
    """Returns rows with the newest of a prompt, of that kind, as they came beside them.

    With none where the prompt's are quantised already.
    """
    store = getattr(prompt, "store", prompt)
    if (alpha := store.spec.alpha) != 1:  # the method's, which may be its own
        raise ValueError(
            f"residual={options.residual} needs softmax attention, parts of which "
            f"merge, not entmax with {alpha=}: use residual=0."
        )
    (came,) = (getattr(store, name) for name, has in store.ROWS.items() if has == holds)
    size = options.residual + SPARE
    at = jnp.maximum(buffers.newest_positions(store.length, size), -1)
    if isinstance(came, Quantized):
        shape = (*rows.shape[:2], size, rows.shape[-1])
        return WithNewest(
            rows, buffers.allocate(shape, rows.dtype), jnp.full_like(at, -1)
        )
    by_token = came.reshape(*came.shape[:2], -1, came.shape[-1])
    return WithNewest(rows, buffers.gather(by_token, at[:, None]), at)


def beside(state: State, add: Callable[[Quantized, Holds], WithNewest]) -> State:
    """Returns a state whose stores have the newest tokens beside their rows."""
    if isinstance(state, Quantized) or not hasattr(state, "_fields"):
        return state
    rows = getattr(state, "ROWS", {})
    kept = {
        name: add(part, rows[name]) if name in rows else beside(part, add)
        for name, part in state._asdict().items()
    }
    return state._replace(**kept)


def rewind(
    of_method: RewindFn, residual: int, state: State, count: Int[Array, "B"], most: int
) -> State:
    """Takes tokens back; so many that a residual is whole again behind them."""
    if most > SPARE:
        raise ValueError(
            f"{most=} tokens cannot be taken back with {residual=}: at most {SPARE} "
            "can."
        )
    return of_method(state, count, most)


def quantised(options: Options, state: State) -> State:
    """Returns a state with its rows as they are stored: what its stores say are rows.

    A store is a NamedTuple with a `spec`, and its `ROWS` say what the rows of which
    fields are.
    """
    if isinstance(state, CacheSpec):
        return stored(options, state)
    if not isinstance(state, tuple):
        return state
    if not hasattr(state, "_fields"):
        return tuple(quantised(options, part) for part in state)
    store: Any = state  # of any fields
    rows = getattr(store, "ROWS", {})
    kept = {
        name: encoded(options, store.spec, part, rows[name])
        if name in rows
        else quantised(options, part)
        for name, part in store._asdict().items()
    }
    return store._replace(**kept)


def encoded(
    options: Options, spec: CacheSpec, rows: Float[Array, "*B D"], holds: Holds
) -> Quantized:
    """Returns rows of keys, of values, or of both as they are stored."""
    parts = options.storage(spec.head_dim).parts(holds)
    return quantized.encode(Layout(parts, spec.dtype), rows)


def stored(options: Options, spec: CacheSpec) -> CacheSpec:
    """Returns the spec with the storage of its keys and values."""
    return dataclasses.replace(spec, storage=options.storage(spec.head_dim))


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts what the method reads, in the bytes of quantised rows, and the newest."""
    read = options.method.traffic(stored(options, spec), length)
    ring = options.residual + SPARE if options.residual else 0
    return read._replace(kv=read.kv + buffers.vector_bytes(spec, 2 * min(ring, length)))
