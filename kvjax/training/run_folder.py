"""The folder of one run: its lock, config, metrics and exported model.

Everything here is whole at any moment: files are replaced in one step, and a resumed
run cuts off what was written after the checkpoint it goes on from.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvjax import files
from kvjax.interface import Params

CONFIG, METRICS, EVENTS = "config.yaml", "metrics.jsonl", "tensorboard"
MODEL, ADAPTER = "model", "adapter"  # a run ends with one of them
_LOCK, _NEW, _OLD = ".lock", ".{}.new", ".{}.old"


def check(out: pathlib.Path, *, resume: bool) -> None:
    """Raises unless a run can begin in `out`, or be resumed there.

    Raises:
        ValueError: if a run is there and `resume` is false, or the other way round.
        OSError: if `out` is a file, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is not a folder: give --out another.")
    files.check_place(out, within=True)
    holds_run = (out / CONFIG).is_file()
    if holds_run and not resume:
        raise ValueError(
            f"{out} holds a run already: continue it with --resume, or give another "
            "--out."
        )
    if resume and not holds_run:
        raise ValueError(
            f"{out} holds no run to resume: leave --resume out to begin one."
        )


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from training in it meanwhile.

    What a kill left half done is put right first.

    Raises:
        ValueError: if one is.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows, where nothing is locked
        fcntl = None
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is training in {out}.") from error
        _recover(out)
        yield


def _recover(out: pathlib.Path) -> None:
    files.remove_partial(out)
    for name in (MODEL, ADAPTER):
        old = out / _OLD.format(name)
        if old.is_dir() and not (out / name).exists():
            old.rename(out / name)  # it was to be replaced, and was not


def replace_model(
    out: pathlib.Path,
    params: Params,
    save: Callable[[Params, pathlib.Path], None],
    name: str = MODEL,
) -> None:
    """Has `save` write the folder of this name, replacing the one that is there."""
    new, old = (out / pattern.format(name) for pattern in (_NEW, _OLD))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        save(params, new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if (out / name).exists():
        (out / name).rename(old)
    new.rename(out / name)
    shutil.rmtree(old, ignore_errors=True)


def stopped(step: int, steps: int, out: pathlib.Path) -> str:
    """The message of a run that was broken off."""
    return (
        f"stopped after step {step} of {steps}, saved in {out}: run the same command "
        "with --resume to go on."
    )


def cut_metrics(path: pathlib.Path, step: int) -> None:
    """Removes the lines after `step`, and one that a crash left incomplete."""
    kept = []
    if path.is_file():
        for line in files.read_text(path).splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
    files.write_text(path, "".join(kept))


class Metrics:
    """`metrics.jsonl`, one line per record, and TensorBoard events of the same."""

    def __init__(self, out: pathlib.Path, step: int, *, tensorboard: bool):
        cut_metrics(out / METRICS, step)
        self._file = (out / METRICS).open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            # What was written after `step` is superseded.
            self._events = SummaryWriter(str(out / EVENTS), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """`record` has `step` and further numbers."""
        line = json.dumps(files.json_ready(record), allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error
        for name, value in record.items():
            if self._events is not None and name != "step":
                self._events.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """On disk before the checkpoint that a resumed run goes on from."""
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Ends both files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets `asked`, no more than that."""

    def __init__(self):
        self.asked = False
        self._before: dict[int, Any] = {}
        self._wakeup: int | None = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            # Whoever else looks after signals hears nothing of these.
            self._wakeup = signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup)
            self._wakeup = None

    def _ask(self, number, frame):
        del frame
        self.asked = True
        self.__exit__()
        name = signal.Signals(number).name
        print(
            f"{name}: saving after this step; once more to stop now.", file=sys.stderr
        )
