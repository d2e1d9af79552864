"""Batches of a training step: sequences with a weight per target, packed into rows.

B    rows    T    targets per row    n    targets of one sequence
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Sample(NamedTuple):
    """One sequence, not yet packed: `tokens[i + 1]` is the target after `tokens[i]`.

    `weights` are the loss's; `answers` are the targets that can be known only from
    earlier in the sequence, over which accuracy is counted.
    """

    tokens: Int[np.ndarray, "n1"]  # n + 1
    weights: Float[np.ndarray, "n"]
    answers: Bool[np.ndarray, "n"]


class Batch(NamedTuple):
    """Rows of sequences, on the host or on devices.

    The loss is ``sum(weights * cross_entropy) / sum(weights)`` over the whole batch,
    whatever the number of devices and of accumulated parts.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]  # 0 = not trained on
    answers: Bool[Array, "B T"]
    sources: Int[Array, "B T"]  # index of the source a target is from; of metrics only
    # Of packed rows; None where a row is one sequence, padding at its end.
    segments: Int[Array, "B T"] | None  # 1, 2, ... numbers the sequences; 0 = padding
    positions: Int[Array, "B T"] | None  # of a token in its own sequence
