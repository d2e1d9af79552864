"""GGUF files of the Llama family: weights, configuration and tokenizer in one file.

All of it is translated into the Hugging Face layout and goes the same way from there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from kvjax.interface import LanguageModel
from models import llama
from models.family import Footprint, Packing
from models.gguf import config, header, tensors, tokenizer
from models.llama.adapters import Adapter

__all__ = ["footprint", "is_gguf", "load", "load_decoder"]


def is_gguf(name: str | Path) -> bool:
    """Returns whether a model's name is that of a GGUF file, by its ending."""
    path = Path(name).expanduser()
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def load(
    path: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    device: Any = None,
    weights: Packing = None,
    adapters: Sequence[Adapter] = (),
) -> LanguageModel:
    """The model of a GGUF file; see :func:`models.load`.

    Quantized weights become floats, one tensor at a time: `dtype` of None is float16 or
    bfloat16 where all matrices are, else float32. With `weights` of "int8" or "int4",
    matrices are rounded anew from these floats, whatever they were in the file.

    With "stored" the codes and scales of Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K and Q8_0
    are kept as they are: their products are those of the floats. Codes of 5 bits take
    8. Matrices of other types are rounded anew to "int8", those in floats stay so.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or asks for what is not supported.
        ImportError: if the package `gguf` is not installed.
    """
    opened = header.read(Path(path).expanduser())
    decoder = _decoder(opened, dtype)
    language = tokenizer.load(opened)
    eos_ids = tokenizer.eos_ids(opened)
    found = tensors.from_gguf(opened, decoder.config)
    for adapter in adapters:
        found = llama.merged.merge(found, adapter)
    params = llama.weights.load(found, decoder.config, device, weights)
    return LanguageModel(decoder, params, language, eos_ids, str(path), {})


def load_decoder(
    path: str | Path, *, dtype: jax.typing.DTypeLike | None = None
) -> llama.LlamaDecoder:
    """The decoder alone, from the header alone; see :func:`models.load_decoder`.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`load`.
    """
    return _decoder(header.read(Path(path).expanduser()), dtype)


def footprint(
    path: str | Path, *, dtype: jax.typing.DTypeLike | None = None
) -> Footprint:
    """Returns the bytes of a file's weights, kept as they are stored there.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`load`.
    """
    opened = header.read(Path(path).expanduser())
    model = _decoder(opened, dtype).config
    found = tensors.from_gguf(opened, model)
    llama.weights.check_stored(found)
    shapes = llama.weights.packed_shapes(model, "stored", found.stored)
    return llama.measure(shapes, model)


def _decoder(opened: header.Header, dtype) -> llama.LlamaDecoder:
    hf_config = config.to_hf(opened)
    try:
        return llama.LlamaDecoder(llama.from_hf(hf_config, dtype=dtype))
    except ValueError as error:
        raise ValueError(f"{opened.path}: {error}") from error
