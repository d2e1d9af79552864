"""How fast the operations are here, beside the time that their bytes alone would take.

One run measures all of them in turn, repeat by repeat, so that a change of the machine
falls on all alike; ratios of one run are what may be claimed. The yardstick is reading
and writing a buffer in place, timed in the same turns.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention import selection
from kvjax.methods.entmaxkv import attention, threshold
from kvjax.methods.entmaxkv import page_bounds as entmaxkv_page_bounds
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.entmax import entmax_attention
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_scores import page_bounds, page_moments
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
    """What is timed: a function of arrays, and the bytes it must move."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    num_bytes: int
    in_place: bool = False  # gives its argument back, changed


class Timing(NamedTuple):
    """Of one operation, over all repeats; seconds a call."""

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
    found = operations(sizes, like=True)
    bandwidth = found["copy"].num_bytes / np.median(seconds["copy"])
    timings = []
    for name, operation in found.items():
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
    held = [jnp.copy(operation.arguments[0])]

    def again():
        held[0] = run(held[0])
        return held[0]

    return again


def _seconds(run, calls):
    start = time.perf_counter()
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def operations(sizes: Sizes, *, like: bool = False) -> dict[str, Operation]:
    """The operations of a decode step by name; `like` leaves the arrays out.

    Raises:
        ValueError: unless the budget is whole pages and below the context.
    """
    context, budget, page_size, batch, num_kv_heads, group, size, dtype = sizes
    if budget % page_size or context % page_size or not 0 < budget < context:
        raise ValueError(
            f"{budget=} and {context=} must be multiples of {page_size=}, the budget "
            "the smaller one."
        )
    make = jax.eval_shape if like else (lambda f: jax.block_until_ready(jax.jit(f)()))
    num_pages = context // page_size
    width = np.dtype(jnp.dtype(dtype)).itemsize
    token = 2 * batch * num_kv_heads * size * width  # bytes, key and value
    shape = batch, num_kv_heads

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32)

    def tokens(seed, width):
        # Random numbers for a gigabyte take longer than all measurements.
        block = normal(seed, *shape, min(BLOCK, context), width)
        times = -(-context // block.shape[2])
        scale = 1 + 0.1 * normal(seed + 1, *shape, times, 1, 1)
        made = (block[:, :, None] * scale).reshape(*shape, -1, width)
        return made[:, :, :context].astype(dtype)

    def pages():
        return tokens(2, 2 * size).reshape(*shape, num_pages, page_size, 2 * size)

    q = make(lambda: normal(0, batch, num_kv_heads * group, 1, size).astype(dtype))
    k, v = make(lambda: tokens(2, size)), make(lambda: tokens(4, size))
    fused = make(pages)
    low = make(lambda: -jnp.abs(tokens(6, size)[:, :, :num_pages]))
    high = make(lambda: jnp.abs(tokens(8, size)[:, :, :num_pages]))
    position = make(lambda: jnp.full((batch, 1), context - 1, jnp.int32))
    scores = make(lambda: normal(10, *shape, num_pages))
    ids = make(
        lambda: jnp.sort(
            jax.vmap(jax.vmap(lambda key: jax.random.permutation(key, num_pages)))(
                jax.random.split(jax.random.key(11), shape)
            )[..., : budget // page_size].astype(jnp.int32)
        )
    )

    def bounds(q, low, high, group_reduce="none"):
        return page_bounds(q[:, :, 0], low, high, group_reduce=group_reduce)

    def moments(q, mean, variance):
        return page_moments(q[:, :, 0], mean, variance)

    def chosen(scores):
        return top_k(scores, budget // page_size, order="index")[1]

    def sparse(q, fused, low, high, position):
        return attend(q, fused, chosen(bounds(q, low, high, "mean")), position)

    def entmax_pages(q, fused, ids, position):
        options = {"sm_scale": size**-0.5, "alpha": ALPHA}
        found = attention.attend_pages(
            q[:, :, 0], fused, ids, position[:, 0] + 1, **options
        )
        return attention.fastest(found, q, fused, ids, position, **options)

    def sparse_entmax(q, fused, low, high, position):
        return entmax_pages(q, fused, chosen(bounds(q, low, high, "max")), position)

    def clusters(q, ids):
        """Means of keys that score `CLUSTER` under every query of the group."""
        grouped = q[:, :, 0].astype(jnp.float32).reshape(*shape, group, size)
        towards = grouped / jnp.square(grouped).sum(-1, keepdims=True)
        centre = CLUSTER * size**0.5 * towards.sum(2)
        listed = selection.is_listed(ids, num_pages)[..., None]
        return jnp.where(listed, centre[:, :, None], 0.0)

    def gaussian_pages(q, mean, variance, position):
        length = position[:, 0] + 1
        historical = entmaxkv_page_bounds.is_historical(length, num_pages, page_size)
        mu, sigma = entmaxkv_page_bounds.score_moments(
            q[:, :, 0], mean, variance, sm_scale=size**-0.5
        )
        middle, spread = entmaxkv_page_bounds.global_moments(mu, sigma, historical)
        count = page_size * historical.sum(-1).astype(jnp.float32)[:, None, None]
        tau = threshold.estimate_threshold(
            middle[..., None], spread[..., None], count, alpha=ALPHA
        )
        margins = entmaxkv_page_bounds.gaussian_margins(
            mu, sigma, tau, historical, alpha=ALPHA, page_size=page_size
        )
        margins = margins.reshape(*shape, group, num_pages).max(2)
        wanted = jnp.where(margins > 0, margins, -jnp.inf)
        options = {"page_size": page_size, "size": num_pages}
        return entmaxkv_page_bounds.list_pages(wanted, length, **options)[0]

    def sparse_gaussian(q, fused, mean, variance, position):
        ids = gaussian_pages(q, mean, variance, position)
        return entmax_pages(q, fused, ids, position)

    attend = functools.partial(page_attention, sm_scale=size**-0.5)
    full = functools.partial(decode_attention, sm_scale=size**-0.5)
    entmax = functools.partial(entmax_attention, alpha=ALPHA, sm_scale=size**-0.5)
    mean = make(lambda: jnp.zeros((*shape, num_pages, size), jnp.float32))
    if not like:
        mean = make(lambda: clusters(q, ids))
    variance = make(lambda: jnp.full((*shape, num_pages, size), 1e-4, jnp.float32))
    of_pages, of_budget = num_pages * token, budget * token
    logits = 4 * batch * num_kv_heads * group * context
    return {
        "copy": Operation(lambda x: -x, (k,), context * token, in_place=True),
        "full": Operation(full, (q, k, v, position), context * token),
        "entmax full": Operation(entmax, (q, k, v, position), context * token),
        "full, logits": Operation(
            functools.partial(full, with_logits=True),
            (q, k, v, position),
            context * token + logits,
        ),
        "page_bounds": Operation(bounds, (q, low, high), of_pages),
        "page_moments": Operation(moments, (q, low, high), of_pages),
        "top_k": Operation(chosen, (scores,), num_pages * batch * num_kv_heads * 4),
        "page_attention": Operation(attend, (q, fused, ids, position), of_budget),
        "page_attention, entmax": Operation(
            functools.partial(attend, alpha=ALPHA), (q, fused, ids, position), of_budget
        ),
        "sparse": Operation(
            sparse, (q, fused, low, high, position), of_pages + of_budget
        ),
        "sparse, entmax": Operation(
            sparse_entmax, (q, fused, low, high, position), of_pages + of_budget
        ),
        # As many pages: means are such that these, and the newest, pass the threshold.
        "sparse, entmax, gaussian": Operation(
            sparse_gaussian,
            (q, fused, mean, variance, position),
            of_pages * 4 // width + of_budget,
        ),
    }
