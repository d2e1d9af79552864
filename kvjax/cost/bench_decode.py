"""The speed of decoding under a method, beside the time that its bytes would take.

One prompt under each method, then decode steps in blocks, each a sample. The bytes of a
step are the weights and the cache that it reads, by the methods' own accounting; the
yardstick is a buffer read and written in place, timed between the methods.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import accounting
from kvjax.cost import bench_kernels
from kvjax.decoding import timing
from kvjax.decoding.generate import continued
from kvjax.decoding.reader import prefill
from kvjax.interface import LanguageModel, Method
from kvjax.registry import as_method
from kvjax.stores.buffers import num_bytes

MOST_COPIED = 1 << 30  # bytes, beyond every cache: more tell no other bandwidth


class Step(NamedTuple):
    """A decode step of all rows; seconds of one, over all samples."""

    method: str
    context: int
    num_bytes: int  # of weights and cache that it must read
    cache_bytes: int  # of them, the cache's
    floor: float  # seconds that the bytes take at the bandwidth of the copy
    median: float
    low: float  # quartiles
    high: float
    tokens_per_second: float  # of all rows
    prompt_tokens_per_second: float
    times_full: float | None  # how many times as fast as `full` at this context
    prompt_share: float = 1.0  # of the prompt's query-key pairs, those attended to


def run(
    model: LanguageModel,
    methods: Mapping[str, Method | str] | Sequence[str],
    tokens: Sequence[int],
    *,
    contexts: Sequence[int],
    steps: int = 16,
    repeats: int = 5,
    batch: int = 1,
    chunk_size: int = 512,
    copied: int | None = None,
    progress: Callable[[str, float], None] = lambda name, done: None,
) -> list[Step]:
    """Times decode steps under every method at every context.

    Args:
        model: which decodes.
        methods: by name, or spec strings.
        tokens: what the prompts are made of, from its beginning and again.
        contexts: tokens of a row when the last step is done.
        steps: of a sample.
        repeats: samples, after one that compiles.
        batch: rows, of the same prompt.
        chunk_size: most prompt tokens processed at once; a second reading takes the
            method's own `chunk`.
        copied: bytes that are read and written to tell the bandwidth; those of the
            largest step if left out, so that both are in the same caches, but no more
            than `MOST_COPIED`.
        progress: called with a part's name and the fraction of it that is done.

    Raises:
        ValueError: before any work: for a context that has no room for the steps, or is
            beyond the model's, and for sizes below 1.
    """
    if not isinstance(methods, Mapping):
        methods = {spec: spec for spec in methods}
    methods = {name: as_method(method) for name, method in methods.items()}
    sizes = {"steps": steps, "repeats": repeats, "batch": batch}
    for name, value in (sizes | {"chunk_size": chunk_size}).items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not tokens:
        raise ValueError("tokens is empty: give some to make prompts of.")
    generated = _generated(steps, repeats)
    for context in contexts:
        _check(model, methods, context, generated)
    weights = weight_bytes(model)
    length = {context: context - steps * repeats // 2 for context in contexts}
    cache = {  # in the middle of what is timed
        (name, context): batch
        * accounting.bytes_read(method, model.decoder, length[context], generated)
        for name, method in methods.items()
        for context in contexts
    }
    copied = copied or min(weights + max(cache.values()), MOST_COPIED)
    copies, found = [], []
    for context in contexts:
        prompt = np.resize(np.asarray(tokens, np.int32), context - generated).tolist()
        for name, method in methods.items():
            progress(f"{name}, {context:,} tokens", 0.0)
            copies += _copies(copied)
            clock = _decoded(
                model, method, [prompt] * batch, generated, steps, chunk_size
            )
            samples = [part for part in clock.stretches if part.kind == "decode"][1:]
            seconds = [batch * part.seconds / part.tokens for part in samples]
            rate = clock.total("prompt")
            read = cache[name, context]
            share = accounting.prompt_share(method, model.decoder, len(prompt))
            speed = rate.tokens / rate.seconds, share
            found.append((name, context, read, seconds, speed))
            progress(f"{name}, {context:,} tokens", 1.0)
    bandwidth = copied / float(np.median(copies))
    return _rows(found, weights, bandwidth, batch)


def weight_bytes(model: LanguageModel) -> int:
    """Returns the bytes of weights that a step reads."""
    # Of an embedding that is not the output matrix too, a step reads a line a row.
    config = getattr(model.decoder, "config", None)
    is_apart = config is not None and not getattr(config, "tied_embeddings", True)
    unread = num_bytes(model.params["embedding"]) if is_apart else 0
    return num_bytes(model.params) - unread


def _generated(steps: int, repeats: int) -> int:
    return 1 + steps * (repeats + 1)  # the prompt's own token, and a block to compile


def _check(model, methods, context, generated) -> None:
    if context <= generated:
        raise ValueError(
            f"{context=} must exceed the {generated} tokens that are generated: lower "
            "steps or repeats."
        )
    for name, method in methods.items():
        is_bound = not accounting.reads_any_length(method, model.decoder)
        if is_bound and context > model.decoder.context:
            raise ValueError(
                f"{context=} exceeds the {model.decoder.context} tokens the model was "
                f"made for, and {name} is not of constant memory: lower it."
            )


def _decoded(model, method, prompts, generated, steps, chunk_size) -> timing.Clock:
    with timing.timed() as clock:
        read = prefill(
            model, method, prompts, max_new_tokens=generated, chunk_size=chunk_size
        )
        options = {"max_new_tokens": generated, "eos_ids": (), "stream_every": steps}
        for _ in continued(model, method, read, **options):
            pass
    return clock


def _copies(num_bytes: int) -> list[float]:
    buffer = jnp.ones(max(num_bytes // 8, 1), jnp.float32)  # read, and written
    copy = bench_kernels.Operation(
        lambda x: -x, (buffer,), 2 * buffer.nbytes, in_place=True
    )
    seconds = bench_kernels.measure({"copy": copy}, 3)["copy"]
    return jax.tree.map(float, seconds)


def _rows(found, weights, bandwidth, batch) -> list[Step]:
    full = {
        context: float(np.median(seconds))
        for name, context, _, seconds, _ in found
        if name == "full"
    }
    rows = []
    for name, context, cache, seconds, (prompt_rate, share) in found:
        low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
        rows.append(
            Step(
                name,
                context,
                weights + cache,
                cache,
                (weights + cache) / bandwidth,
                median,
                low,
                high,
                batch / median,
                prompt_rate,
                full[context] / median if context in full else None,
                share,
            )
        )
    return rows
