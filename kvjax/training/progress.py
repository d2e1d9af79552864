"""The progress of a run: a bar on a terminal, lines elsewhere; on stderr."""

import time
from collections.abc import Mapping
from typing import Any

_SHOWN = ("loss", "bits", "accuracy")


class Progress:
    """A bar with loss, tokens per second and time left."""

    def __init__(self, total: int, start: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._total, self._start, self._clock = total, start, time.monotonic()
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=start)

    def __enter__(self) -> "Progress":
        self._bar.start()
        self._clock = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def print(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, markup=False)

    def step(self, step: int) -> None:
        """`step` steps are done."""
        self._bar.update(self._task, completed=step)

    def show(self, record: Mapping[str, Any]) -> None:
        """A record of the log."""
        done = record["step"] - self._start
        left = (time.monotonic() - self._clock) / done * (self._total - record["step"])
        parts = [f"{name} {record[name]:.3f}" for name in _SHOWN if name in record]
        checked = [
            f"{name.removeprefix('held_out/')} {value:.3f}"
            for name, value in record.items()
            if name.startswith("held_out/")
        ]
        parts += [f"{record['tokens_per_s']:,.0f} tokens/s", f"{_clock(left)} left"]
        text = "  ".join(parts)
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            self.print(f"step {record['step']}/{self._total}  {text}")
        if checked:
            self.print(f"step {record['step']} held out: {'  '.join(checked)}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
