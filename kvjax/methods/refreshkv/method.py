"""RefreshKV: small-cache steps, and now and then a full one that refills the cache."""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.interface import Diagnostics, Method, Traffic
from kvjax.methods.refreshkv import policy
from kvjax.stores import buffers, contiguous, kept_slots
from pallas_kernels.decode_attention import decode_attention, decode_logits


class RefreshKVPrompt(NamedTuple):
    """State of :func:`refreshkv` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    query: Float[Array, "B Hq 1 D"]  # of the newest token, un-rotated


class RefreshKVState(NamedTuple):
    """State of :func:`refreshkv`, one layer."""

    store: contiguous.Contiguous  # every token
    # The small cache, a ring in the order of eviction: a selection of budget - 1
    # tokens behind a slot for the next one, the lowest score first.
    k: Float[Array, "B Hkv N D"]
    v: Float[Array, "B Hkv N D"]
    positions: Int[Array, "B Hkv N"]  # -1 = empty
    since: Int[Array, "B"]  # tokens put in since the last selection
    reference: Float[Array, "B D"]  # mean query of the last full step, float32
    steps: Int[Array, "B"]
    refreshes: Int[Array, "B"]  # full steps among them: steps / refreshes is the stride


@softmax_only
def refreshkv(
    *,
    budget: int = 1024,
    stride: int = 5,
    schedule: policy.Schedule = "qc",
    threshold: float = 0.85,
    kernel: int = 7,
    group_reduce: selection.Reduce = "max",
    max_gap: int | None = None,
    self_mode: policy.SelfMode = "paper",
    qc_rope: Literal["post", "pre"] = "post",
    qc_batch: Literal["any", "per_row"] = "per_row",
    full_attend: bool = True,
    refresh: bool = True,
) -> Method:
    """Keeps every key; most steps read a small cache that full steps refill.

    A full step attends to everything, and its own attention says which tokens the next
    steps need. A small step attends to those and the newest token, which then takes the
    place of the token that scored lowest. The prompt is attended to in full, and its
    last token makes the first selection.

    Args:
        budget: tokens attended to in a small step, the current one included.
        stride: a full step is due every so many steps. Paper: 5 and 10.
        schedule: whether a due step is full: `fixed` always, `qc` (query comparison)
            if the query has turned away from that of the layer's last full step,
            `never` for no refresh at all.
        threshold: of `qc`: full unless the cosine of the two queries, each the mean
            over heads, exceeds it. Paper: 0.85 (Llama 3.1), 0.95 (Qwen2); tune it.
        kernel: width of the max pooling of scores, odd. Paper: 7.
        group_reduce: `max` or `mean` over the query heads that share a KV head.
        max_gap: of `qc`: a due step is full at any rate if the next one would come
            after more small steps than that. None means budget - 1, after which the
            small cache would forget what was generated.
        self_mode: in a selection, the token of the full step itself competes as any
            other (`paper`), is always kept (`snapkv`), or never is (`drop`).
        qc_rope: compares queries after (`post`) or before (`pre`) rotation.
        qc_batch: a row that needs a full step takes it alone (`per_row`; the step then
            takes the time of both kinds), or every row with it (`any`, which makes a
            row's result depend on its neighbours).
        full_attend: False attends to the refilled small cache in full steps too: their
            values are not read, half the bytes.
        refresh: False leaves the selection as the prompt made it (an ablation).

    Returns:
        A :class:`kvjax.Method`; its state is :class:`RefreshKVState` after `finish`.

    State: k, v `(B, Hkv, S, D)` and the small `(B, Hkv, budget, D)`, cache dtype.
    Reads per step and layer: 2*budget*D*Hkv elements of KV in small steps, 2*length*D*
        Hkv in full ones, per row.
    Exact when: budget >= length, or the step is full.

    Raises:
        ValueError: for options out of range.

    Source:
        Xu, Goyal, Choi, "RefreshKV: Updating Small KV Cache During Long-form
        Generation", ACL 2025, arXiv:2411.05787.
    Deviations:
        The paper's K excludes the current token, so its K is budget - 1. Tokens enter
        the full cache at once, not at the next full step. max_gap.

    Example:
        >>> method = kvjax.refreshkv(budget=256, stride=10)
        >>> state = method.init(spec)
    """
    policy.check(
        budget,
        stride,
        kernel,
        max_gap,
        schedule=schedule,
        self_mode=self_mode,
        qc_rope=qc_rope,
        qc_batch=qc_batch,
    )
    selection.check_reduce(group_reduce=group_reduce)
    if math.isnan(threshold):
        raise ValueError(f"{threshold=} must be a number: no cosine is below it.")
    longest_gap = budget - 1 if max_gap is None else max_gap

    def init(spec, weights=None):
        del weights
        shape = (spec.batch, spec.num_q_heads, 1, spec.head_dim)
        return RefreshKVPrompt(
            contiguous.contiguous(spec), buffers.allocate(shape, spec.dtype)
        )

    def prefill(state, q, k, v, lengths):
        store = contiguous.extend(state.store, k, v, lengths)
        rotated, positions = contiguous.rotate_queries(
            store.spec, q, store.length, lengths
        )
        out = contiguous.attend(store, rotated, positions).out
        last = jnp.maximum(lengths - 1, 0)[:, None, None, None]
        newest = jnp.take_along_axis(q, last, axis=2).astype(state.query.dtype)
        kept = lengths[:, None, None, None] > 0
        query = jnp.where(kept, newest, state.query)
        return RefreshKVPrompt(store, query), out.astype(q.dtype)

    def finish(state):
        store, spec = state.store, state.store.spec
        rotated, positions = contiguous.rotate_queries(spec, state.query, store.length)
        logits = decode_logits(rotated, store.k, positions, sm_scale=spec.sm_scale)
        chosen = select(logits, store.length, spec.num_kv_heads)
        kept = kept_slots.keep(store, chosen)
        reference = mean_query(state.query, rotated)
        reference = jnp.where(store.length[:, None] > 0, reference, 0.0)
        return RefreshKVState(
            store,
            kept.k,
            kept.v,
            chosen,
            since=buffers.lengths(spec),
            reference=reference,
            steps=buffers.lengths(spec),
            refreshes=buffers.lengths(spec),
        )

    def mean_query(q, rotated):
        chosen = rotated if qc_rope == "post" else q
        return chosen[:, :, 0].astype(jnp.float32).mean(1)

    def select(logits, length, num_kv_heads):
        return policy.select(
            logits[:, :, 0],
            length - 1,
            num_kv_heads,
            budget=budget,
            kernel=kernel,
            group_reduce=group_reduce,
            self_mode=self_mode,
        )

    def append(state, k, v):
        store = contiguous.extend(state.store, k, v)
        # The rows that the step will see in the small cache, as the full one has them.
        itself = (store.length - 1)[:, None, None]
        count = jnp.ones_like(state.since)
        fresh = (
            buffers.gather(store.k, itself),
            buffers.gather(store.v, itself),
            jnp.broadcast_to(itself, (*k.shape[:2], 1)),
        )
        ring = (state.k, state.v, state.positions)
        k, v, positions = (
            buffers.write_run(buffer, row, state.since % budget, count)
            for buffer, row in zip(ring, fresh, strict=True)
        )
        return state._replace(
            store=store, k=k, v=v, positions=positions, since=state.since + 1
        )

    def is_full(state, query):
        """Which rows need a full step now, `(B,)`."""
        if schedule == "never":
            return jnp.zeros_like(state.since, bool)
        full = (state.steps + 1) % stride == 0
        if schedule == "qc":
            full &= policy.has_turned(
                query,
                state.reference,
                state.since - 1,  # `append` has counted this step
                threshold=threshold,
                stride=stride,
                max_gap=longest_gap if refresh else jnp.iinfo(jnp.int32).max,
            )
        return (
            full if qc_batch == "per_row" else jnp.broadcast_to(full.any(), full.shape)
        )

    def inspect_step(state, q):
        store, spec = state.store, state.store.spec
        sm_scale = spec.sm_scale
        rotated, positions = contiguous.rotate_queries(spec, q, store.length)
        query = mean_query(q, rotated)
        full = is_full(state, query)

        def attend(k, v, held=None):
            return decode_attention(rotated, k, v, positions, held, sm_scale=sm_scale)

        def small_step():
            return *attend(state.k, state.v, state.positions), state.positions

        def full_step():
            chosen = state.positions
            if full_attend:
                out, lse, logits = decode_attention(
                    rotated,
                    store.k,
                    store.v,
                    positions,
                    sm_scale=sm_scale,
                    with_logits=True,
                )
            else:
                logits = decode_logits(rotated, store.k, positions, sm_scale=sm_scale)
            if refresh:
                chosen = select(logits, store.length, spec.num_kv_heads)
            if not full_attend:
                kept = kept_slots.keep(store, chosen)
                out, lse = attend(kept.k, kept.v, chosen)
            if qc_batch == "per_row" and spec.batch > 1:
                others = small_step()
                by_row = full[:, None, None]
                out = jnp.where(by_row[..., None], out, others[0])
                lse = jnp.where(by_row, lse, others[1])
                chosen = jnp.where(by_row, chosen, others[2])
            return out, lse, chosen

        # Caches go into the branches and only small arrays come out: a cache that came
        # out of one would be copied.
        out, lse, chosen = lax.cond(full.any(), full_step, small_step)
        place = jnp.arange(max(spec.capacity, budget), dtype=jnp.int32)
        whole = jnp.where(place < store.length[:, None, None], place, -1)
        listed = ((0, 0), (0, 0), (0, len(place) - budget))
        listed = jnp.pad(chosen, listed, constant_values=-1)
        is_whole = (full & full_attend)[:, None, None]
        attended = jnp.where(is_whole, whole, listed)
        diagnostics = Diagnostics(
            attended=attended,
            lse=lse,
            refreshed=full,
            exact=kept_slots.holds_all(attended, store.length, spec.num_q_heads),
        )
        if refresh:
            state = refill(state, full, chosen)
        state = state._replace(
            reference=jnp.where(full[:, None], query, state.reference),
            steps=state.steps + 1,
            refreshes=state.refreshes + full.astype(jnp.int32),
        )
        return state, out.astype(q.dtype), diagnostics

    def refill(state, full, chosen):
        """The small cache anew in `full` rows, of the tokens at `chosen` positions."""

        def turn(carry):
            _, *ring = carry
            fresh = (
                buffers.gather(state.store.k, chosen),
                buffers.gather(state.store.v, chosen),
                chosen,
            )
            ring = (
                jnp.where(full.reshape(-1, *[1] * (old.ndim - 1)), new, old)
                for new, old in zip(fresh, ring, strict=True)
            )
            return jnp.bool_(False), *ring

        # A loop of one turn or none: what a loop carries is updated in place.
        ring = (full.any(), state.k, state.v, state.positions)
        _, k, v, positions = lax.while_loop(lambda carry: carry[0], turn, ring)
        since = jnp.where(full, 0, state.since)
        return state._replace(k=k, v=v, positions=positions, since=since)

    def traffic(spec, length):
        small = buffers.kv_bytes(spec, min(budget, length))
        held = spec.batch * spec.num_kv_heads * min(budget, length)
        metadata = held * jnp.dtype(jnp.int32).itemsize  # positions
        if schedule == "never" or length <= 1:
            return Traffic(small, metadata)
        whole = buffers.kv_bytes(spec, length)
        if full_attend:
            return Traffic((whole + (stride - 1) * small) // stride, metadata)
        return Traffic(small, metadata + whole // 2 // stride)

    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=inspect_step,
        traffic=traffic,
        exact_prompt=True,
    )
