"""SubGen: centres of clustered keys; or a stream's clusters, and values by chance."""

import functools
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.attention import centres, selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Method, Traffic
from kvjax.methods.subgen import stream
from kvjax.methods.subgen.options import Options
from kvjax.stores import contiguous, kept_prompt, kept_slots
from pallas_kernels.shared.quantized import floats


@typed
@softmax_only
def subgen(
    *,
    budget: int = 1024,
    mode: Literal["centres", "stream"] = "centres",
    window: int | None = None,
    num_sinks: int = 0,
    per_cluster: int = 1,
    samples: int | None = None,
    clusters: int | None = None,
    delta: float | None = None,
    lam: float = 1.0,
    norm_cap: bool = True,
    seed: int = 0,
) -> Method:
    """Keeps the newest tokens and centres of clustered keys, or samples of clusters.

    `centres`, what the paper's experiments run: of the prompt's older tokens those stay
    whose keys are centres of the others, chosen greedily, each the farthest from those
    before it; then attention is over what is kept, and later tokens stay.

    `stream`, what the paper's theorem is of: tokens that leave the window are folded
    into a state of fixed size. Their keys are clustered; `per_cluster` keys drawn from
    each cluster, weighted by its size, estimate the normaliser, and `samples` tokens
    drawn by the square of their value's norm estimate the numerator; both without bias,
    for every query. Attention to sinks and window is exact, and the quotient merged.

    The prompt is attended to in full. Draws are a function of seed, layer, position,
    KV head and slot: the same whatever the chunks, the batch and the machine.

    Args:
        budget: tokens kept per KV head, of the prompt in `centres`; generated ones come
            on top there. A key alone counts as half a token.
        mode: `centres` or `stream`.
        window: newest tokens, always kept; None is half of what sinks leave.
        num_sinks: first tokens, always kept. Paper: 0; `stream` wants some, such as 4.
        per_cluster: keys drawn from each cluster, of `stream`.
        samples: values drawn by their norm, of `stream`; None is half of the rest.
        clusters: most clusters, of `stream`; None is as many as the budget holds.
        delta: a key within it of a centre joins that one's cluster, and another founds
            one while there is room, as keys come. None: the prompt's centres are chosen
            greedily, and later keys join them.
        lam: gain of the estimate in [0, 1], of `stream`; 0 is sinks and window alone.
        norm_cap: bounds the estimate by the longest value that it stands for. Paper:
            off.
        seed: of the draws.

    Returns:
        A :class:`kvjax.Method`; its state after `finish` is
        :class:`kvjax.stores.kept_slots.Kept`, or
        :class:`kvjax.methods.subgen.stream.StreamState`.

    State: k, v `(B, Hkv, budget + max_new_tokens, D)` cache dtype; positions int32. Of
        `stream`, whatever the text: k, v `(B, Hkv, num_sinks + window + 1, D)`, keys
        and values of at most the rest of the budget, centres `(B, Hkv, clusters, D)`,
        in the cache dtype; counts and the draws' numbers, 32 bits each.
        While the prompt runs: the whole cache.
        What is appended is kept; in `stream` what leaves the window is folded.
    Reads per step and layer: 2*(budget + generated)*D*Hkv elements of KV, and as many
        positions, per row; of `stream` (2*(num_sinks + window + samples) +
        clusters*per_cluster)*D*Hkv, and to fold a token the centres and numbers.
    Exact when: budget >= prompt length; `stream`: num_sinks + window >= length, or
        budget >= capacity.

    Raises:
        ValueError: for options out of range, that the budget does not hold, or that are
            of the other mode.

    Source:
        Zandieh, Han, Mirrokni, Karbasi, "SubGen: Token Generation in Sublinear Time and
        Memory", 2024, arXiv:2402.06082.
    Deviations:
        Its text could not be consulted, only its abstract and what others wrote of it:
        the start and the metric of the greedy choice are ours, and so are the window,
        sinks, norm_cap, a fixed number of clusters and lam. The paper has neither sinks
        nor an exact part in its theorem, and runs the stream over the prompt; here a
        prompt is read exactly. Samples are drawn by races, whose law is that of the
        paper's coins.

    Example:
        >>> method = kvjax.subgen(budget=256)
        >>> state = method.init(spec)
    """
    options = Options(
        budget,
        mode,
        window,
        num_sinks,
        per_cluster,
        samples,
        clusters,
        delta,
        lam,
        norm_cap,
        seed,
    )
    if options.is_stream:
        return Method(
            init=functools.partial(stream.init, options),
            prefill=stream.prefill,
            finish=functools.partial(stream.finish, options),
            append=functools.partial(stream.append, options),
            inspect_step=functools.partial(stream.inspect_step, options),
            traffic=functools.partial(stream.traffic, options),
            exact_prompt=True,
            estimates=True,
        )
    return Method(
        init=kept_prompt.init,
        prefill=kept_prompt.prefill,
        finish=functools.partial(finish, options),
        append=kept_prompt.append,
        inspect_step=kept_prompt.inspect_step,
        traffic=functools.partial(traffic, options),
        exact_prompt=True,
    )


def finish(options: Options, state: kept_prompt.Prompt) -> kept_slots.Kept:
    """Keeps sinks, window and the centres of the tokens between them."""
    spec = state.store.spec
    kept = chosen(options, state.store)
    return kept_slots.take(state.store, kept, spare=spec.max_new_tokens)


def chosen(options: Options, store: contiguous.Contiguous) -> Int[Array, "B Hkv N"]:
    """Lists the positions that stay, in order, -1 behind the last."""
    spec, sizes = store.spec, options.split(store.spec)
    keys = floats(store.k)
    exact = stream.newest(sizes, store.length)
    exact = jnp.broadcast_to(exact, (*keys.shape[:2], sizes.exact))
    count = min(options.budget, spec.capacity) - sizes.exact
    if not count:
        return selection.in_order(exact)
    between = stream.is_between(sizes, keys, store.length)
    found = centres.farthest_first(keys, between, count).centres
    return selection.in_order(jnp.concatenate([exact, found], axis=2))


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    return kept_prompt.traffic(options.budget, spec, length)
