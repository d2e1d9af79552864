"""Gains of estimating what is not read, head by head: to abstain where it hurts.

A head's gain is 1 where completion lowered the error of its output on calibration
text, else 0. A lower error of a layer's output need not be a better prediction.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kvjax.decoding.reader import prefill
from kvjax.evaluation import fidelity
from kvjax.interface import LanguageModel, Method


class Calibration(NamedTuple):
    """Relative L2 error of each head's output against full attention, means."""

    alone: Float[np.ndarray, "L Hq"]  # retrieval alone
    completed: Float[np.ndarray, "L Hq"]

    @property
    def gain(self) -> Float[np.ndarray, "L Hq"]:
        """lam of each head: 1 where completion helped, else 0."""
        return (self.completed < self.alone).astype(np.float32)


def head_errors(
    model: LanguageModel,
    reference: Method,
    method: Method,
    windows: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch: int = 1,
    chunk_size: int = 1024,
) -> Float[np.ndarray, "L Hq"]:
    """The error of a method's heads on the last tokens of windows of equal length.

    Args:
        reference: full attention, whose outputs every layer is fed.
        new_tokens: how many of a window's tokens are decoded.
    """
    both = fidelity.side_by_side(reference, method)
    errors = []
    for first in range(0, len(windows), batch):
        rows = np.array(windows[first : first + batch], np.int32)
        prompts = [row[:-new_tokens].tolist() for row in rows]
        read = prefill(
            model, both, prompts, max_new_tokens=new_tokens, chunk_size=chunk_size
        )
        states = fidelity.teacher_forced(
            model.decoder,
            both,
            model.params,
            read.states,
            jnp.asarray(rows[:, -new_tokens:]),
        )
        errors.append(fidelity.layers(states).error)
    return np.concatenate(errors, axis=1).mean(1)


def calibrate(
    model: LanguageModel,
    reference: Method,
    alone: Method,
    completed: Method,
    windows: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch: int = 1,
) -> Calibration:
    """Both methods' errors on the same windows, at equal budgets.

    Raises:
        ValueError: unless there are windows, all longer than `new_tokens`.
    """
    if not windows or min(map(len, windows)) <= new_tokens:
        raise ValueError(
            f"calibration needs windows of more than {new_tokens=} tokens, and there "
            f"are {len(windows)}."
        )
    found = [
        head_errors(
            model, reference, method, windows, new_tokens=new_tokens, batch=batch
        )
        for method in (alone, completed)
    ]
    return Calibration(*found)


def summary(found: Calibration) -> list[str]:
    """Lines for people: every head, and how many are helped."""
    lines = ["layer  head  retrieval alone  completed"]
    for layer, head in np.ndindex(found.alone.shape):
        alone, completed = found.alone[layer, head], found.completed[layer, head]
        verdict = "" if completed < alone else "  abstains"
        lines.append(f"{layer:>5} {head:>5} {alone:>16.4f} {completed:>10.4f}{verdict}")
    kept = np.where(found.gain > 0, found.completed, found.alone)
    helped, heads = int(found.gain.sum()), found.gain.size
    lines.append(
        f"mean relative error {found.alone.mean():.4f} alone, "
        f"{found.completed.mean():.4f} completed, {kept.mean():.4f} where it helps: "
        f"{helped} of {heads} heads"
    )
    return lines
