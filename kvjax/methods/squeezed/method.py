"""Squeezed Attention: a step reads the clusters of the prompt that it needs."""

import functools
from typing import Any, Literal

from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Hooks, Lists, Method, Traffic
from kvjax.methods.squeezed.clusters import (
    SqueezedPrompt,
    SqueezedState,
    end_prompt,
    settle,
)
from kvjax.methods.squeezed.options import Options
from kvjax.methods.squeezed.step import inspect_step
from kvjax.stores import buffers, contiguous
from kvjax.stores import step as shared_step


@typed
@softmax_only
def squeezed(
    *,
    budget: int = 1024,
    sparsity: float | None = None,
    threshold: float | None = None,
    clusters: float = 0.05,
    coarse: float | None = None,
    coarse_sparsity: float | None = None,
    tail: int = 100,
    rounds: int = 10,
    per: Literal["kv", "query"] = "kv",
    group_reduce: selection.Reduce = "mean",
    scope: Literal["layer", "model"] = "layer",
) -> Method:
    """Clusters the prompt's keys once, and reads the clusters that a query asks for.

    When the prompt ends, all of it but its last `tail` tokens is clustered by k-means
    over the directions of its keys, for each KV head; a cluster's centroid is the mean
    of its keys. A step scores the centroids: the softmax weight of one key, if every
    key were its centroid. Clusters whose score is above a threshold are read, best
    first, up to `budget` tokens, of which the last cluster may be a part; the `tail`
    and all that comes after it always are. The prompt is attended to in full.

    Clusters are made once for many questions: a prompt that was saved has them, and
    what is read or appended behind it is attended to in full.

    Args:
        budget: most tokens of the prompt that a list reads, the tail not counted.
        sparsity: share of the clustered tokens that stays unread, by which the
            threshold is calibrated: the quantile of what the last `tail` queries of the
            prompt score, over all of them. Paper: 0.7, 0.8, 0.9. None: no threshold,
            the best clusters fill the budget.
        threshold: a number instead: the weight that a key must be thought to have.
        clusters: clusters, as a share of the tokens. Paper: 0.05.
        coarse: coarse clusters of the centroids, as a share of the tokens: a step first
            scores these, and then only the clusters below those above a threshold of
            their own. Paper: 0.01. None: it scores all.
        coarse_sparsity: share of the tokens below no coarse cluster that passes; 0.5 if
            there are any and nothing is said.
        tail: last tokens of the prompt, always read; their queries calibrate.
        rounds: of Lloyd's algorithm.
        per: one list for the query heads of a `kv` head, or one per `query` head.
        group_reduce: `mean` or `max` of the scores over a group, for per="kv".
        scope: quantiles are of the lists of a `layer`, or of all of the `model`.

    Returns:
        A :class:`kvjax.Method` over
        :class:`kvjax.methods.squeezed.clusters.SqueezedState`.

    State: k, v `(B, Hkv, S, D)` cache dtype, in the order of clusters; members
        `(B, Hkv, S)` int32; centroids `(B, Hkv, C, D)` cache dtype, and two int32 each;
        coarse ones alike, with three. With scope="model" and a sparsity the scores of
        the calibration, float32, for each list. What is appended is kept.
    Reads per step and layer: 2*(budget + tail + generated)*D elements of KV and
        budget int32 from each list, and centroids C*D*Hkv and two int32 each to choose;
        of `coarse` C1*D*Hkv with three int32 each, and as many of the others as are
        below those that pass, at most C*(1 - coarse_sparsity/2) from each list; per
        row.
    Exact when: budget >= prompt length - tail without thresholds; prompt length <=
        tail.

    Raises:
        ValueError: for options out of range or that do not go together.

    Source:
        Hooper, Kim, Mohammadzadeh, Maheswaran, Zhao, Paik, Mahoney, Keutzer, Gholami,
        "Squeezed Attention: Accelerating Long Context Length LLM Inference", ACL 2025,
        arXiv:2411.09688. Official code: SqueezeAILab/SqueezedAttention@4a50c64.
    Deviations:
        Made of the abstracts, a public reproduction's notes and the official code; the
        paper's body could not be consulted. The budget, group_reduce and scope="layer"
        are ours: the official code reads all that is above the threshold, has as many
        KV heads as query heads, and takes quantiles over the model (scope="model").
        Lloyd's rounds start at keys at even distances, not by k-means++, and end after
        `rounds`, not 300. Scores are shifted before they are exponentiated and empty
        clusters are none, where the official code overflows or counts them. The last
        `tail` tokens and later ones are always read; the official code may drop some.
        A question is attended to in full while it is read, where the paper looks up
        clusters for it too. Of coarse clusters at most a static number is looked into.

    Example:
        >>> method = kvjax.squeezed(budget=256)
        >>> state = method.init(spec)
    """
    options = Options(
        budget,
        sparsity,
        threshold,
        clusters,
        coarse,
        coarse_sparsity,
        tail,
        rounds,
        per,
        group_reduce,
        scope,
    )
    finish = functools.partial(end_prompt, options)
    over_model = scope == "model" and options.calibrates
    return Method(
        init=functools.partial(init, options),
        prefill=prefill,
        finish=finish,
        append=append,
        inspect_step=functools.partial(inspect_step, options),
        traffic=functools.partial(traffic, options),
        exact_prompt=True,
        listed=Lists(functools.partial(listed, options), keys=True),
        hooks=Hooks(
            settle=functools.partial(settle, options) if over_model else None,
            seal=finish,
        ),
    )


def init(options: Options, spec: CacheSpec, weights: Any = None) -> SqueezedPrompt:
    """Makes a store of the whole prompt, and room for the queries that calibrate."""
    del weights
    shape = (spec.batch, spec.num_q_heads, options.tail, spec.head_dim)
    queries = buffers.allocate(shape, spec.dtype)
    return SqueezedPrompt(contiguous.contiguous(spec), queries)


def prefill(
    state: SqueezedPrompt | SqueezedState,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[SqueezedPrompt | SqueezedState, Float[Array, "B Hq T D"]]:
    """Attends to everything, and keeps the newest queries until there are clusters.

    A query behind the clustered tokens sees all of them, whatever their order.
    """
    store, chunk = shared_step.read_chunk(state.store, q, k, v, lengths)
    if isinstance(state, SqueezedState):
        return state._replace(store=store), chunk.out
    queries = buffers.write_newest(
        state.queries, chunk.rotated, chunk.positions, store.length
    )
    return SqueezedPrompt(store, queries), chunk.out


def append(
    state: SqueezedState, k: Float[Array, "B Hkv T D"], v: Float[Array, "B Hkv T D"]
) -> SqueezedState:
    """Writes the tokens of a step into their own slots, behind the clustered ones."""
    return state._replace(store=contiguous.extend(state.store, k, v))


def listed(options: Options, spec: CacheSpec, length: int) -> int:
    """Counts the slots that the lists of a KV head hold at most."""
    sizes = options.sizes(spec)
    return min(sizes.lists * sizes.fixed + sizes.dense, length)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there.

    Of a list that the budget fills: a threshold leaves some of it empty.
    """
    sizes, rows = options.sizes(spec), spec.batch * spec.num_kv_heads
    fixed = min(sizes.fixed, max(length - sizes.dense, 0))
    read = fixed + min(sizes.dense, length)
    metadata = buffers.vector_bytes(spec, sizes.clusters) + 8 * rows * sizes.clusters
    if options.coarse is not None:
        metadata = buffers.vector_bytes(spec, sizes.coarse) + 12 * rows * sizes.coarse
        scored = sizes.lists * sizes.scored
        metadata += buffers.vector_bytes(spec, scored) + 8 * rows * scored
    metadata += 4 * rows * sizes.lists * fixed
    return Traffic(kv=sizes.lists * buffers.kv_bytes(spec, read), metadata=metadata)
