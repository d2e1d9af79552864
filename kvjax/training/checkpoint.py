"""Checkpoints of a run: saved in the background, complete or absent, checked on return.

A checkpoint carries a fingerprint of every array, computed before it left the device:
what comes back is bit for bit what was saved, or an error.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from kvjax import files
from kvjax.files import arrays

FOLDER = "checkpoints"


DAMAGED = "damaged"  # where checkpoints that cannot be read are put aside


# On a file that is missing, cut or not its own, orbax raises what comes, `Exception`
# itself among it; on a write that fails, these.
_READ = Exception


class NotFiniteError(ValueError):
    """A loss or gradient that is not finite."""


class Restored(NamedTuple):
    """A checkpoint read back: the state, and the JSON document saved beside it."""

    step: int
    state: Any
    about: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Keep:
    """Orbax's rule of what stays: the newest `count`, and the best."""

    count: int
    sign: int  # 1 if the least metric is best, -1 if the greatest
    metrics: dict[int, float]  # by step, of those that were measured

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [info.step for info in checkpoints]
        measured = [step for step in steps if step in self.metrics]
        kept = set(sorted(steps)[-self.count :])
        if measured:
            kept.add(min(measured, key=lambda step: self.sign * self.metrics[step]))
        return [step in kept for step in steps]


class Checkpoints(NamedTuple):
    """The checkpoints of one run; see :func:`open_folder`."""

    folder: pathlib.Path
    manager: ocp.CheckpointManager
    metrics: dict[int, float]

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self.manager.all_steps())

    def save(
        self,
        step: int,
        state: Any,
        about: Mapping[str, Any],
        metric: float | None = None,
    ) -> None:
        """Begins to save; the arrays may be donated when this returns.

        Args:
            about: JSON values that belong to the state.
            metric: by which the best checkpoint is kept.

        Raises:
            OSError: if this save, or an earlier one, failed; the older ones survive.
        """
        state = arrays.dense(state)
        about = {
            "about": dict(about),
            "metric": metric,
            "leaves": arrays.describe(state),
            "fingerprints": [
                int(f) for f in jax.device_get(arrays.fingerprints(state))
            ],
        }
        if metric is not None:
            self.metrics[step] = metric
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    about=ocp.args.JsonSave(about),
                ),
            )
        except arrays.WRITE as error:
            raise self._failed(error) from error

    def not_finite(self, step: int, dtype: str, what: str, fix: str) -> NotFiniteError:
        """The error of a step whose `what` is not finite; no checkpoint has seen it."""
        self.wait()
        saved = self.steps()
        kept = (
            f"the last good checkpoint is that of step {saved[-1]} in {self.folder}"
            if saved
            else "no checkpoint was saved before it"
        )
        return NotFiniteError(
            f"step {step} in {dtype}: {what}: training stopped, and {kept}. The same "
            f"again would end the same: {fix}."
        )

    def wait(self) -> None:
        """Returns when everything is on disk. Raises as :meth:`save`."""
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except arrays.WRITE as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits and frees what the manager holds. Raises as :meth:`save`."""
        try:
            self.manager.close()
        except arrays.WRITE as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> OSError:
        _remove_partial(self.folder)  # gives the space back
        kept = [int(p.name) for p in self.folder.iterdir() if p.name.isdecimal()]
        newest = f"that of step {max(kept)} is whole" if kept else "there is none yet"
        return OSError(
            f"a checkpoint could not be written to {self.folder} "
            f"({files.reason(error)}); {newest}. Make room and run again with --resume."
        )


def open_folder(out: pathlib.Path, *, keep: int, best_mode: str = "min") -> Checkpoints:
    """The checkpoints in `out`; what a crash left half written is removed.

    Args:
        keep: newest ones kept; of those saved with a metric, the best one is too.
        best_mode: whether the least or greatest metric is best, "min" or "max".
    """
    arrays.quiet_orbax()
    folder = (out / FOLDER).resolve()
    _remove_partial(folder)
    metrics = {}
    for file in folder.glob("*/about/metadata"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged
            metric = json.loads(files.read_text(file))["metric"]
            if metric is not None:
                metrics[int(file.parent.parent.name)] = float(metric)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_Keep(keep, 1 if best_mode == "min" else -1, metrics),
        save_root_metadata=False,
    )
    manager = ocp.CheckpointManager(folder, options=options)
    return Checkpoints(folder, manager, metrics)


def _remove_partial(folder: pathlib.Path) -> None:
    for partial in folder.glob("*.orbax-checkpoint-tmp*"):
        files.remove(partial)


def restore(checkpoints: Checkpoints, step: int, like: Any) -> Restored:
    """The checkpoint of `step`, its arrays placed as `like` says.

    Args:
        like: pytree of `jax.ShapeDtypeStruct` with shardings, of any mesh.

    Raises:
        DamagedError: if it cannot be read, or is not bit for bit what was saved.
        ValueError: if it is of another model or optimizer; names what differs.
    """
    where = checkpoints.folder / str(step)
    try:
        read = checkpoints.manager.restore(
            step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
        )["about"]
        document, leaves, expected = (
            read["about"],
            read["leaves"],
            read["fingerprints"],
        )
    except _READ as error:
        raise _damaged(where, error) from error
    wanted = arrays.describe(like)
    if leaves != wanted:
        raise ValueError(
            f"{where} is of another model or optimizer: {_differ(leaves, wanted)}"
        )
    try:
        state = checkpoints.manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
        )["state"]
    except _READ as error:
        raise _damaged(where, error) from error
    actual = [int(f) for f in jax.device_get(arrays.fingerprints(state))]
    if actual != expected:
        wrong = [n for n, a, b in zip(wanted, actual, expected, strict=True) if a != b]
        raise arrays.DamagedError(
            f"{where} is damaged: {len(wrong)} arrays are not what was saved, first "
            f"{wrong[0]}."
        )
    return Restored(step, state, document)


def newest(
    checkpoints: Checkpoints, like: Any, notice: Callable[[str], None]
) -> Restored | None:
    """The newest checkpoint that is whole; damaged newer ones are put aside.

    Args:
        notice: told in a line of every checkpoint that is put aside.

    Returns:
        None if the folder has no checkpoint at all.

    Raises:
        ValueError: if there are checkpoints and all are damaged, or as :func:`restore`.
    """
    damaged = []
    for step in reversed(checkpoints.steps()):
        try:
            restored = restore(checkpoints, step, like)
        except arrays.DamagedError as error:
            damaged.append((step, error))
            continue
        for bad, error in damaged:
            aside = checkpoints.folder.parent / DAMAGED
            notice(f"{error} It is put aside in {aside}.")
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(bad), ignore_errors=True)
            (checkpoints.folder / str(bad)).rename(aside / str(bad))
        if damaged:
            checkpoints.manager.reload()
        return restored
    if damaged:
        raise ValueError(f"no checkpoint can be read; the newest: {damaged[0][1]}")
    return None


def _damaged(where: pathlib.Path, error: Exception) -> arrays.DamagedError:
    reason = " ".join(str(error).split())[:200]
    return arrays.DamagedError(
        f"{where} is damaged, or no checkpoint of kvjax train "
        f"({type(error).__name__}: {reason})."
    )


def _differ(saved: Mapping[str, list], wanted: Mapping[str, list]) -> str:
    def show(leaf):
        return "nothing" if leaf is None else f"{leaf[1]}{tuple(leaf[0])}"

    names = [n for n in {**wanted, **saved} if saved.get(n) != wanted.get(n)]
    name = names[0]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{name} is {show(saved.get(name))} there and {show(wanted.get(name))} in this "
        f"config{more}."
    )
