"""Files of feature maps: what `kvjax distill` writes and `feature_map=PATH` reads.

One safetensors file: the networks of every layer if the map is a learned one, the gain
of every head if it was calibrated, and in its header which map, for which lengths.
"""

import functools
import importlib.util
import json
import os
import pathlib
import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kvjax import files
from kvjax.attention import heads
from kvjax.interface import CacheSpec
from kvjax.methods.topk_completion.feature_maps import NAMES, Learned, Mlp

FORMAT = "kvjax-feature-map"
VERSION = 1
EMBEDDED = "embedded-"  # what the names of embedded models begin with
SHIPPED = "feature_map.safetensors"  # in the folder of such a model


class MapFile(NamedTuple):
    """The contents of a file; arrays of all layers, NumPy."""

    kind: str  # "learned", or a map that is fitted to each prompt
    trained_length: int  # longest prompt it was made for, tokens
    weights: Learned | None  # leaves (L, Hkv, ...) and (L, Hkv, G, ...)
    gain: np.ndarray | None  # lam of each head, (L, Hq) float32
    about: dict  # how it was made

    def layer(self, index: int) -> tuple[Learned | None, np.ndarray | None]:
        """Weights and gain of one layer.

        Raises:
            ValueError: if the map is of a model with fewer layers.
        """
        layers = self.num_layers
        if layers is not None and index >= layers:
            raise ValueError(
                f"the feature map has {layers} layers and the model a layer {index}: "
                "it was made for another model."
            )
        weights = self.weights
        if weights is not None:
            weights = Learned(*(Mlp(*(x[index] for x in net)) for net in weights))
        return weights, None if self.gain is None else self.gain[index]

    @property
    def num_layers(self) -> int | None:
        """The layers that the file is of; None if it has nothing of any."""
        if self.gain is not None:
            return len(self.gain)
        return None if self.weights is None else len(self.weights.keys.gate)


def save(path: str | pathlib.Path, contents: MapFile, dtype: str = "float32") -> None:
    """Writes the file, whole or not at all.

    Args:
        dtype: of the networks' matrices, and then of what a step reads of them; biases
            are float32, since those of queries hold the scale of all weights.
    """
    tensors = {}
    if contents.weights is not None:
        for side, net in contents.weights._asdict().items():
            for name, leaf in net._asdict().items():
                kind = dtype if name.startswith("w_") else "float32"
                tensors[f"{side}.{name}"] = np.asarray(leaf, jnp.dtype(kind))
    if contents.gain is not None:
        tensors["gain"] = np.asarray(contents.gain, np.float32)
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "map": contents.kind,
        "trained_length": str(contents.trained_length),
        "about": json.dumps(contents.about),
    }
    files.save_tensors(path, tensors, header)


def load(path: str | pathlib.Path) -> MapFile:
    """Reads a file; the same file, unchanged, is read once.

    Args:
        path: of the file; or the name of an embedded model whose map ships with it.

    Raises:
        ValueError: if it is not there, or not a file of a feature map.
    """
    name, path = str(path), _shipped(str(path)) or pathlib.Path(path)
    try:
        state = path.stat()
    except OSError as error:
        raise ValueError(
            f"feature_map={name!r} is neither one of {', '.join(NAMES)}, moment, an "
            f"embedded model with a map nor a file ({os.strerror(error.errno or 0)})."
        ) from None
    return _load(path, state.st_mtime_ns, state.st_size)


def _shipped(name: str) -> pathlib.Path | None:
    """The file of the map of an embedded model, or None if it has none."""
    # Data beside the models, whose code this must not import.
    package = importlib.util.find_spec("models")
    if package is None or not name.startswith(EMBEDDED):
        return None
    for folder in package.submodule_search_locations or ():
        path = pathlib.Path(folder, "embedded", name.removeprefix(EMBEDDED), SHIPPED)
        if path.is_file():
            return path
    return None


@functools.lru_cache(maxsize=8)
def _load(path: pathlib.Path, changed: int, size: int) -> MapFile:
    del changed, size  # of the cache's key
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if header.get("format") != FORMAT or header.get("version") != str(VERSION):
        raise ValueError(
            f"{path} has format {header.get('format')!r}, version "
            f"{header.get('version')!r}; wanted {FORMAT!r}, version {VERSION}: write "
            "it with kvjax distill."
        )
    weights = None
    if header["map"] == "learned":
        weights = Learned(
            *(
                Mlp(*(tensors[f"{side}.{name}"] for name in Mlp._fields))
                for side in Learned._fields
            )
        )
    return MapFile(
        header["map"],
        int(header["trained_length"]),
        weights,
        tensors.get("gain"),
        json.loads(header["about"]),
    )


def check(
    file: MapFile, weights: Learned | None, gain: np.ndarray | None, spec: CacheSpec
) -> None:
    """Raises unless one layer's arrays fit a model; warns of prompts that are too long.

    Raises:
        ValueError: naming both shapes.
    """
    num_q_heads = heads.count(spec, spec.num_q_heads)
    if gain is not None and gain.shape != (num_q_heads,):
        raise ValueError(
            f"the feature map was calibrated for {gain.shape[0]} query heads and the "
            f"model has {num_q_heads}: it was made for another model."
        )
    if weights is None:
        return
    sizes = weights.queries.w_in.shape[:3]
    wanted = (heads.count(spec, spec.num_kv_heads), spec.group, spec.head_dim)
    if sizes != wanted:
        raise ValueError(
            f"the feature map is for (KV heads, group, head dim) {sizes} and the model "
            f"has {wanted}: it was made for another model."
        )
    prompt = spec.capacity - spec.max_new_tokens
    if prompt > file.trained_length:
        warnings.warn(
            f"the feature map was trained for prompts of up to {file.trained_length} "
            f"tokens, and there is room for {prompt}: distill one for this length.",
            stacklevel=2,
        )
