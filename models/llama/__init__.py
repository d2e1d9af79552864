"""Llama and the families that are run as one: see `MODEL_TYPES`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from kvjax import parallel
from kvjax.interface import Params
from models.family import Config, Family, Footprint, Packing
from models.llama import (
    families,
    merged,
    packed,
    split,
    tensors,
    tokenizer,
    weights,
)
from models.llama.adapters import Adapter
from models.llama.config import MODEL_TYPES, LlamaConfig, from_hf, notes, to_hf
from models.llama.lora import AdaptedDecoder
from models.llama.model import LlamaDecoder

__all__ = [
    "FAMILY",
    "MODEL_TYPES",
    "AdaptedDecoder",
    "LlamaConfig",
    "LlamaDecoder",
    "from_hf",
    "load",
    "measure",
    "notes",
    "tensors",
    "to_hf",
    "tokenizer",
    "weights",
]


def load_decoder(
    config: Config, dtype: jax.typing.DTypeLike | None = None
) -> LlamaDecoder:
    """Returns the decoder that a `config.json` describes; no weights are read."""
    return LlamaDecoder(from_hf(config, dtype=dtype))


def load(
    directory: Path,
    config: Config,
    dtype: jax.typing.DTypeLike | None = None,
    device: Any = None,
    packing: Packing = None,
    adapters: Sequence[Adapter] = (),
) -> tuple[LlamaDecoder, Params]:
    """Returns decoder and weights of a checkpoint folder; see :func:`models.load`."""
    decoder = load_decoder(config, dtype)
    opened = tensors.from_safetensors(directory)
    for adapter in adapters:
        opened = merged.merge(opened, adapter)
    opened = families.fold(opened, config)
    return decoder, weights.load(opened, decoder.config, device, packing)


def over(decoder: LlamaDecoder, mesh: parallel.AnyMesh) -> tuple[LlamaDecoder, Params]:
    """Returns the decoder as it runs on a mesh, and the places of its weights.

    Raises:
        ValueError: if the mesh's devices do not divide heads or matrices.
    """
    mesh = parallel.fitted(mesh, decoder.config.num_kv_heads)
    places = split.shardings(mesh, decoder.param_shapes())
    return dataclasses.replace(decoder, mesh=mesh), places


def save(
    params: Params, decoder: LlamaDecoder, directory: Path, max_shard_bytes: int
) -> dict[str, Any]:
    """Writes the weights, and returns what `config.json` says of them."""
    config = to_hf(decoder.config)
    weights.save(params, decoder.config, directory, max_shard_bytes)
    return config


def footprint(decoder: LlamaDecoder, packing: Packing = None) -> Footprint:
    """Returns bytes of the weights, on each device, from the model's sizes alone."""
    # Layers are alike: two models of one and two of them say it all, in a tenth of
    # the time that flax takes to make the shapes of 32.
    one, two = (
        dataclasses.replace(decoder.config, num_layers=layers) for layers in (1, 2)
    )
    shapes = [weights.packed_shapes(config, packing) for config in (one, two)]
    if decoder.mesh is not None:
        shapes = [split.of_device(decoder.mesh, x) for x in shapes]
    layer = _num_bytes(shapes[1]) - _num_bytes(shapes[0])
    found = measure(shapes[0], decoder.config)
    more = (decoder.num_layers - 1) * layer
    return found._replace(held=found.held + more, read=found.read + more)


def measure(shapes: Params, config: LlamaConfig) -> Footprint:
    """Returns bytes of weights whose `jax.ShapeDtypeStruct`s are given."""
    held = _num_bytes(shapes)
    # Of an embedding that is not the output matrix too, a step reads a line a row.
    unread = 0 if config.tied_embeddings else _num_bytes(shapes["embedding"])
    return Footprint(held, held - unread, config.mlp_width)


def _num_bytes(shapes: Params) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


FAMILY = Family(
    model_types=MODEL_TYPES,
    decoder=LlamaDecoder,
    load_decoder=load_decoder,
    load=load,
    load_adapted=load,
    over=over,
    save=save,
    load_tokenizer=tokenizer.load,
    save_tokenizer=tokenizer.save,
    footprint=footprint,
    notes=lambda decoder, params: (*notes(decoder.config), *packed.notes(params)),
)
