"""A transform: the KV heads of a layer share one budget, by importance (AdaKV)."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import Partial, softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import (
    CacheSpec,
    Diagnostics,
    ImportanceFn,
    Method,
    State,
    Traffic,
)
from kvjax.stores import buffers, contiguous, kept_slots, step
from pallas_kernels.decode_attention import decode_logits, weighted_values
from pallas_kernels.shared.quantized import Holds, Rows


class SharedSlots(NamedTuple):
    """State of :func:`head_budgets` while decoding, one layer.

    N slots, of all KV heads together: Hkv * budget of the prompt, then Hkv for each
    token to come.
    """

    spec: CacheSpec
    k: Float[Rows, "B 1 N D"]  # rotated at absolute positions
    v: Float[Rows, "B 1 N D"]
    heads: Int[Array, "B 1 N"]  # the KV head that the slot is of
    positions: Int[Array, "B 1 N"]  # -1 = empty
    length: Int[Array, "B"]  # tokens seen, not slots used

    HEADS_TOGETHER = True


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`head_budgets`, the wrapped method among them."""

    method: Method
    importance: ImportanceFn  # the method's
    alpha: float


@typed
@softmax_only
def head_budgets(method: Method, *, alpha: float = 0.2) -> Method:
    """Shares one budget among the KV heads of a layer, by importance (AdaKV).

    Some heads look at a few tokens, others at many. Where `method` keeps its `budget`
    most important tokens for each KV head, this keeps the Hkv * budget most important
    of all heads together, and for each head its floor(alpha * budget) best at least.
    Ties go to the lower head, then to the lower position. Generated tokens are kept,
    by every head.

    The heads' tokens lie in one buffer, without padding: the memory of a head that
    keeps less is really another's. A step reads the buffer once; each query head's
    logits of others' slots are computed too and thrown away, which is Hkv times the
    multiplications of `method`.

    Args:
        method: scores a prompt's tokens (`Method.importance`), as :func:`kvjax.snapkv`.
        alpha: share of its even budget that a head keeps at least; 1 is `method`.
            Paper: 0.2.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`SharedSlots` after `finish`.

    State: k, v `(B, 1, Hkv*(budget + max_new_tokens), D)` cache dtype; of each slot its
        head and position, int32. While the prompt runs: that of `method`.
    Reads per step and layer: 2*(budget + generated)*D*Hkv elements of KV, a head and a
        position of each token, per row.
    Exact when: budget >= prompt length.

    Raises:
        ValueError: unless 0 <= alpha <= 1, and `method` keeps the most important tokens
            of a prompt, a number for each KV head.

    Source:
        Feng, Lv, Cao, Xie, Zhou, "Ada-KV: Optimizing KV Cache Eviction by Adaptive
        Budget Allocation for Efficient LLM Inference", NeurIPS 2025, arXiv:2407.11550,
        Alg. 1 and 2.
    Deviations:
        The safeguard is a floor, as in NVIDIA's kvpress: a head's best come first, the
        rest of the budget goes to the best of all. The paper counts each head's share
        of the best of all, and mixes the counts with the even budget. The number of
        tokens is the same.

    Example:
        >>> method = kvjax.head_budgets(kvjax.snapkv(budget=256))
        >>> state = method.init(spec)
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"{alpha=} must be in [0, 1], a share of the even budget.")
    if method.importance is None or method.rows != 1:
        raise ValueError(
            "head_budgets ranks a prompt's tokens by their importance, which "
            f"{method.spec_text()} does not tell: wrap a method that does, with "
            "transforms outside, as in 'layer_budgets+head_budgets+snapkv'."
        )
    options = Options(method, method.importance, alpha)
    return Method(
        init=functools.partial(init, options),
        prefill=method.prefill,
        finish=functools.partial(finish, options),
        append=append,
        inspect_step=inspect_step,
        traffic=functools.partial(traffic, options),
        exact_prompt=method.exact_prompt,
        reread=method.reread,
    )


def init(options: Options, spec: CacheSpec, weights: State = None) -> State:
    """Makes the method's state, once it is known to keep a number for each head."""
    kept_slots.budget_of(options.method, spec)
    return options.method.init(spec, weights)


def finish(options: Options, state: State) -> SharedSlots:
    """Keeps the most important tokens of all heads, and of each its best."""
    store: contiguous.Contiguous = state.store
    spec = store.spec
    batch, heads, capacity, _ = store.k.shape
    budget = kept_slots.budget_of(options.method, spec)
    scores = options.importance(state)
    is_held = jnp.arange(capacity, dtype=jnp.int32) < store.length[:, None, None]
    if floor := int(options.alpha * budget):
        # Alg. 2's safeguard: no head is left without its own best.
        own = selection.top_slots(scores, floor, is_held)
        is_own = selection.is_listed(own, capacity)
        scores = jnp.where(is_own, jnp.inf, scores)
    # Alg. 1: the best of Cat({A_i}), whichever head's they are.
    whole = (batch, 1, heads * capacity)
    is_held = jnp.broadcast_to(is_held, scores.shape).reshape(whole)
    chosen = selection.top_slots(scores.reshape(whole), heads * budget, is_held)
    chosen = selection.in_order(chosen)
    spare = heads * spec.max_new_tokens

    def copy(buffer: Float[Rows, "B Hkv S D"], holds: Holds) -> Float[Rows, "B 1 N D"]:
        of_all = jax.tree.map(lambda x: x.reshape(*whole, x.shape[-1]), buffer)
        taken = buffers.take(of_all, chosen)
        free = buffers.allocate_rows(spec, (batch, 1, spare), holds)
        return buffers.joined([taken, free], axis=2)

    to_come = jnp.arange(spare, dtype=jnp.int32) % heads
    to_come = jnp.broadcast_to(to_come, (batch, 1, spare))
    positions = jnp.where(chosen < 0, -1, chosen % capacity)
    return SharedSlots(
        spec,
        copy(store.k, "keys"),
        copy(store.v, "values"),
        jnp.concatenate([jnp.maximum(chosen, 0) // capacity, to_come], axis=2),
        jnp.concatenate([positions, jnp.full_like(to_come, -1)], axis=2),
        store.length,
    )


def append(
    state: SharedSlots, k: Float[Array, "B Hkv 1 D"], v: Float[Array, "B Hkv 1 D"]
) -> SharedSlots:
    """Writes the next token of every head into the first spare slots."""
    spec = state.spec
    batch, heads, _, head_dim = k.shape
    prompt = state.positions.shape[2] - heads * spec.max_new_tokens
    written = (state.positions[:, 0, prompt:] >= 0).sum(-1, dtype=jnp.int32)
    position = state.length[:, None]
    length = state.length + 1
    k = spec.rope(k, position, length)
    start, count = prompt + written, jnp.full_like(length, heads)
    row = (batch, 1, heads)
    fresh = jnp.broadcast_to(position[..., None], row)
    return state._replace(
        k=buffers.write_run(state.k, k.reshape(*row, head_dim), start, count),
        v=buffers.write_run(state.v, v.reshape(*row, head_dim), start, count),
        positions=buffers.write_run(state.positions, fresh, start, count),
        length=length,
    )


def inspect_step(
    state: SharedSlots, q: Float[Array, "B Hq 1 D"]
) -> tuple[SharedSlots, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends, from each head, to its own slots."""
    spec = state.spec
    rotated, positions = contiguous.rotate_queries(spec, q, state.length)
    out, lse = attend(state, rotated, positions)
    heads = jnp.arange(spec.num_kv_heads, dtype=jnp.int32)[:, None]
    attended = jnp.where(state.heads == heads, state.positions, -1)
    diagnostics = step.diagnose(attended, lse, state.length)
    return state, out.astype(q.dtype), diagnostics


def attend(
    state: SharedSlots, q: Float[Array, "B Hq 1 D"], positions: Int[Array, "B 1"]
) -> Partial:
    """Attends from rotated queries; every head has a slot, that of the newest token."""
    spec = state.spec
    logits = decode_logits(
        q, state.k, positions, state.positions, sm_scale=spec.sm_scale
    )
    head = jnp.arange(spec.num_q_heads, dtype=jnp.int32) // spec.group
    is_own = state.heads[:, :, None] == head[None, :, None, None]
    logits = jnp.where(is_own, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None])
    whole = weights.reshape(weights.shape[0], 1, -1, weights.shape[3])
    return Partial(weighted_values(whole, state.v).reshape(q.shape), lse)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    budget = kept_slots.budget_of(options.method, spec)
    kept = min(length, budget + spec.max_new_tokens)
    head_and_position = 2 * jnp.dtype(jnp.int32).itemsize
    metadata = spec.batch * spec.num_kv_heads * kept * head_and_position
    spec = kept_slots.spec_of(options.method, spec)
    return Traffic(kv=buffers.kv_bytes(spec, kept), metadata=metadata)
