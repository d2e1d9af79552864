"""Bytes that a comparison takes at its worst moment, and bytes that the machine has.

Weights and states are counted by their shapes; temporaries are an estimate.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cost import planning
from kvjax.evaluation import compare
from kvjax.evaluation.compare_inputs import Settings
from kvjax.interface import DecoderLM, Method

REFERENCE = "full"

# With 30 layers on a CPU: 2.49 GB while compiling and 1.77 afterwards; five methods
# that read together, 3.26 GB at the peak, of which all else here counts 2.6.
COMPILING = 24_000_000  # bytes a layer
PROCESS = 400_000_000  # bytes of Python and JAX before any of it


class Need(NamedTuple):
    """Bytes of a comparison."""

    weights: int
    states: int  # of what reads together, and of the copies that decoding uses up
    temporaries: int  # an estimate

    @property
    def total(self) -> int:
        return sum(self)


class Fit(NamedTuple):
    """A way to run a comparison so that it fits, as far as it can be made to."""

    batch: int
    room: int  # for `compare.compare`
    need: Need


def fit(
    decoder: DecoderLM,
    methods: Mapping[str, Method],
    settings: Settings,
    *,
    weights: int,
    mlp_width: int,
    room: int,
    free: int | None,
) -> Fit:
    """The most rows together, at most the settings', whose estimate is within `free`.

    Fewer methods read together before the last row is alone. If nothing fits, it is one
    row, and one method beside the reference.

    Args:
        decoder: of the model.
        methods: by name, the reference among them.
        settings: their batch is the most.
        weights: bytes of the model's.
        mlp_width: elements of the widest hidden state inside of a layer.
        room: bytes of methods that read together, states and programs, at most.
        free: bytes, before the weights are there; None: as many as it takes.
    """
    plans = {
        name: planning.plan(
            decoder,
            method,
            weights=planning.Weights(weights, weights),
            mlp_width=mlp_width,
            context=settings.context,
            new_tokens=settings.new_tokens,
            chunk_size=settings.chunk_size,
        )
        for name, method in methods.items()
    }
    fits = (
        Fit(*tried, _need(decoder, methods, plans, settings, *tried))
        for tried in _tries(settings, room)
    )
    fitted = next(fits)
    while free is not None and fitted.need.total > free:
        smaller = next(fits, None)
        if smaller is None:
            break
        fitted = smaller
    return fitted


def _tries(settings: Settings, room: int) -> Iterator[tuple[int, int]]:
    """`(batch, room)`: halves of the batch, and then methods one by one."""
    batch = settings.batch
    while batch:
        yield batch, room
        batch //= 2
    yield 1, 0


def _need(decoder, methods, plans, settings, batch, room) -> Need:
    settings = dataclasses.replace(settings, batch=batch)
    states = together = 0
    for names in compare.groups(decoder, methods, methods[REFERENCE], settings, room):
        readers = [methods[name] for name in (REFERENCE, *names)]
        together = max(together, len(names))
        states = max(states, compare.bytes_together(decoder, readers, settings))
    temporaries = max(
        max(plan.prompt_temporaries, plan.decode_temporaries) for plan in plans.values()
    )
    predicted = settings.new_tokens * decoder.vocab_size
    # Logits of all windows under the reference and of a batch under a method, given
    # tokens and chosen ones, in float32; and what the layers of the first are given.
    logits = 4 * (settings.windows + 3 * batch) * predicted
    spec = decoder.cache_spec(1, 1)
    heads = spec.num_q_heads + 2 * spec.num_kv_heads
    step = heads * spec.head_dim * jnp.dtype(spec.dtype).itemsize * decoder.num_layers
    recorded = settings.windows * settings.new_tokens * step
    weights = plans[REFERENCE].weights.held
    programs = (COMPILING + together * compare.PROGRAMS) * decoder.num_layers + PROCESS
    temporaries = batch * temporaries + logits + recorded + programs
    return Need(weights, batch * states, temporaries)


def free_bytes(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that this process may still take: of the accelerator, or of the machine.

    On a machine the least of what is available, what its control groups leave and what
    its limit of addresses leaves; None where nothing of it can be read.

    Args:
        root: where `proc` and `sys` are.
    """
    stats = jax.devices()[0].memory_stats() or {}  # of a CPU there are none
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    limits = [*_available(root), *_left_by_groups(root), *_left_by_limit(root)]
    return max(min(limits), 0) if limits else None


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return ""


def _field(text: str, name: str) -> int | None:
    """The number behind a name at the beginning of a line."""
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if words[:1] == [name] and words[1:2] and words[1].isdigit():
            return int(words[1])
    return None


def _available(root: pathlib.Path) -> Iterator[int]:
    found = _field(_read(root / "proc/meminfo"), "MemAvailable")
    if found is not None:
        yield 1024 * found


def _left_by_groups(root: pathlib.Path) -> Iterator[int]:
    """Bytes left in each control group with a limit that this process is in."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            mount = root / "sys/fs/cgroup" / controllers
            inner = mount / path.lstrip("/")
            folders += [inner, *inner.parents]
    names = (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
    for folder in dict.fromkeys(folders):
        for limit, used in names:
            most, now = (_read(folder / name).strip() for name in (limit, used))
            if most.isdigit() and now.isdigit():
                # Files that are kept in memory for speed alone go when it is needed.
                given_back = _field(_read(folder / "memory.stat"), "inactive_file")
                yield int(most) - int(now) + (given_back or 0)


def _left_by_limit(root: pathlib.Path) -> Iterator[int]:
    try:
        import resource
    except ImportError:  # of Unix
        return
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _field(_read(root / "proc/self/status"), "VmSize")
    if most != resource.RLIM_INFINITY and used is not None:
        yield most - 1024 * used
