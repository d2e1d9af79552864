"""The seconds of a generation: of the prompt, the decode steps, and compiling.

Nothing is run twice for it. JAX says when it has traced or compiled something and how
long that took; what runs meanwhile is waited for first, so that what is left of a
stretch is the work itself.
"""

import contextlib
import contextvars
import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax

Kind = Literal["prompt", "decode"]

# Of JAX's events, those of tracing, lowering and compiling.
_COMPILING = "/jax/core/compile/"


@dataclasses.dataclass
class Stretch:
    """A part of the work, and the tokens of all rows that it read or decoded."""

    kind: Kind
    tokens: int = 0
    seconds: float = 0.0  # without `compiling`
    compiling: float = 0.0


@dataclasses.dataclass
class Clock:
    """The stretches that were timed so far."""

    stretches: list[Stretch] = dataclasses.field(default_factory=list)
    # Beginning and end of whatever was traced or compiled: some lie inside of others.
    compilations: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def compiled(self, start: float) -> float:
        """Returns seconds since `start` in which something was traced or compiled."""
        seconds, until = 0.0, start
        for begin, end in sorted(self.compilations):
            seconds += max(end - max(begin, until), 0.0)
            until = max(until, end)
        return seconds

    def total(self, kind: Kind) -> Stretch:
        """Returns the stretches of a kind, added up."""
        parts = [part for part in self.stretches if part.kind == kind]
        return Stretch(
            kind,
            sum(part.tokens for part in parts),
            sum((part.seconds for part in parts), 0.0),
            sum((part.compiling for part in parts), 0.0),
        )


_running: contextvars.ContextVar[Clock | None] = contextvars.ContextVar(
    "clock", default=None
)


@contextlib.contextmanager
def timed() -> Iterator[Clock]:
    """Times the generation that runs inside: a :class:`Clock` that fills up."""
    _listen()
    clock = Clock()
    token = _running.set(clock)
    try:
        yield clock
    finally:
        _running.reset(token)


@contextlib.contextmanager
def stretch(kind: Kind) -> Iterator[Stretch]:
    """Times what runs inside, if anybody asked; it is finished when the block ends."""
    clock, part, start = _running.get(), Stretch(kind), time.perf_counter()
    yield part
    if clock is not None:
        elapsed = time.perf_counter() - start
        part.compiling = clock.compiled(start)
        part.seconds = elapsed - part.compiling
        clock.stretches.append(part)


def settled(arrays: Any) -> Any:
    """Returns arrays, waited for if anybody times: something else may compile next."""
    return arrays if _running.get() is None else jax.block_until_ready(arrays)


@functools.cache
def _listen() -> None:
    # Once: what listens cannot be taken away again.
    def listener(event: str, duration_secs: float, **about: Any) -> None:
        del about
        clock = _running.get()
        if clock is not None and event.startswith(_COMPILING):
            end = time.perf_counter()
            clock.compilations.append((end - duration_secs, end))

    jax.monitoring.register_event_duration_secs_listener(listener)


def document(clock: Clock, start: float = 0.0) -> dict[str, float | int | None]:
    """Returns the figures by name, compiling since `start`; no rate is of nothing."""
    found: dict[str, float | int | None] = {}
    for kind in ("prompt", "decode"):
        part = clock.total(kind)
        rate = part.tokens / part.seconds if part.tokens and part.seconds > 0 else None
        found |= {
            f"{kind}_tokens": part.tokens,
            f"{kind}_seconds": part.seconds,
            f"{kind}_tokens_per_second": rate,
        }
    return found | {"compile_seconds": clock.compiled(start)}


def line(clock: Clock, start: float = 0.0) -> str:
    """Returns the figures in a line, compiling since `start`."""
    found = document(clock, start)
    said = []
    for kind in ("prompt", "decode"):
        text = f"{kind} {found[f'{kind}_tokens']:,} tokens"
        if (rate := found[f"{kind}_tokens_per_second"]) is not None:
            text += f" in {found[f'{kind}_seconds']:.2f} s ({rate:,.1f} tokens/s)"
        said.append(text)
    return ", ".join([*said, f"compiling {found['compile_seconds']:.2f} s"])
