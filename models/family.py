"""A model family as :mod:`models` sees it: how its checkpoints are read and written.

A family is a folder that makes one :class:`Family`, and a line in `models.FAMILIES`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from kvjax.interface import DecoderLM, Params, Tokenizer

Config = Mapping[str, Any]  # a decoded config.json
Dtype = jax.typing.DTypeLike | None  # None keeps the checkpoint's
# "stored" keeps what a file has in integers; None keeps floats.
Packing = Literal["int8", "int4", "stored"] | None
PACKINGS = ("int8", "int4", "stored")


LoadAdapted = Callable[
    [Path, Config, Dtype, Any, Packing, tuple[Any, ...]], tuple[DecoderLM, Params]
]


class Footprint(NamedTuple):
    """The sizes of a model that its decoder does not say, from its shapes alone."""

    held: int  # bytes of all weights
    read: int  # bytes of them that a decode step must read
    mlp_width: int  # elements of the widest hidden state inside of a layer


class Family(NamedTuple):
    """The functions of one family, over checkpoint folders in its layout.

    Fields:
        model_types: values of `model_type` in `config.json` that are its own.
        decoder: the class of its decoders, a :class:`kvjax.interface.DecoderLM`.
        load_decoder: `load_decoder(config, dtype) -> decoder`, without any weights.
        load: `load(directory, config, dtype, device, weights) -> (decoder, params)`;
            `weights` of "int8" or "int4" asks for matrices as integers; never "stored",
            which GGUF files alone have.
        save: `save(params, decoder, directory, max_shard_bytes) -> config` writes the
            weights, and returns what `config.json` is to hold.
        load_tokenizer: `load_tokenizer(directory) -> tokenizer`.
        save_tokenizer: `save_tokenizer(tokenizer, directory)`.
        footprint: `footprint(decoder, weights) -> Footprint`.
        notes: `notes(decoder, params) -> lines` that a user must know of a model;
            `params` are None where no weights were loaded.
        load_adapted: as `load`, with a tuple at the end, each a
            :class:`models.llama.adapters.Adapter` that is merged into the weights; None
            if the family takes none.
        over: `over(decoder, mesh) -> (decoder, shardings)`: the decoder as it runs on
            a mesh (:mod:`kvjax.parallel`), and the places of its weights in their
            structure; None if the family runs on one device alone.
    """

    model_types: tuple[str, ...]
    decoder: type
    load_decoder: Callable[[Config, Dtype], DecoderLM]
    load: Callable[[Path, Config, Dtype, Any, Packing], tuple[DecoderLM, Params]]
    save: Callable[[Params, Any, Path, int], dict[str, Any]]
    load_tokenizer: Callable[[Path], Tokenizer]
    save_tokenizer: Callable[[Any, Path], None]
    footprint: Callable[[Any, Packing], Footprint]
    notes: Callable[[Any, Params | None], tuple[str, ...]]
    load_adapted: LoadAdapted | None = None
    over: Callable[[Any, Any], tuple[DecoderLM, Any]] | None = None


def check_packing(weights: str | None) -> None:
    """Raises ValueError if there is no such format of weights."""
    if weights is not None and weights not in PACKINGS:
        raise ValueError(
            f"{weights=} must be 'int8', 'int4', 'stored', or None for floats."
        )
