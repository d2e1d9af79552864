"""Progress on stderr: bars in a terminal, elsewhere lines with the time left."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

EVERY = 5.0  # seconds between two lines, in the first minutes
OF_LONG = 60  # parts of the time so far: of an hour, lines are a minute apart

# (name of a part, fraction of it that is done; None: it is no part of the work)
Update = Callable[[str, float | None], None]


@contextlib.contextmanager
def show_progress(total: int = 1) -> Iterator[Update]:
    """Shows how far work is, until the block ends.

    Where stderr is no terminal, a line every few seconds, whether or not anything was
    done meanwhile, and one whenever a part of long work is done.

    Args:
        total: parts of the work, for the time that is left.

    Yields:
        A function of a part's name and the fraction of it that is done.
    """
    if sys.stderr.isatty():
        with _bars(total) as update:
            yield update
        return
    lines = _Lines(total)
    ended = threading.Event()

    def beat():
        while not ended.wait(lines.until_next()):
            lines.write_if_due()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield lines.update
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _bars(total: int) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars: dict[str, Any] = {}
    done: dict[str, float] = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:
        whole = bar.add_task("all", total=total) if total > 1 else None

        parts = total

        def update(name: str, fraction: float | None) -> None:
            nonlocal parts
            if fraction is None:
                parts -= 1
                done.pop(name, None)
                if name in bars:
                    bar.update(bars[name], visible=False)
                if whole is not None:
                    bar.update(whole, total=parts, completed=sum(done.values()))
                return
            if name not in bars:
                bars[name] = bar.add_task(name, total=1.0)
            bar.update(bars[name], completed=fraction)
            done[name] = fraction
            if whole is not None:
                bar.update(whole, completed=sum(done.values()))

        yield update


class _Lines:
    """The lines of one piece of work."""

    def __init__(self, total: int):
        self._total = total
        self._done: dict[str, float] = {}
        self._start = self._written = time.monotonic()
        self._lock = threading.Lock()

    def update(self, name: str, fraction: float | None) -> None:
        if fraction is None:
            self._total -= 1
            self._done.pop(name, None)
            return
        is_news = fraction >= 1 > self._done.get(name, 0.0)
        self._done[name] = fraction
        if time.monotonic() - self._written >= 1.0 and is_news:
            self.write()

    def until_next(self) -> float:
        """Returns the seconds until a line is due."""
        now = time.monotonic()
        between = max(EVERY, (now - self._start) / OF_LONG)
        return max(self._written + between - now, 0.0)

    def write_if_due(self) -> None:
        if not self.until_next():
            self.write()

    def write(self) -> None:
        with self._lock:
            self._written = time.monotonic()
            elapsed = self._written - self._start
            line = f"kvjax: {summary(dict(self._done), self._total, elapsed)}"
            with contextlib.suppress(OSError):  # nobody reads it: no reason to stop
                print(line, file=sys.stderr, flush=True)


def summary(done: dict[str, float], total: int, seconds: float) -> str:
    """A line on work whose parts are `done` to some fraction, after so many seconds."""
    share = sum(done.values()) / max(total, len(done), 1)
    running = [name for name, fraction in done.items() if fraction < 1]
    parts = [f"{share:.0%} done", f"{_minutes(seconds)} so far"]
    if 0.02 < share < 1:  # before, a guess would be of compiling alone
        parts.append(f"about {_minutes(seconds * (1 - share) / share)} left")
    if running:
        more = f" and {len(running) - 1} more" if len(running) > 1 else ""
        parts.append(f"at {running[0]}{more}")
    return ", ".join(parts)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
