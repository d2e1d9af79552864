"""PHD-Transformer: a method for the originals, around which models repeat tokens.

K  copies of a token     J  hidden tokens of one, K - 1
R  tokens in the ring    A  repeated tokens of a call
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax import copies as repeated
from kvjax.attention.partials import Partial, merge, softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import (
    CacheSpec,
    Copies,
    Diagnostics,
    FinishFn,
    Hooks,
    Method,
    PrefillFn,
    State,
    Traffic,
)
from kvjax.stores import buffers, contiguous, paged, slots_or_pages


class PHDState(NamedTuple):
    """State of :func:`phd` for a model that repeats tokens, one layer."""

    spec: CacheSpec
    inner: Any  # the method's: originals alone
    # Hidden tokens of the newest R tokens, token n in slot n % R; keys are rotated.
    ring_k: Float[Array, "B Hkv R J D"]
    ring_v: Float[Array, "B Hkv R J D"]
    length: Int[Array, "B"]
    # The prompt's originals, until it ends, if `inner` has no store of every token.
    store: contiguous.Contiguous | None


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`phd`: the wrapped method."""

    method: Method

    def __post_init__(self) -> None:
        rows = self.method.rows
        if rows != 1:
            raise ValueError(
                f"method.rows={rows} must be 1: {self.method} revises tokens, phd "
                "repeats one."
            )
        if self.method.estimates:
            raise ValueError(
                f"{self.method} estimates what it does not attend to, which no merge "
                "with the hidden tokens can weigh: use a method that reads or leaves "
                "out, such as quest."
            )


@typed
@softmax_only
def phd(method: Method) -> Method:
    """Decodes a model that repeats tokens; `method` keeps the originals alone.

    Such a model feeds K copies of every token and predicts from the last one. The first
    copy, the original, sees originals alone, and is all that the cache keeps: it is a
    token of the vanilla model. The others, hidden tokens, see the originals, the copies
    of their token before them, and in a chunk of C tokens the W hidden tokens before
    those. How many and how far says the model (:class:`kvjax.copies.Copies`).

    To the method the copies of a step are query heads of one row, which share what it
    reads. Hidden tokens are attended to in a ring, and both merge into one softmax. Of
    a prompt only the end is repeated: the last C tokens of each call.

    Args:
        method: for the originals; any that feeds one row a step.

    Returns:
        A :class:`kvjax.Method` over :class:`PHDState`; on a model that repeats nothing
        over the state of `method`, which it then is.

    State: that of `method`; ring k, v `(B, Hkv, R, K-1, D)` cache dtype, R = 1 +
        min(ceil(W/(K-1)), C-1) tokens; and, while the prompt runs, a cache of it if
        `method` has none. What is appended is that of `method`, and the ring's oldest
        goes.
    Reads per step and layer: as `method` with K times the query heads, and
        2*R*(K-1)*D*Hkv elements of the ring, per row.
    Exact when: `method` is: then it is the model as it was trained.

    Raises:
        ValueError: if `method` feeds more rows than one, repeats itself or estimates
            what it does not read; from `init`, if it keeps anything for each query
            head when a prompt has ended.

    Source:
        Wu, Yan, Zhang, Lu, Zeng, Wang, Zhou, "Efficient Pretraining Length Scaling",
        arXiv:2504.14992, Sec. 2.
    Deviations:
        Not stated there and decided here: all copies have their token's position; a
        window counts the hidden tokens before the query, and chunks original tokens; an
        original sees no hidden token. Each call of a prompt repeats its end, as it does
        not know that it is the last. No code was published.

    Example:
        >>> method = kvjax.phd(kvjax.quest(budget=256))
        >>> state = method.init(spec)
    """
    options = Options(method)
    again, hooks = method.reread, method.hooks
    if again:
        again = again._replace(prefill=functools.partial(read_again, again.prefill))
    return Method(
        init=functools.partial(init, options),
        prefill=functools.partial(prefill, options),
        finish=functools.partial(finish, options),
        append=functools.partial(append, options),
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=method.exact_prompt,
        reread=again,
        hooks=Hooks(
            settle=hooks.settle and functools.partial(settle, hooks.settle),
            seal=hooks.seal and functools.partial(seal, hooks.seal),
        ),
        repeats=True,
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> State:
    """Makes the method's state, an empty ring, and a store if the method has none.

    Raises:
        ValueError: if what the method keeps depends on the number of query heads.
    """
    method, copies = options.method, spec.copies
    if copies is None:
        return method.init(spec, weights)
    plain = dataclasses.replace(spec, copies=None)
    check_heads(method, plain, copies, weights)
    inner = method.init(plain, weights)
    shape = spec.batch, spec.num_kv_heads, copies.reach, copies.hidden, spec.head_dim
    return PHDState(
        spec,
        inner,
        buffers.allocate(shape, spec.dtype),
        buffers.allocate(shape, spec.dtype),
        buffers.lengths(spec),
        None if every_token(inner, plain) else contiguous.contiguous(plain),
    )


def check_heads(
    method: Method, plain: CacheSpec, copies: Copies, weights: Any = None
) -> None:
    """Raises ValueError if a prompt that ended is kept head by query head."""

    def shapes(count: int) -> list[tuple[int, ...]]:
        spec = dataclasses.replace(plain, num_q_heads=count * plain.num_q_heads)
        ended = jax.eval_shape(lambda: method.finish(method.init(spec, weights)))
        return [leaf.shape for leaf in jax.tree.leaves(ended)]

    alone, folded = shapes(1), shapes(copies.count)
    if alone != folded:
        one, other = next(
            pair for pair in zip(alone, folded, strict=True) if pair[0] != pair[1]
        )
        heads = plain.num_q_heads
        raise ValueError(
            f"{method} keeps an array for each query head when a prompt has ended: of "
            f"shape {one} with {heads} heads and {other} with {copies.count} copies of "
            f"them ({copies.count * heads}): use a method that keeps KV heads alone."
        )


def prefill(
    options: Options,
    state: State,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[State, Float[Array, "B Hq T D"]]:
    """Reads originals as the method does, and behind them the copies of the call's end.

    Rows are those of :func:`kvjax.copies.called`.
    """
    if not isinstance(state, PHDState):
        return options.method.prefill(state, q, k, v, lengths)
    tokens = copies_of(state).tokens(q.shape[2])
    originals = part(q, k, v, slice(tokens))
    inner, out = options.method.prefill(state.inner, *originals, lengths)
    own = state.store
    if own is not None:
        own = contiguous.extend(own, originals[1], originals[2], lengths)
    index = repeated.tail_index(copies_of(state), tokens, lengths)
    state = state._replace(inner=inner, store=own)
    tail = part(q, k, v, slice(tokens, None))
    state, hidden = read_tail(state, *tail, index, state.length + lengths)
    return state, jnp.concatenate([out, hidden.astype(out.dtype)], axis=2)


def read_tail(
    state: PHDState,
    q: Float[Array, "B Hq N D"],
    k: Float[Array, "B Hkv N D"],
    v: Float[Array, "B Hkv N D"],
    index: Int[Array, "B A"],
    length: Int[Array, "B"],
) -> tuple[PHDState, Float[Array, "B Hq N D"]]:
    """Attends from the hidden tokens of a call's end, and keeps the newest of them.

    Args:
        state: whose stores have the call's originals, and whose ring and length not.
        q, k, v: un-rotated, copy-major: N = (K - 1) * A.
        index: places of the tokens in the call; negative ones are none.
        length: tokens behind the call.
    """
    spec, copies = state.spec, copies_of(state)
    place = jnp.where(index >= 0, state.length[:, None] + index, -1)
    positions = jnp.tile(place, (1, copies.hidden))
    rotated, k = (spec.rope(x, jnp.maximum(positions, 0), length) for x in (q, k))
    store = every_token(state.inner, spec) if state.store is None else state.store
    far = slots_or_pages.attend_all(store, rotated, positions)
    copy = jnp.repeat(jnp.arange(copies.hidden, dtype=jnp.int32), index.shape[1])
    ring_token, ring_copy = ring_order(state)
    near = attend_hidden(
        spec,
        rotated,
        jnp.concatenate([flat(state.ring_k), k], axis=2),
        jnp.concatenate([flat(state.ring_v), v], axis=2),
        copies.sees(
            positions[:, :, None],
            copy[:, None],
            jnp.concatenate([ring_token, positions], axis=1)[:, None],
            jnp.concatenate([ring_copy, copy]),
        ),
    )

    def by_token(x: Float[Array, "B Hkv N D"]) -> Float[Array, "B Hkv A J D"]:
        split = x.reshape(*x.shape[:2], copies.hidden, -1, x.shape[3])
        return split.swapaxes(2, 3).astype(spec.dtype)

    kept = jnp.where(index >= 0, place, length[:, None])  # none behind the end is
    state = state._replace(
        ring_k=buffers.write_newest(state.ring_k, by_token(k), kept, length),
        ring_v=buffers.write_newest(state.ring_v, by_token(v), kept, length),
        length=length,
    )
    return state, merge(far, near).out


def finish(options: Options, state: State) -> State:
    """Ends the prompt as the method does, which then has K times the query heads."""
    if not isinstance(state, PHDState):
        return options.method.finish(state)
    inner = folded(options.method.finish(state.inner), copies_of(state).count)
    return state._replace(inner=inner, store=None)


def append(
    options: Options,
    state: State,
    k: Float[Array, "B Hkv K D"],
    v: Float[Array, "B Hkv K D"],
) -> State:
    """Gives the original of the next token to the method, its copies to the ring."""
    if not isinstance(state, PHDState):
        return options.method.append(state, k, v)
    inner = options.method.append(state.inner, k[:, :, :1], v[:, :, :1])
    position, length = state.length[:, None], state.length + 1
    hidden, slot = k[:, :, 1:], position % copies_of(state).reach
    rotated = state.spec.rope(
        hidden, jnp.broadcast_to(position, (k.shape[0], hidden.shape[2])), length
    )
    is_new = jnp.ones_like(slot, bool)

    def put(ring: Array, rows: Array) -> Array:
        return buffers.write(ring, rows[:, :, None].astype(ring.dtype), slot, is_new)

    return state._replace(
        inner=inner,
        ring_k=put(state.ring_k, rotated),
        ring_v=put(state.ring_v, v[:, :, 1:]),
        length=length,
    )


def inspect_step(
    options: Options, state: State, q: Float[Array, "B Hq K D"]
) -> tuple[State, Float[Array, "B Hq K D"], Diagnostics]:
    """Attends from all copies as the method does, and from hidden ones to the ring.

    Diagnostics are the method's, of its attention to originals, but for the log-sum-exp
    of the last copy, over both.
    """
    if not isinstance(state, PHDState):
        return options.method.inspect_step(state, q)
    spec, copies = state.spec, copies_of(state)
    batch, heads, count, size = q.shape
    # Query head h * K + j is copy j of head h: it reads KV head h // G as h does.
    one_row = q.reshape(batch, heads * count, 1, size)
    inner, out, diagnostics = options.method.inspect_step(state.inner, one_row)
    out = out.reshape(q.shape)
    lse = diagnostics.lse.reshape(q.shape[:3])
    position = (state.length - 1)[:, None]
    rotated = spec.rope(
        q[:, :, 1:], jnp.broadcast_to(position, (batch, copies.hidden)), state.length
    )
    token, copy = ring_order(state)
    own = jnp.arange(copies.hidden, dtype=jnp.int32)
    near = attend_hidden(
        spec,
        rotated,
        flat(state.ring_k),
        flat(state.ring_v),
        copies.sees(position[..., None], own[:, None], token[:, None], copy),
    )
    far = Partial(out[:, :, 1:].astype(jnp.float32), lse[:, :, 1:])
    both = merge(far, near)
    out = jnp.concatenate([out[:, :, :1], both.out.astype(out.dtype)], axis=2)
    attended, exact = diagnostics.attended, diagnostics.exact
    if attended.shape[1] == heads * count:  # a list a query head: the last copy's
        attended = attended[:, count - 1 :: count]
    diagnostics = diagnostics._replace(
        attended=attended,
        lse=both.lse[:, :, -1:],
        exact=exact.reshape(batch, heads, count).all(-1),
    )
    return state._replace(inner=inner), out, diagnostics


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts what the method reads with the heads of all copies, and the ring."""
    copies = spec.copies
    if copies is None:
        return options.method.traffic(spec, length)
    heads = copies.count * spec.num_q_heads
    plain = dataclasses.replace(spec, copies=None, num_q_heads=heads)
    read = options.method.traffic(plain, length)
    ring = buffers.vector_bytes(spec, 2 * copies.reach * copies.hidden)
    return read._replace(kv=read.kv + ring)


# --- what is passed on


def read_again(
    of_method: PrefillFn,
    state: State,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[State, Float[Array, "B Hq T D"]]:
    """Leaves the second reading to the method: originals alone; copies give 0."""
    if not isinstance(state, PHDState):
        return of_method(state, q, k, v, lengths)
    tokens = copies_of(state).tokens(q.shape[2])
    originals = part(q, k, v, slice(tokens))
    inner, out = of_method(state.inner, *originals, lengths)
    hidden = jnp.zeros_like(q[:, :, tokens:])
    return state._replace(inner=inner), jnp.concatenate([out, hidden], axis=2)


def settle(
    of_method: Callable[..., tuple[State, ...]], states: tuple[State, ...]
) -> tuple[State, ...]:
    """Lets the method decide over its own states of all layers."""
    settled = of_method(
        tuple(s.inner if isinstance(s, PHDState) else s for s in states)
    )
    return tuple(
        before._replace(inner=after) if isinstance(before, PHDState) else after
        for before, after in zip(states, settled, strict=True)
    )


def seal(of_method: FinishFn, state: State) -> State:
    """Seals what the method has of a prompt."""
    if not isinstance(state, PHDState):
        return of_method(state)
    return state._replace(inner=of_method(state.inner))


# --- copies and the ring


def copies_of(state: PHDState) -> Copies:
    """Returns the model's copies, which such a state is made for."""
    copies = state.spec.copies
    if copies is None:
        raise ValueError(f"{state.spec=} has no copies: it is no spec of phd's state.")
    return copies


def part(q: Array, k: Array, v: Array, rows: slice) -> tuple[Array, Array, Array]:
    """Returns some rows of queries, keys and values."""
    return q[:, :, rows], k[:, :, rows], v[:, :, rows]


def every_token(state: State, spec: CacheSpec) -> Any:
    """Returns the store of every token that a state is, or has in it; None if none."""
    if isinstance(state, contiguous.Contiguous | paged.Paged):
        sizes = state.spec.capacity, state.spec.num_kv_heads
        return state if sizes == (spec.capacity, spec.num_kv_heads) else None
    if not hasattr(state, "_fields"):
        return None
    found = (every_token(part, spec) for part in state)
    return next((store for store in found if store is not None), None)


def folded(state: State, count: int) -> State:
    """Returns a state whose specs have so many times the query heads."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, CacheSpec):
            return leaf
        return dataclasses.replace(leaf, num_q_heads=count * leaf.num_q_heads)

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, CacheSpec))


def flat(ring: Float[Array, "B Hkv R J D"]) -> Float[Array, "B Hkv N D"]:
    """Returns the ring as rows, token by token."""
    return ring.reshape(*ring.shape[:2], -1, ring.shape[4])


def ring_order(state: PHDState) -> tuple[Int[Array, "B N"], Int[Array, "N"]]:
    """Returns the token, negative for none, and the copy in each row of the ring."""
    copies = copies_of(state)
    token = buffers.newest_positions(state.length, copies.reach)
    copy = jnp.tile(jnp.arange(copies.hidden, dtype=jnp.int32), copies.reach)
    return jnp.repeat(token, copies.hidden, axis=1), copy


def attend_hidden(
    spec: CacheSpec,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv N D"],
    v: Float[Array, "B Hkv N D"],
    visible: Bool[Array, "B T N"],
) -> Partial:
    """Attends to few keys under a mask; a row that sees none is the empty set."""
    grouped = q.reshape(q.shape[0], spec.num_kv_heads, -1, *q.shape[2:])
    wide = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum("bhgtd,bhnd->bhgtn", grouped, k, **wide) * spec.sm_scale
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    out = jnp.einsum("bhgtn,bhnd->bhgtd", weights.astype(v.dtype), v, **wide)
    return Partial(out.reshape(q.shape), lse.reshape(q.shape[:3]))
