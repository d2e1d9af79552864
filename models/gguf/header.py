"""The header of a GGUF file: metadata and a map of the tensors, read and checked.

The tensors are left where they are, but the file must be long enough for all of them.
"""

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.llama import git_lfs
from models.llama.tensors import few

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Whatever a reader that trusts its file may stumble over.
_MALFORMED = (
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
    RecursionError,
)


class Header(NamedTuple):
    """A GGUF file without the numbers of its tensors."""

    path: Path
    architecture: str
    fields: Mapping[str, Any]  # `gguf.ReaderField` by key
    tensors: Mapping[str, Any]  # `gguf.ReaderTensor` by name, its data mapped

    def integer(self, key: str, default: int) -> int:
        """A whole number, at least 0."""
        value = self._value(key, int, "a whole number", default)
        if value < 0 and key in self.fields:
            raise ValueError(f"{self.path}: {key}={value} must be at least 0.")
        return value

    def number(self, key: str, default: float) -> float:
        """A number >= 0, as short as float32 allows: 1e-5, not 9.9999997e-06."""
        value = self._value(key, (int, float), "a number", default)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{self.path}: {key}={value} must be finite, at least 0.")
        return float(str(np.float32(value)))

    def text(self, key: str) -> str:
        """A string; empty if there is none."""
        return self._value(key, str, "text", "")

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        return self._value(key, bool, "true or false", default)

    def array(self, key: str, kind: type) -> list[Any]:
        """A list of elements of one kind; empty if there is none."""
        values = self._value(key, list, "a list", [])
        if not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{self.path}: {key} must hold {kind.__name__} only.")
        return values

    def length(self, key: str) -> int:
        """The number of elements of a list, which is not read; 0 if there is none."""
        return len(self.fields[key].data) if key in self.fields else 0

    def value(self, key: str) -> Any:
        """The value of a key that the file has, whatever its type."""
        try:
            return self.fields[key].contents()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {key} is not UTF-8: {error}.") from error

    def _value(self, key, kind, description, default) -> Any:
        if key not in self.fields:
            return default
        value = self.value(key)
        if not isinstance(value, kind) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise ValueError(f"{self.path}: {key}={value!r:.80} must be {description}.")
        return value


def read(path: Path) -> Header:
    """Opens a GGUF file of the Llama family.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no GGUF file, damaged, cut short, one part of several,
            big-endian, of another architecture, or quantized in a way that cannot be
            undone.
        ImportError: if the package `gguf` is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file.")
    _check_start(path)
    reader = _open(path)
    count = reader.fields.get("split.count")
    parts = 1 if count is None else count.contents()
    if parts != 1 or re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", path.name):
        raise ValueError(
            f"{path} is one part of several; merge them first, with llama.cpp's "
            "`llama-gguf-split --merge`."
        )
    fields = {key: field for key, field in reader.fields.items() if key[:5] != "GGUF."}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    header = Header(path, "", fields, tensors)
    architecture = header.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}."
        )
    _check_types(header)
    return header._replace(architecture=architecture)


def _check_start(path: Path) -> None:
    git_lfs.check_content(path)
    with path.open("rb") as file:
        magic, version = file.read(4), file.read(4)
    if magic != _MAGIC:
        raise ValueError(
            f"{path} is not a GGUF file: it begins with {magic!r}, not with {_MAGIC!r}."
        )
    if int.from_bytes(version, "big") in _VERSIONS:
        raise ValueError(
            f"{path} is big-endian, which is not supported; convert it with "
            "`gguf-convert-endian FILE.gguf little`."
        )
    if int.from_bytes(version, "little") not in _VERSIONS:
        raise ValueError(
            f"{path} is GGUF version {int.from_bytes(version, 'little')}; versions "
            f"{_VERSIONS[0]} and {_VERSIONS[1]} can be read: get a newer file."
        )
    if sys.byteorder != "little":
        raise ValueError("GGUF files can be read on little-endian machines only.")


def _open(path: Path):
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "a GGUF file needs the package gguf: pip install 'kvjax[gguf]'."
        ) from error
    size = path.stat().st_size

    class Reader(gguf.GGUFReader):
        """Stops where the file ends; the package would go on with what there is.

        Every token of a vocabulary is asked for, and is one array here. The package
        makes four, to allow for the other byte order, which `_check_start` refuses.
        """

        def _get(self, offset, dtype, count=1, override_order=None):
            del override_order
            start, count = int(offset), int(count)
            end = start + np.dtype(dtype).itemsize * count
            if end > size:
                raise EOFError(f"{end:,}")
            return np.ndarray(count, dtype, self.data, start)

    try:
        with np.errstate(over="ignore"):  # a damaged offset
            return Reader(path)
    except EOFError as error:
        raise ValueError(
            f"{path} is cut short: it has {size:,} bytes of {error} or more; download "
            "it again."
        ) from error
    except _MALFORMED as error:
        if "GGMLQuantizationType" in str(error):
            raise ValueError(
                f"{path} has tensors of a type that the package gguf does not know "
                f"({error}); choose another quantization, or `pip install -U gguf`."
            ) from error
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); download it again."
        ) from error


def _check_types(header: Header) -> None:
    import gguf

    kinds = {tensor.tensor_type for tensor in header.tensors.values()}
    unreadable = set()
    for kind in kinds:
        _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
        except NotImplementedError:
            unreadable.add(kind)
    if unreadable:
        names = [
            f"{name} ({tensor.tensor_type.name})"
            for name, tensor in header.tensors.items()
            if tensor.tensor_type in unreadable
        ]
        raise ValueError(
            f"{header.path}: {len(names)} tensors are of a type that the package gguf "
            f"cannot turn into floats: {few(names)}; choose another quantization."
        )
