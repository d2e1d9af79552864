"""Weights of the Llama family, from any checkpoint and into safetensors files.

Reading streams: one tensor at a time goes from its file to the device and into our
layout there, so that the host never holds more than one.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvjax import files
from kvjax.interface import Params
from models.family import Packing
from models.llama import packed
from models.llama.config import LlamaConfig
from models.llama.model import LlamaDecoder
from models.llama.packed import Blocks, Kind
from models.llama.tensors import INDEX, SINGLE, Stored, Tensors, few, quantization


class Entry(NamedTuple):
    """A parameter: where it is in our tree, and what a checkpoint calls it."""

    path: tuple[str | int, ...]
    name: str
    shape: tuple[int, ...]  # in the checkpoint
    target: jax.ShapeDtypeStruct

    @property
    def is_kernel(self) -> bool:
        """True of matrices: ours are (in, out), a checkpoint's (out, in)."""
        return self.path[-1] == "kernel"


_MODULES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "mlp": "mlp",
    **{part: f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")},
}


def layout(config: LlamaConfig) -> list[Entry]:
    """Every parameter of the model, in the order of a checkpoint."""
    shapes = LlamaDecoder(config).param_shapes()
    entries = [
        _entry(tuple(key.key for key in path), target)
        for path, target in jax.tree_util.tree_leaves_with_path(shapes)
    ]
    return sorted(entries, key=lambda entry: _order(entry.path))


def packed_shapes(
    config: LlamaConfig,
    packing: Packing,
    stored: Stored | None = None,
) -> Params:
    """Returns `jax.ShapeDtypeStruct`s of what :func:`load` would return.

    Args:
        stored: of the checkpoint's :class:`Tensors`; "stored" needs it.

    Raises:
        ValueError: if groups do not divide a matrix.
    """
    params: dict = {}
    for entry in layout(config):
        target, kind = entry.target, _kind(entry, packing, stored)
        if kind is not None:
            packed.check_inputs(target.shape[0], kind, entry.name)
            target = packed.shapes(target, kind)
        _put(params, entry.path, target)
    return params


def _kind(entry: Entry, packing: Packing, stored: Stored | None) -> Kind:
    if not entry.is_kernel:
        return None
    if packing != "stored":
        return packing
    return None if stored is None else stored.kinds.get(entry.name)


def check_stored(tensors: Tensors) -> None:
    """Raises ValueError if a checkpoint has no matrix that "stored" would keep."""
    kinds = () if tensors.stored is None else tensors.stored.kinds.values()
    if not any(isinstance(kind, packed.Format) for kind in kinds):
        raise ValueError(
            f"{tensors.source}: weights='stored' keeps codes with scales of 32 inputs, "
            "and there are none: give 'int8' or 'int4', or None for floats."
        )


def _raw(entry: Entry, kind: Kind, tensors: Tensors) -> np.ndarray | Blocks:
    if tensors.stored is not None and isinstance(kind, packed.Format):
        return tensors.stored.read(entry.name)
    return tensors.read(entry.name)


def _put(params: dict, path: tuple[str | int, ...], value: Any) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def _order(path):
    place = ("embedding", "layers", "norm", "output").index(path[0])
    return place, path[1] if path[0] == "layers" else 0, str(path)


def _entry(path: tuple[str | int, ...], target: jax.ShapeDtypeStruct) -> Entry:
    if path[0] == "embedding":
        return Entry(path, "model.embed_tokens.weight", target.shape, target)
    kind = "bias" if path[-1] == "bias" else "weight"
    if path[0] == "output":
        name = "lm_head.weight"
    elif path[0] == "norm":
        name = "model.norm.weight"
    else:
        parts = map(str, path[2:-1])
        inside = [_MODULES.get(part, part) for part in parts]
        name = ".".join(["model", "layers", str(path[1]), *inside, kind])
    return Entry(path, name, target.shape[::-1], target)


def load(
    tensors: Tensors,
    config: LlamaConfig,
    device: Any = None,
    packing: Packing = None,
) -> Params:
    """Reads the weights of a checkpoint into the structure of `param_shapes`.

    Args:
        tensors: of the checkpoint, by their names in the Hugging Face layout.
        config: sizes, and the dtype to cast to.
        device: a `jax.Device`, a `Sharding`, a pytree of shardings in the structure of
            `param_shapes`, or None for the default device.

    Raises:
        ValueError: if tensors are missing, unknown or of the wrong shape, a weight is
            not finite, or there is nothing to keep as it is stored.
    """
    if packing == "stored":
        check_stored(tensors)
    entries = layout(config)
    where = tensors.files
    tied = config.tied_embeddings and "lm_head.weight" in where
    _check_names({entry.name for entry in entries}, set(where), tensors.source, tied)
    placement = _placement(device, config)

    params: dict = {}
    # A file after the other, in the order of the layers.
    order = {file: place for place, file in enumerate(dict.fromkeys(where.values()))}
    for entry in sorted(entries, key=lambda entry: order[where[entry.name]]):
        kind = _kind(entry, packing, tensors.stored)
        raw = _raw(entry, kind, tensors)
        if raw.shape != entry.shape:
            raise ValueError(
                f"{where[entry.name].name}: tensor {entry.name} has shape {raw.shape}, "
                f"config.json asks for {entry.shape}; one of the two is wrong."
            )
        packed.check_inputs(entry.shape[-1], kind, entry.name)
        place = placement(entry.path)
        if kind is not None:
            packed.check_parts(entry.shape[-1], place, entry.name)
        convert = _converter(place, entry.is_kernel, kind)
        value, finite = convert(raw, entry.target.dtype)
        if not finite:
            raise ValueError(
                f"{where[entry.name].name}: tensor {entry.name} holds NaN or infinite "
                f"values as {entry.target.dtype.name}; the checkpoint is damaged, or "
                "its numbers need a wider dtype."
            )
        _put(params, entry.path, value)
        del raw  # not while the next tensor is read
    if tied:
        _check_tied(params["embedding"], tensors)
    return params


def save(
    params: Params, config: LlamaConfig, directory: Path, max_shard_bytes: int
) -> None:
    """Writes `params` as shards of at most `max_shard_bytes`, or one file if they fit.

    Peak host memory is one shard. A tensor larger than a shard has one for itself.

    Raises:
        ValueError: if `params` are not those of `config` or exceed its dtype, or
            `max_shard_bytes < 1`.
        OSError: if they cannot be written.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"{max_shard_bytes=} must be at least 1.")
    packed.refuse(params, "saved")
    entries = layout(config)
    given = {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for entry in entries:
        shape = getattr(given.pop(entry.path, None), "shape", None)
        if shape != entry.target.shape:
            raise ValueError(
                f"parameter {'/'.join(map(str, entry.path))} has shape {shape}, the "
                f"configuration asks for {entry.target.shape}."
            )
    if given:
        names = ["/".join(map(str, path)) for path in given]
        raise ValueError(f"the configuration has no parameters {few(names)}.")

    shards = _split(entries, max_shard_bytes)
    for number, shard in enumerate(shards, 1):
        tensors = {entry.name: _export(entry, params) for entry in shard}
        path = directory / _shard_name(number, len(shards))
        files.save_tensors(path, tensors, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {
            entry.name: _shard_name(number, len(shards))
            for number, shard in enumerate(shards, 1)
            for entry in shard
        }
        total = sum(_num_bytes(entry) for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def _num_bytes(entry: Entry) -> int:
    return entry.target.size * entry.target.dtype.itemsize


def _split(entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    shards, room = [], 0
    for entry in entries:
        if not shards or _num_bytes(entry) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= _num_bytes(entry)
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _export(entry: Entry, params: Params) -> np.ndarray:
    value = functools.reduce(lambda node, key: node[key], entry.path, params)
    given = np.asarray(value)
    with np.errstate(over="ignore"):
        host = given.astype(entry.target.dtype, copy=False)
    if host.dtype != given.dtype and not np.isfinite(host).all():
        raise ValueError(
            f"parameter {'/'.join(map(str, entry.path))} holds values beyond "
            f"{host.dtype.name}: save it in a wider dtype."
        )
    return host.T if entry.is_kernel else host


def _check_names(expected: set[str], found: set[str], source: Path, tied: bool) -> None:
    # Old checkpoints carry the rotary frequencies, which are recomputed.
    found = {name for name in found if not name.endswith("rotary_emb.inv_freq")}
    missing = expected - found
    extra = found - expected - ({"lm_head.weight"} if tied else set())
    quantized = quantization(extra)
    if quantized is not None:
        raise ValueError(
            f"{source} is {quantized}: {few(extra)}; use the unquantized checkpoint."
        )
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {few(missing)}")
    if extra:
        problems.append(f"{len(extra)} tensors are unknown: {few(extra)}")
    if problems:
        raise ValueError(
            f"{source}: {'; '.join(problems)}. The weights do not fit the "
            "configuration."
        )


def _placement(device: Any, config: LlamaConfig):
    if device is None:
        return lambda path: None
    if isinstance(device, jax.Device):
        device = jax.sharding.SingleDeviceSharding(device)
    if isinstance(device, jax.sharding.Sharding):
        return lambda path: device
    shapes = LlamaDecoder(config).param_shapes()
    if jax.tree.structure(device) != jax.tree.structure(shapes):
        raise ValueError(
            "device must be a jax.Device, a Sharding, or shardings in the structure of "
            f"param_shapes(); got {jax.tree.structure(device)}."
        )
    return lambda path: functools.reduce(lambda node, key: node[key], path, device)


@functools.cache
def _converter(sharding: jax.sharding.Sharding | None, transposed: bool, kind: Kind):
    """Checkpoint layout to ours, on the device: one compilation per shape."""

    def convert(raw, dtype):
        if isinstance(raw, Blocks):
            kept = packed.keep(raw)
            scales = [jnp.isfinite(x).all() for x in kept[1:] if x is not None]
            return kept, jnp.stack(scales).all()
        value = (raw.T if transposed else raw).astype(dtype)
        finite = jnp.isfinite(value).all()
        if kind is None or isinstance(kind, packed.Format):
            return value, finite
        return packed.pack(value, kind), finite

    placed: dict[str, Any] = {}
    if sharding is not None:
        # All arrays of a packed matrix have its axes.
        placed["out_shardings"] = (sharding, None)
    jitted = jax.jit(convert, static_argnums=1, **placed)

    def on_device(raw: np.ndarray | Blocks, dtype: Any):
        if not isinstance(raw, Blocks) and raw.dtype == np.float64:  # wider than JAX
            raw = raw.astype(np.float32)
        if isinstance(sharding, NamedSharding) and isinstance(raw, np.ndarray):
            # Each device gets its part alone of what the file has.
            axes = reversed(sharding.spec) if transposed else sharding.spec
            raw = jax.device_put(raw, sharding.update(spec=PartitionSpec(*axes)))
        value, finite = jitted(raw, dtype)
        # Waits for the device, so that no second tensor is read meanwhile.
        return value, bool(finite)

    return on_device


def _check_tied(embedding: jax.Array, tensors: Tensors) -> None:
    output = jnp.asarray(tensors.read("lm_head.weight"), embedding.dtype)
    if output.shape != embedding.shape or not bool((output == embedding).all()):
        raise ValueError(
            f"{tensors.files['lm_head.weight'].name}: lm_head.weight differs from "
            "model.embed_tokens.weight, but config.json says tie_word_embeddings=true; "
            "set it to false."
        )
