"""Blocks of a GGUF file as codes with scales, for the types that are no more than that.

The layouts are those of ggml's `ggml-common.h`: 32 inputs a scale, in the K types eight
such groups a block, whose scales and minima are 6 bits of the block's.
"""

from typing import Literal

import numpy as np

from models.llama.packed import Blocks, Format

# What a matrix of each type is kept as. Codes of 5 bits have a byte each.
FORMATS = {
    "Q8_0": Format(8, "float16", has_lowest=False),
    "Q5_0": Format(8, "float16", has_lowest=False),
    "Q5_1": Format(8, "float16", has_lowest=True),
    "Q5_K": Format(8, "float32", has_lowest=True),
    "Q4_0": Format(4, "float16", has_lowest=False),
    "Q4_1": Format(4, "float16", has_lowest=True),
    "Q4_K": Format(4, "float32", has_lowest=True),
}
_FLOATS = ("F32", "F16", "BF16")
_SCALE, _LOWEST = ("scale", "<f2"), ("lowest", "<f2")
_PARTS, _HIGH = ("parts", "u1", 12), ("high", "u1", 4)
_BLOCKS = {
    "Q8_0": np.dtype([_SCALE, ("codes", "i1", 32)]),
    "Q5_0": np.dtype([_SCALE, _HIGH, ("codes", "u1", 16)]),
    "Q5_1": np.dtype([_SCALE, _LOWEST, _HIGH, ("codes", "u1", 16)]),
    "Q5_K": np.dtype(
        [_SCALE, _LOWEST, _PARTS, ("high", "u1", 32), ("codes", "u1", 128)]
    ),
    "Q4_0": np.dtype([_SCALE, ("codes", "u1", 16)]),
    "Q4_1": np.dtype([_SCALE, _LOWEST, ("codes", "u1", 16)]),
    "Q4_K": np.dtype([_SCALE, _LOWEST, _PARTS, ("codes", "u1", 128)]),
}


def format_of(kind: str) -> Format | Literal["int8"] | None:
    """Returns what a matrix of a type is kept as: "int8" rounds it anew.

    None leaves it as floats, as the file does.
    """
    return None if kind in _FLOATS else FORMATS.get(kind, "int8")


def read(rows: np.ndarray, kind: str) -> Blocks:
    """Splits rows of blocks `(O, bytes)` of a type of `FORMATS` into codes and scales.

    `lowest + scale * code` is what the package `gguf` makes of them, bit for bit.
    """
    blocks = np.ascontiguousarray(rows).view(_BLOCKS[kind])
    scales, lowest = _scales(blocks, kind)
    codes = _codes(blocks, kind)
    return Blocks(
        *(
            None if array is None else array.reshape(len(rows), -1)
            for array in (codes, scales, lowest)
        )
    )


def _scales(blocks: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    if kind not in ("Q4_K", "Q5_K"):
        return blocks["scale"], blocks["lowest"] if FORMATS[kind].has_lowest else None
    # Of eight groups, six bits each: those of the first four, their minima, and four
    # low bits of either of the last four, whose high bits lie above the former's.
    first, second, third = np.split(blocks["parts"], 3, axis=-1)
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], -1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1)
    wide = (blocks[name].astype(np.float32)[..., None] for name in ("scale", "lowest"))
    scale, minimum = wide
    return scale * scales, -(minimum * minima)


def _codes(blocks: np.ndarray, kind: str) -> np.ndarray:
    codes = blocks["codes"]
    if kind in ("Q8_0", "Q4_0", "Q4_1"):
        return codes
    if kind.endswith("_K"):  # the halves of 32 bytes are two groups
        codes = codes.reshape(*codes.shape[:-1], 4, 32)
        codes = np.stack([codes & 15, codes >> 4], -2)
        codes = codes.reshape(*codes.shape[:-3], 8, 32)
    else:
        codes = np.concatenate([codes & 15, codes >> 4], -1)
    if kind == "Q4_K":
        low, high = np.split(codes, 2, axis=-1)
        return low | high << 4
    fifth = np.unpackbits(blocks["high"], axis=-1, bitorder="little")
    if kind == "Q5_K":  # a byte has a bit of each group
        fifth = fifth.reshape(*fifth.shape[:-1], 32, 8).swapaxes(-1, -2)
    codes |= fifth << 4
    return codes if FORMATS[kind].has_lowest else codes.astype(np.int8) - np.int8(16)
