"""The stream of `subgen`: exact sinks and window, and a fixed state for the rest.

Of a KV head, F are the tokens that left the window. With e = exp(q.k) of a query,

    Z   = sum of e over F       tau = sum_i (n_i / t) sum of e over the keys of S_i
    N   = sum of e v over F     z   = (mu / s) sum of e v / |v|^2 over s tokens of F

where cluster i has n_i keys, of which S_i are t drawn with equal chance, the s tokens
are drawn with probability |v|^2 / mu, and mu is the sum of |v|^2 over F. The means of
tau and z are Z and N; the estimate of attention to F is y = z / tau.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from kvjax.attention import centres, reservoirs
from kvjax.attention.partials import Partial, merge
from kvjax.interface import CacheSpec, Diagnostics, Traffic
from kvjax.methods.subgen.options import Options, Sizes
from kvjax.stores import buffers, contiguous, step
from pallas_kernels.decode_attention import decode_attention, decode_logits
from pallas_kernels.shared.quantized import Rows, floats

MOST = 60.0  # of a logarithm whose exponential is a finite factor, whatever it is of


class StreamPrompt(NamedTuple):
    """State of :func:`kvjax.subgen` with mode="stream" until the prompt ends."""

    store: contiguous.Contiguous
    key: UInt[Array, "B 2"]  # of the layer's draws, in every row


class Folded(NamedTuple):
    """The tokens F that left the window, in arrays of fixed size."""

    centres: Float[Array, "B Hkv M D"]  # read when a token is folded, by no query
    counts: Int[Array, "B Hkv M"]  # n_i; 0 = unused, behind those in use
    sample_k: Float[Array, "B Hkv MT D"]  # S_i, cluster i in slots i t .. i t + t - 1
    sample_race: UInt[Array, "B Hkv MT"]
    value_k: Float[Array, "B Hkv K D"]  # K = s
    value_u: Float[Array, "B Hkv K D"]  # v / |v|^2
    value_race: Float[Array, "B Hkv K"]  # +inf = empty
    mass: Float[Array, "B Hkv"]  # mu
    longest: Float[Array, "B Hkv"]  # the largest |v|
    crowded: Int[Array, "B Hkv"]  # tokens beyond delta of the centre they joined
    key: UInt[Array, "B 2"]  # never advanced: a token's draws are its position's


class StreamState(NamedTuple):
    """State of :func:`kvjax.subgen` with mode="stream" while decoding, one layer."""

    spec: CacheSpec
    # The first A = num_sinks tokens; behind them a ring of W = window slots and one for
    # the token that left it last.
    k: Float[Rows, "B Hkv N D"]
    v: Float[Rows, "B Hkv N D"]
    folded: Folded | None  # None: what leaves the window is forgotten, or nothing does
    length: Int[Array, "B"]

    ROWS = buffers.KEYS_AND_VALUES


def init(options: Options, spec: CacheSpec, weights: Any = None) -> StreamPrompt:
    """Makes a store of the whole prompt, and the layer's key."""
    del weights
    key = reservoirs.row_keys(options.seed, spec.layer, spec.batch)
    return StreamPrompt(contiguous.contiguous(spec), key)


def prefill(
    state: StreamPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[StreamPrompt, Float[Array, "B Hq T D"]]:
    """Attends to everything."""
    store, out = step.prefill(state.store, q, k, v, lengths)
    return state._replace(store=store), out


# --- sinks and window


def newest(sizes: Sizes, length: Int[Array, "B"]) -> Int[Array, "B 1 N"]:
    """Returns the position in each slot of sinks and window, -1 = none."""
    first = jnp.arange(sizes.sinks, dtype=jnp.int32)
    first = jnp.where(first < length[:, None], first, -1)
    places = sizes.sinks + jnp.arange(sizes.ring, dtype=jnp.int32)
    last = length[:, None] - 1
    ring = last - (last - places) % sizes.ring
    is_in = (ring >= sizes.sinks) & (ring > last - sizes.window)
    return jnp.concatenate([first, jnp.where(is_in, ring, -1)], axis=1)[:, None]


def in_ring(sizes: Sizes, position: Int[Array, "B"]) -> Int[Array, "B"]:
    """Returns the slot of a token that is no sink."""
    return sizes.sinks + (position - sizes.sinks) % sizes.ring


def is_between(
    sizes: Sizes, keys: Float[Array, "B Hkv S D"], length: Int[Array, "B"]
) -> Bool[Array, "B Hkv S"]:
    """Says which of the tokens in slots 0, 1, ... lie between sinks and window."""
    slots = jnp.arange(keys.shape[2], dtype=jnp.int32)
    end = length[:, None, None] - sizes.window
    return jnp.broadcast_to((slots >= sizes.sinks) & (slots < end), keys.shape[:3])


# --- folding


def finish(options: Options, state: StreamPrompt) -> StreamState:
    """Keeps sinks and window, and folds what lies between them."""
    store, sizes = state.store, options.split(state.store.spec)
    held = newest(sizes, store.length)
    folded = None
    if sizes.clusters:
        folded = fold_prompt(options, sizes, store, state.key)
    return StreamState(
        store.spec,
        buffers.take(store.k, held),
        buffers.take(store.v, held),
        folded,
        store.length,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def fold_prompt(
    options: Options,
    sizes: Sizes,
    store: contiguous.Contiguous,
    key: UInt[Array, "B 2"],
) -> Folded:
    """Clusters the prompt's tokens between sinks and window, and draws from them.

    One program, jitted or not.
    """
    keys, values = floats(store.k), floats(store.v)
    between = is_between(sizes, keys, store.length)
    if options.delta is None:
        clusters = centres.farthest_first(keys, between, sizes.clusters)
        crowded = jnp.zeros(keys.shape[:2], jnp.int32)
    else:
        clusters = centres.online(keys, between, options.delta, sizes.clusters)
        is_far = between & (clusters.squared > options.delta**2)
        crowded = is_far.sum(-1, dtype=jnp.int32)
    drawn = reservoirs.race_uniform(
        key, clusters.labels, clusters.centres, sizes.per_cluster, store.spec
    )
    weights = jnp.where(between, squared_norm(values), 0.0)
    by_norm = reservoirs.race_weighted(key, weights, sizes.samples, store.spec)
    flat = (*keys.shape[:2], sizes.clusters * sizes.per_cluster)
    value_k, value_u = paired(
        buffers.gather(keys, by_norm.positions),
        buffers.gather(values, by_norm.positions),
    )
    return Folded(
        centres=buffers.gather(keys, clusters.centres),
        counts=centres.sizes(clusters),
        sample_k=buffers.gather(keys, drawn.positions.reshape(flat)),
        sample_race=drawn.race.reshape(flat),
        value_k=value_k,
        value_u=value_u,
        value_race=by_norm.race,
        mass=weights.sum(-1),
        longest=jnp.sqrt(weights.max(-1)),
        crowded=crowded,
        key=key,
    )


def append(
    options: Options,
    state: StreamState,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
) -> StreamState:
    """Writes the next token, and folds the one that leaves the window."""
    spec, sizes, length = state.spec, options.split(state.spec), state.length
    slot = jnp.where(length < sizes.sinks, length, in_ring(sizes, length))[:, None]
    k = spec.rope(k, length[:, None], length + 1)
    is_real = jnp.ones_like(slot, bool)
    state = state._replace(
        k=buffers.write(state.k, k, slot, is_real),
        v=buffers.write(state.v, v, slot, is_real),
        length=length + 1,
    )
    if state.folded is None:
        return state
    leaves = length - sizes.window
    place = in_ring(sizes, leaves)[:, None, None]
    old_k, old_v = (buffers.gather(rows, place) for rows in (state.k, state.v))
    is_due = leaves >= sizes.sinks
    folded = fold(options, spec, state.folded, old_k, old_v, leaves, is_due)
    return state._replace(folded=folded)


def fold(
    options: Options,
    spec: CacheSpec,
    folded: Folded,
    k: Float[Array, "B Hkv 1 D"],
    v: Float[Array, "B Hkv 1 D"],
    position: Int[Array, "B"],
    is_due: Bool[Array, "B"],
) -> Folded:
    """Folds one token of each row that is due, as if the prompt had had it."""
    sizes = options.split(spec)
    due = jnp.broadcast_to(is_due[:, None], folded.mass.shape)
    is_used = folded.counts > 0
    near, squared = centres.nearest(k, folded.centres, is_used)
    used = is_used.sum(-1, dtype=jnp.int32)
    is_far = jnp.isinf(squared)  # there is no centre
    if options.delta is not None:
        is_far = squared > options.delta**2
    founds = due & is_far & (used < sizes.clusters)
    cluster = jnp.where(founds, used, near)
    # The chance of a slot to become this key is 1 / n_i, and 1 of a cluster it founds.
    at = jnp.maximum(position, 0)[:, None]
    heads, per = k.shape[1], sizes.per_cluster
    draw = functools.partial(reservoirs.bits, folded.key, at, heads=heads, spec=spec)
    drawn = draw(reservoirs.UNIFORM, slots=per)[:, :, 0]
    slots = cluster[..., None] * per + jnp.arange(per, dtype=jnp.int32)
    held = jnp.take_along_axis(folded.sample_race, slots, axis=2)
    wins = due[..., None] & (founds[..., None] | (drawn < held))
    # That of a value's is |v|^2 / mu, this token's in it.
    weight = squared_norm(v)
    numbers = draw(reservoirs.WEIGHTED, slots=sizes.samples)
    times = reservoirs.exponentials(numbers, weight)[:, :, 0]
    wins_value = due[..., None] & (times < folded.value_race)
    every = jnp.broadcast_to(jnp.arange(sizes.samples, dtype=jnp.int32), times.shape)
    value_k, value_u = paired(k, v)
    weight = jnp.where(due, weight[..., 0], 0.0)
    one = cluster[..., None]
    added = due[..., None] & (jnp.arange(sizes.clusters, dtype=jnp.int32) == one)
    crowded = folded.crowded
    if options.delta is not None:
        crowded += (due & is_far & ~founds).astype(jnp.int32)
    return Folded(
        centres=buffers.write(folded.centres, k, one, founds[..., None]),
        counts=folded.counts + added.astype(jnp.int32),
        sample_k=buffers.write(folded.sample_k, _repeated(k, per), slots, wins),
        sample_race=buffers.write(folded.sample_race, drawn, slots, wins),
        value_k=buffers.write(
            folded.value_k, _repeated(value_k, sizes.samples), every, wins_value
        ),
        value_u=buffers.write(
            folded.value_u, _repeated(value_u, sizes.samples), every, wins_value
        ),
        value_race=jnp.where(wins_value, times, folded.value_race),
        mass=folded.mass + weight,
        longest=jnp.maximum(folded.longest, jnp.sqrt(weight)),
        crowded=crowded,
        key=folded.key,
    )


def squared_norm(v: Float[Array, "B H N D"]) -> Float[Array, "B H N"]:
    """Returns |v|^2 in float32, of the same bits in whatever program computes it.

    A number is split in halves of 12 bits, whose products are exact: fused with a sum
    or not, they are rounded alike. And the sum has one order.
    """
    v = v.astype(jnp.float32)
    high = lax.reduce_precision(v, exponent_bits=8, mantissa_bits=11)
    low = v - high
    terms = (high * high + 2 * high * low) + low * low
    while (size := terms.shape[-1]) > 1:
        half = size // 2
        odd = terms[..., 2 * half :]
        terms = terms[..., :half] + terms[..., half : 2 * half]
        terms = jnp.concatenate([terms, odd], axis=-1)
    return terms[..., 0]


def paired(
    k: Float[Array, "B H N D"], v: Float[Array, "B H N D"]
) -> tuple[Float[Array, "B H N D"], Float[Array, "B H N D"]]:
    """Returns keys, and v / |v|^2, in a dtype that holds what short values become."""
    dtype = value_dtype(v.dtype)
    weight = squared_norm(v)[..., None]
    u = v.astype(jnp.float32) / jnp.where(weight > 0, weight, 1.0)
    return k.astype(dtype), u.astype(dtype)


def value_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype of sampled values: float16 ends where short ones begin."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def _repeated(row: Float[Array, "B H 1 D"], times: int) -> Float[Array, "B H N D"]:
    return jnp.broadcast_to(row, (*row.shape[:2], times, row.shape[3]))


# --- a step


def inspect_step(
    options: Options, state: StreamState, q: Float[Array, "B Hq 1 D"]
) -> tuple[StreamState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to sinks and window, and merges the estimate of what left it."""
    spec, sizes = state.spec, options.split(state.spec)
    rotated, positions = contiguous.rotate_queries(spec, q, state.length)
    held = newest(sizes, state.length)
    exact = Partial(
        *decode_attention(
            rotated, state.k, state.v, positions, held, sm_scale=spec.sm_scale
        )
    )
    out = exact.out
    if state.folded is not None:
        out = merge(exact, estimate(options, state.folded, rotated, spec.sm_scale)).out
    attended = jnp.broadcast_to(held, state.k.shape[:3])
    diagnostics = step.diagnose(attended, exact.lse, state.length)
    return state, out.astype(q.dtype), diagnostics


def estimate(
    options: Options,
    folded: Folded,
    q: Float[Array, "B Hq 1 D"],
    sm_scale: float,
) -> Partial:
    """Estimates attention to the folded tokens: z / tau, and lam tau of them."""
    tau = log_tau(folded, q, sm_scale)
    mean, log_z = numerator(folded, q, sm_scale)
    # y = z / tau, where z = exp(log_z) mean.
    exponent = log_z - jnp.where(jnp.isinf(tau), 0.0, tau)
    most = jnp.full_like(exponent, MOST)
    if options.norm_cap:
        # y of the truth is a mean of values: none is longer than the longest.
        most = _log(_by_query(folded.longest, q)) - _log(jnp.linalg.norm(mean, axis=-1))
    factor = jnp.exp(jnp.minimum(exponent, most))
    is_some = ~jnp.isinf(log_z)[..., None]
    y = jnp.where(is_some, factor[..., None] * mean, 0.0)
    return Partial(y, tau + jnp.log(jnp.float32(options.lam)))


def log_tau(
    folded: Folded, q: Float[Array, "B Hq 1 D"], sm_scale: float
) -> Float[Array, "B Hq 1"]:
    """Returns the logarithm of tau, the estimate of Z; -inf where nothing is folded."""
    per = folded.sample_race.shape[2] // folded.counts.shape[2]
    counts = jnp.repeat(folded.counts, per, axis=2)
    held = jnp.where(counts > 0, 0, -1)
    at = jnp.zeros((q.shape[0], 1), jnp.int32)
    logits = decode_logits(q, folded.sample_k, at, held, sm_scale=sm_scale)
    shares = jnp.log(jnp.maximum(counts, 1).astype(jnp.float32) / per)
    shares = jnp.repeat(shares, q.shape[1] // counts.shape[1], axis=1)
    return jax.nn.logsumexp(logits + shares[:, :, None], axis=-1)


def numerator(
    folded: Folded, q: Float[Array, "B Hq 1 D"], sm_scale: float
) -> tuple[Float[Array, "B Hq 1 D"], Float[Array, "B Hq 1"]]:
    """Returns z, the estimate of N, as a vector and the logarithm of its factor."""
    held = jnp.where(jnp.isinf(folded.value_race), -1, 0)
    at = jnp.zeros((q.shape[0], 1), jnp.int32)
    mean, lse = decode_attention(
        q.astype(folded.value_k.dtype),
        folded.value_k,
        folded.value_u,
        at,
        held,
        sm_scale=sm_scale,
    )
    share = _log(_by_query(folded.mass, q) / folded.value_race.shape[2])
    return mean, lse + share


def _by_query(x: Float[Array, "B Hkv"], q: Float[Array, "B Hq 1 D"]) -> Array:
    """Repeats what KV heads have for their query heads, `(B, Hq, 1)`."""
    return jnp.repeat(x, q.shape[1] // x.shape[1], axis=1)[..., None]


def _log(x: Array) -> Array:
    return jnp.log(jnp.maximum(x, jnp.finfo(jnp.float32).tiny))


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes of a step and of folding the token that leaves."""
    sizes = options.split(spec)
    kv = buffers.kv_bytes(spec, min(length, sizes.exact))
    if length <= sizes.exact or not sizes.clusters:
        return Traffic(kv=kv, metadata=0)
    keys = sizes.clusters * sizes.per_cluster
    wide = value_dtype(spec.dtype).itemsize // jnp.dtype(spec.dtype).itemsize
    kv += buffers.vector_bytes(spec, 2 * sizes.samples * wide + keys)
    numbers = sizes.clusters + keys + sizes.samples
    metadata = buffers.vector_bytes(spec, sizes.clusters)
    metadata += 4 * spec.batch * spec.num_kv_heads * numbers
    return Traffic(kv=kv, metadata=metadata)
