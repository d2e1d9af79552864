"""The speed of the operations here, beside the time that their bytes would take.

One run measures all of them in turn, repeat by repeat, so that a change of the machine
falls on all alike; ratios of one run are what may be claimed. The yardstick is reading
and writing a buffer in place, timed in the same turns.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention import selection
from kvjax.methods.entmaxkv import attention, threshold
from kvjax.methods.entmaxkv import page_bounds as entmaxkv_page_bounds
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.entmax import entmax_attention
from pallas_kernels.page_attention import cases as page_cases
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_entmax import page_entmax
from pallas_kernels.page_scores import cases as score_cases
from pallas_kernels.page_scores import page_bounds, page_moments
from pallas_kernels.topk import cases as topk_cases
from pallas_kernels.topk import top_k

LEAST_SECONDS = 0.02  # of a sample: calls are repeated until it is that long
ALPHA = 1.5  # of entmax
CLUSTER = 6.0  # score of the pages that the Gaussian selector is to find
BLOCK = 4096  # tokens that are drawn at random; the rest are these, scaled


class Sizes(NamedTuple):
    """One attention layer while it decodes; the defaults are an 8B model's."""

    context: int
    budget: int = 2048  # tokens read by the sparse operations
    page_size: int = 64
    batch: int = 1
    num_kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    dtype: str = "float32"


class Operation(NamedTuple):
    """A function of arrays to be timed, and the bytes it must move."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    num_bytes: int
    in_place: bool = False  # gives its argument back, changed


class Timing(NamedTuple):
    """The times of one operation, over all repeats; seconds a call."""

    name: str
    context: int
    median: float
    low: float  # quartiles
    high: float
    num_bytes: int
    floor: float  # seconds that the bytes take at the bandwidth of the copy
    times_full: float  # how many times as fast as full attention; median of ratios


def kernels(
    sizes: Sizes, repeats: int = 5, progress: Callable[[float], None] = lambda x: None
) -> list[Timing]:
    """Times every operation of decoding at one context, "copy" being the yardstick.

    Args:
        sizes: of the layer.
        repeats: samples of each operation, in turns.
        progress: called with the share that is done.

    Raises:
        ValueError: unless the budget is whole pages and below the context.
    """
    if repeats < 1:
        raise ValueError(f"{repeats=} must be at least 1.")
    seconds = measure(operations(sizes), repeats, progress)
    timed = operations(sizes, like=True)
    bandwidth = timed["copy"].num_bytes / np.median(seconds["copy"])
    timings = []
    for name, operation in timed.items():
        samples = np.array(seconds[name])
        low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
        ratio = float(np.median(np.array(seconds["full"]) / samples))
        floor = operation.num_bytes / bandwidth
        timings.append(
            Timing(
                name,
                sizes.context,
                median,
                low,
                high,
                operation.num_bytes,
                float(floor),
                ratio,
            )
        )
    return timings


def measure(
    operations: Mapping[str, Operation],
    repeats: int,
    progress: Callable[[float], None] = lambda x: None,
) -> dict[str, list[float]]:
    """Seconds a call of each operation, `repeats` times in turns."""
    compiled, calls = {}, {}
    for name, operation in operations.items():
        compiled[name] = _compiled(operation)
        _seconds(compiled[name], 1)  # the first call touches fresh memory
        calls[name] = max(int(LEAST_SECONDS / _seconds(compiled[name], 1)), 1)
    seconds = {name: [] for name in operations}
    for repeat in range(repeats):
        for name, run in compiled.items():
            seconds[name].append(_seconds(run, calls[name]))
        progress((repeat + 1) / repeats)
    return seconds


def _compiled(operation):
    # Fresh memory costs more than reading it: what is in place stays there.
    donated = (0,) if operation.in_place else ()
    jitted = jax.jit(operation.run, donate_argnums=donated)
    run = jitted.lower(*operation.arguments).compile()
    if not operation.in_place:
        return functools.partial(run, *operation.arguments)
    buffer = [jnp.copy(operation.arguments[0])]

    def again():
        buffer[0] = run(buffer[0])
        return buffer[0]

    return again


def _seconds(run, calls):
    out = None
    start = time.perf_counter()
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


class _Arrays(NamedTuple):
    """The inputs of the operations of a layer: arrays, or shapes alone."""

    q: Any
    k: Any
    v: Any
    pages: Any  # keys and values again, fused
    low: Any  # of each page's keys
    high: Any
    mean: Any  # float32
    variance: Any
    position: Any  # of the query row
    scores: Any  # of pages
    ids: Any  # of the pages of the budget


def operations(sizes: Sizes, *, like: bool = False) -> dict[str, Operation]:
    """The operations of a decode step by name; `like` leaves the arrays out.

    Raises:
        ValueError: unless the budget is whole pages and below the context.
    """
    context, budget, page_size = sizes[:3]
    if budget % page_size or context % page_size or not 0 < budget < context:
        raise ValueError(
            f"{budget=} and {context=} must be multiples of {page_size=}, the budget "
            "the smaller one."
        )
    shapes = _shapes(sizes)
    x = shapes if like else _drawn(shapes)
    scale = sizes.head_dim**-0.5
    bounds = functools.partial(_bounds, group_reduce="none")
    chosen = functools.partial(_chosen, count=budget // page_size)
    sparse = {"count": budget // page_size, "sm_scale": scale}
    attend = functools.partial(page_attention, sm_scale=scale)
    full = functools.partial(decode_attention, sm_scale=scale)
    of_cache = decode_cases.num_bytes(shapes.k, shapes.v)
    of_pages = score_cases.num_bytes(shapes.low, shapes.high)
    of_budget = page_cases.num_bytes(shapes.pages, shapes.ids)
    logits = 4 * math.prod(shapes.q.shape[:3]) * context
    whole = x.q, x.k, x.v, x.position
    listed = x.q, x.pages, x.ids, x.position
    bounded = x.q, x.pages, x.low, x.high, x.position
    return {
        "copy": Operation(lambda x: -x, (x.k,), of_cache, in_place=True),
        "full": Operation(full, whole, of_cache),
        "entmax full": Operation(
            functools.partial(entmax_attention, alpha=ALPHA, sm_scale=scale),
            whole,
            of_cache,
        ),
        "full, logits": Operation(
            functools.partial(full, with_logits=True), whole, of_cache + logits
        ),
        "page_bounds": Operation(bounds, (x.q, x.low, x.high), of_pages),
        "page_moments": Operation(_moments, (x.q, x.low, x.high), of_pages),
        "top_k": Operation(chosen, (x.scores,), topk_cases.num_bytes(shapes.scores)),
        "page_attention": Operation(attend, listed, of_budget),
        "page_attention, entmax": Operation(
            functools.partial(page_entmax, sm_scale=scale, alpha=ALPHA),
            listed,
            of_budget,
        ),
        "sparse": Operation(
            functools.partial(_sparse, **sparse), bounded, of_pages + of_budget
        ),
        "sparse, entmax": Operation(
            functools.partial(_sparse_entmax, **sparse), bounded, of_pages + of_budget
        ),
        # As many pages: means are such that these, and the newest, pass the threshold.
        "sparse, entmax, gaussian": Operation(
            functools.partial(_sparse_gaussian, sm_scale=scale),
            (x.q, x.pages, x.mean, x.variance, x.position),
            score_cases.num_bytes(shapes.mean, shapes.variance) + of_budget,
        ),
    }


def _shapes(sizes):
    context, budget, page_size, batch, num_kv_heads, group, size, dtype = sizes
    layer = {
        "batch": batch,
        "heads": (num_kv_heads * group, num_kv_heads),
        "head_dim": size,
        "dtype": jnp.dtype(dtype),
    }
    num_pages = context // page_size
    q, k, v, position, _ = decode_cases.arguments(context, **layer)
    _, pages, ids, *_ = page_cases.arguments(context, page_size, tokens=budget, **layer)
    _, low, high = score_cases.arguments(num_pages, **layer)
    _, mean, variance = score_cases.arguments(
        num_pages, **layer | {"dtype": jnp.float32}
    )
    (scores,) = topk_cases.arguments(num_pages, batch=batch, heads=num_kv_heads)
    return _Arrays(q, k, v, pages, low, high, mean, variance, position, scores, ids)


def _drawn(shapes):
    """Random arrays; the means let those pages stand out that `ids` lists."""

    def make(function, *arrays):
        return jax.block_until_ready(jax.jit(function)(*arrays))

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32)

    heads, context = shapes.k.shape[:2], shapes.k.shape[2]
    num_pages, size = shapes.low.shape[2:]
    dtype = shapes.k.dtype

    def tokens(seed, width):
        # Random numbers for a gigabyte take longer than all measurements.
        block = normal(seed, *heads, min(BLOCK, context), width)
        times = -(-context // block.shape[2])
        scale = 1 + 0.1 * normal(seed + 1, *heads, times, 1, 1)
        repeated = (block[:, :, None] * scale).reshape(*heads, -1, width)
        return repeated[:, :, :context].astype(dtype)

    def listed():
        keys = jax.random.split(jax.random.key(11), heads)
        shuffled = jax.vmap(
            jax.vmap(lambda key: jax.random.permutation(key, num_pages))
        )
        return jnp.sort(shuffled(keys)[..., : shapes.ids.shape[2]].astype(jnp.int32))

    q = make(lambda: normal(0, *shapes.q.shape).astype(dtype))
    ids = make(listed)
    return _Arrays(
        q=q,
        k=make(lambda: tokens(2, size)),
        v=make(lambda: tokens(4, size)),
        pages=make(lambda: tokens(2, 2 * size).reshape(shapes.pages.shape)),
        low=make(lambda: -jnp.abs(tokens(6, size)[:, :, :num_pages])),
        high=make(lambda: jnp.abs(tokens(8, size)[:, :, :num_pages])),
        mean=make(functools.partial(_clusters, num_pages=num_pages), q, ids),
        variance=make(lambda: jnp.full(shapes.variance.shape, 1e-4, jnp.float32)),
        position=make(lambda: jnp.full(shapes.position.shape, context - 1, jnp.int32)),
        scores=make(lambda: normal(10, *shapes.scores.shape)),
        ids=ids,
    )


def _clusters(q, ids, *, num_pages):
    """Means of keys that score `CLUSTER` under every query of the group."""
    batch, _, _, size = q.shape
    grouped = q[:, :, 0].astype(jnp.float32).reshape(batch, ids.shape[1], -1, size)
    towards = grouped / jnp.square(grouped).sum(-1, keepdims=True)
    centre = CLUSTER * size**0.5 * towards.sum(2)
    listed = selection.is_listed(ids, num_pages)[..., None]
    return jnp.where(listed, centre[:, :, None], 0.0)


def _bounds(q, low, high, group_reduce):
    return page_bounds(q[:, :, 0], low, high, group_reduce=group_reduce)


def _moments(q, mean, variance):
    return page_moments(q[:, :, 0], mean, variance)


def _chosen(scores, count):
    return top_k(scores, count, order="index")[1]


def _sparse(q, pages, low, high, position, *, count, sm_scale):
    ids = _chosen(_bounds(q, low, high, "mean"), count)
    return page_attention(q, pages, ids, position, sm_scale=sm_scale)


def _sparse_entmax(q, pages, low, high, position, *, count, sm_scale):
    ids = _chosen(_bounds(q, low, high, "max"), count)
    return _entmax_pages(q, pages, ids, position, sm_scale)


def _sparse_gaussian(q, pages, mean, variance, position, *, sm_scale):
    ids = _gaussian_pages(q, mean, variance, position, sm_scale, pages.shape[3])
    return _entmax_pages(q, pages, ids, position, sm_scale)


def _entmax_pages(q, pages, ids, position, sm_scale):
    options = {"sm_scale": sm_scale, "alpha": ALPHA}
    plain = attention.attend_pages(
        q[:, :, 0], pages, ids, position[:, 0] + 1, **options
    )
    return attention.fastest(plain, q, pages, ids, position, **options)


def _gaussian_pages(q, mean, variance, position, sm_scale, page_size):
    batch, num_kv_heads, num_pages, _ = mean.shape
    length = position[:, 0] + 1
    historical = entmaxkv_page_bounds.is_historical(length, num_pages, page_size)
    mu, sigma = entmaxkv_page_bounds.score_moments(
        q[:, :, 0], mean, variance, sm_scale=sm_scale
    )
    middle, spread = entmaxkv_page_bounds.global_moments(mu, sigma, historical)
    count = page_size * historical.sum(-1).astype(jnp.float32)[:, None, None]
    tau = threshold.estimate_threshold(
        middle[..., None], spread[..., None], count, alpha=ALPHA
    )
    margins = entmaxkv_page_bounds.gaussian_margins(
        mu, sigma, tau, historical, alpha=ALPHA, page_size=page_size
    )
    margins = margins.reshape(batch, num_kv_heads, -1, num_pages).max(2)
    wanted = jnp.where(margins > 0, margins, -jnp.inf)
    options = {"page_size": page_size, "size": num_pages}
    return entmaxkv_page_bounds.list_pages(wanted, length, **options)[0]
