"""Tensors of a checkpoint by name, read one at a time; here from safetensors files.

torch is not needed, not for bfloat16 either.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvjax.files import read_text
from models.llama import git_lfs
from models.llama.packed import Blocks, Kind

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHOWN = 4  # names listed in an error before it is cut
_FLOATS = ("F64", "F32", "F16", "BF16")
# Endings of the tensors that lie beside quantized weights, in the order of asking.
_QUANTIZED = {
    "an AWQ or GPTQ checkpoint": ("qweight", "qzeros", "g_idx"),
    "a compressed-tensors checkpoint": ("weight_packed", "weight_shape"),
    "an FP8 checkpoint": ("weight_scale_inv", "weight_scale", "input_scale"),
    "a bitsandbytes checkpoint": ("absmax", "quant_map", "nested_absmax", "SCB"),
    "quantized by MLX": ("scales", "biases"),
}


class Stored(NamedTuple):
    """The matrices that a checkpoint has in integers."""

    # What each matrix is kept as: "int8" if it is rounded anew, None as floats.
    kinds: Mapping[str, Kind]
    read: Callable[[str], Blocks]  # of a matrix whose kind is a `Format`


class Tensors(NamedTuple):
    """The tensors of a checkpoint, by their names in the Hugging Face layout."""

    source: Path  # the checkpoint, for messages
    files: Mapping[str, Path]  # the file of each tensor; what is missing here is absent
    read: Callable[[str], np.ndarray]  # floats, matrices as (out, in)
    stored: Stored | None = None


def from_safetensors(directory: Path) -> Tensors:
    """Opens `model.safetensors`, or the shards that an index names.

    Raises:
        FileNotFoundError: if there are no weights or a shard is missing.
        ValueError: if a file is damaged; from `read`, if a tensor is quantized.
    """
    files = _locate(_find_files(directory))

    def read(name: str) -> np.ndarray:
        with open_file(files[name]) as tensors:
            stored = tensors.get_slice(name).get_dtype()
            if stored not in _FLOATS:
                raise ValueError(
                    f"{files[name].name}: tensor {name} is {stored}, which is not a "
                    f"plain float ({', '.join(_FLOATS)}); use the unquantized "
                    "checkpoint."
                )
            return tensors.get_tensor(name)

    return Tensors(directory, files, read)


def quantization(names: Iterable[str]) -> str | None:
    """Says what kind of quantized weights tensors of these names belong to, if any."""
    endings = {name.rpartition(".")[2] for name in names}
    return next((k for k, known in _QUANTIZED.items() if endings & {*known}), None)


def few(names: Iterable[str]) -> str:
    """Names for an error message, cut where there are many."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _find_files(directory: Path) -> Mapping[Path, set[str] | None]:
    """The weight files, each with the tensors its index expects in it."""
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    index = directory / INDEX
    if not index.is_file():
        if list(directory.glob("pytorch_model*.bin")):
            raise FileNotFoundError(
                f"{directory} has only pytorch_model.bin, which is not read because "
                "unpickling runs code; convert it to safetensors, for example with "
                "transformers' save_pretrained."
            )
        raise FileNotFoundError(
            f"{directory} has no weights: neither {SINGLE} nor {INDEX}."
        )
    git_lfs.check_content(index)
    try:
        weight_map = json.loads(read_text(index))["weight_map"]
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"shard {file!r} is no file name")
            files.setdefault(directory / file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged ({type(error).__name__}: {error}); download it again."
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of {len(files)} shards: "
            f"{few(missing)}; download them again."
        )
    return files


def open_file(file: Path):
    """Opens a safetensors file; its tensors are read one at a time.

    Raises:
        ValueError: if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    git_lfs.check_content(file)
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is damaged or truncated: {error}; "
            "download it again."
        ) from error


def _locate(files: Mapping[Path, set[str] | None]) -> dict[str, Path]:
    where = {}
    for file, expected in files.items():
        with open_file(file) as tensors:
            names = set(tensors.keys())
        absent = (expected or set()) - names
        if absent:
            raise ValueError(
                f"{file} lacks tensors its index names: {few(absent)}; download it "
                "again."
            )
        # A tensor in two shards is where the index says.
        where = dict.fromkeys(names, file) | where
        where |= dict.fromkeys(expected or (), file)
    return where
