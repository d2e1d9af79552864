"""A quantiser of NumPy's: what rows of 8 or 4 bits are when they are read again."""

import ml_dtypes
import numpy as np
import scipy.linalg


def hadamard(size):
    """Of a power of two, or blocks of the largest that divides the size."""
    block = size & -size
    matrix = scipy.linalg.hadamard(block) / np.sqrt(block)
    return np.kron(np.eye(size // block), matrix)


def up(x):
    """The nearest bfloat16 that is not below: found by trying."""
    near = np.asarray(x, np.float32).astype(ml_dtypes.bfloat16)
    above = np.nextafter(near, np.asarray(np.inf, ml_dtypes.bfloat16))
    return np.where(near.astype(np.float32) >= x, near, above).astype(np.float64)


def read_again(rows, bits, group, turned):
    """Rows `(..., D)` of float32, in float64."""
    size = rows.shape[-1]
    turn = hadamard(size) if turned else np.eye(size)
    # Codes are of float32 numbers.
    x = (rows.astype(np.float64) @ turn).astype(np.float32)
    if bits == 8:
        step = up(np.abs(x).max(-1, keepdims=True) / np.float32(127))
        codes = np.rint(x / np.where(step == 0, 1, step))
        return np.clip(codes, -127, 127) * step @ turn
    groups = x.reshape(*x.shape[:-1], size // group, group)
    low = -up(-groups.min(-1, keepdims=True))
    high = groups.max(-1, keepdims=True)
    step = up((high - low.astype(np.float32)) / np.float32(15))
    codes = np.rint((groups - low) / np.where(step == 0, 1, step))
    read = low + np.clip(codes, 0, 15) * step
    return read.reshape(rows.shape) @ turn
