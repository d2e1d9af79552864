"""Flax decoders. They know `kvjax.interface` and `kvjax.rope`, and no method.

:func:`load` reads a checkpoint in the Hugging Face layout, or a GGUF file, and
:func:`save_pretrained` writes the former. Adding a family of models is a folder, and a
line in `FAMILIES`: see :class:`models.family.Family`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from kvjax import files, parallel
from kvjax.interface import DecoderLM, LanguageModel, Params
from models import embedded, gguf, llama, published
from models.family import Family, Footprint, Packing, check_packing
from models.llama import adapters
from models.llama.tokenizer import read_json

FAMILIES: tuple[Family, ...] = (llama.FAMILY,)

_HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]
_FILES = (".json", ".gguf", ".safetensors")
_NOT_NEEDED = ["original/*", "consolidated*", "onnx/*"]


def load(
    name: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    device: Any = None,
    weights: Packing = None,
    adapter: str | Path | None = None,
    mesh: parallel.AnyMesh | str | None = None,
) -> LanguageModel:
    """A model from a directory in the Hugging Face layout, a GGUF file, or the hub.

    Args:
        name: a directory; or a file that ends in `.gguf`; or a hub id `owner/model`,
            optionally with `@revision`; or the name of an embedded model, such as
            "embedded-softmax", or of a published one: "smollm2". A directory wins over
            a name. MODEL+ADAPTER is a model with an adapter's folder.
        dtype: of weights, activations and cache; None keeps the checkpoint's.
        device: a `jax.Device`, a `jax.sharding.Sharding`, a pytree of shardings in the
            structure of the decoder's `param_shapes()`, or None for JAX's default.
        weights: "int8" or "int4" keeps the matrices of the layers, and an output that
            is not the embedding, as integers with scales, made one at a time while
            they are read. "stored" keeps those that a GGUF file has, and rounds
            nothing (:func:`models.gguf.load` says of which types). They can be neither
            saved nor trained. None keeps floats.
        adapter: folder of a LoRA adapter in PEFT's layout, which is merged into the
            weights while they are read, before they are cast or packed; after those
            that the name has.
        mesh: devices to share weights and caches out to, as "tensor=4" or
            "data=2,tensor=2", or a mesh of :func:`kvjax.parallel.make`; each takes its
            part of a tensor as it is read. None is one device.

    Returns:
        A :class:`kvjax.interface.LanguageModel`. `eos_ids` are those of
        `generation_config.json`, else of `config.json`, else the tokenizer's; of a GGUF
        file those that end a text, a turn or a message.

    Raises:
        FileNotFoundError: if the directory, or a file in it, is missing, or a published
            model was not fetched (:func:`models.published.fetch`).
        ValueError: if a file is damaged, the model is not supported, weights and
            `config.json` disagree, there is no such embedded model or `weights`,
            groups of "int4" do not divide a matrix, nothing is "stored", the adapter
            is for another model or of a kind that is not supported, or a mesh asks for
            devices that are not there or do not divide the model.
        ImportError: if a hub id is given and `huggingface_hub` is not installed, or a
            GGUF file and `gguf` is not.
    """
    check_packing(weights)
    name, folders = with_adapters(name, adapter)
    if weights == "stored" and folders:
        raise ValueError(
            f"weights='stored' keeps the integers of {name}, which the adapter "
            f"{folders[0]} changes: give 'int8' or 'int4', or None for floats."
        )
    if weights == "stored":
        _check_stored(name)
    merged = tuple(map(adapters.read, folders))
    if mesh is not None:
        if device is not None:
            raise ValueError(f"{device=} and {mesh=} are two places: give one of them.")
        placed, device = _over(_load_decoder(name, dtype), mesh)
        mesh = parallel.of(placed)
    model = _load(name, dtype, device, weights, merged)
    for one in merged:
        decoder = _attending(model.decoder, one.attention_alpha)
        named = f"{model.name}+{str(one.folder).rstrip('/')}"
        model = model._replace(decoder=decoder, name=named)
    if mesh is not None:
        model = model._replace(decoder=_over(model.decoder, mesh)[0])
    return model


def _over(decoder: Any, mesh: parallel.AnyMesh | str) -> tuple[DecoderLM, Any]:
    """Returns a decoder on a mesh, and the places of its weights."""
    mesh = parallel.make(mesh) if isinstance(mesh, str) else mesh
    family = _family_with(decoder)
    if family.over is None:
        raise ValueError(
            f"{type(decoder).__name__} runs on one device: leave {mesh=} out."
        )
    return family.over(decoder, mesh)


def split_name(name: str | Path) -> tuple[str | Path, str | None]:
    """Returns model and adapter of a name MODEL+ADAPTER; any other has no adapter."""
    text = str(name)
    for at, sign in enumerate(text):
        behind = text[at + 1 :]
        if sign == "+" and adapters.is_adapter(behind) and not Path(text).is_dir():
            return text[:at], behind
    return name, None


def check_adaptable(name: str | Path) -> None:
    """Raises ValueError if adapters of a model have no names in its checkpoint."""
    directory = _resolve(with_adapters(name, None)[0], ["config.json"])
    if gguf.is_gguf(directory):
        return
    config = read_json(directory / "config.json")
    if llama.families.is_folded(config):
        raise ValueError(
            f"{name}: model_type={config.get('model_type')!r} has its matrices fused, "
            "scaled or named otherwise in a checkpoint, and no adapter of it is "
            "trained: write it anew with models.save_pretrained, and train beside that."
        )


def with_adapters(
    name: str | Path, adapter: str | Path | None = None
) -> tuple[str | Path, list[str | Path]]:
    """Returns a model's own name, and folders of adapters in their order."""
    folders = [] if adapter is None else [adapter]
    while True:
        name, inner = split_name(name)
        if inner is None:
            return name, folders
        folders.insert(0, inner)


def _attending(decoder: Any, alpha: float | None) -> Any:
    """Returns a decoder whose attention has another alpha, if one is given."""
    if alpha is None or alpha == decoder.alpha:
        return decoder
    config = dataclasses.replace(decoder.config, attention_alpha=alpha)
    return type(decoder)(config)


def _load(name, dtype, device, weights: Packing, merged) -> LanguageModel:
    """Loads a model with adapters merged into it."""
    directory = _resolve(name)
    if gguf.is_gguf(directory):
        options: Any = {"dtype": dtype, "device": device, "weights": weights}
        model = gguf.load(directory, adapters=merged, **options)
        return model._replace(name=str(name))
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} has no config.json; give the directory of a checkpoint in "
            "the Hugging Face layout, or a file that ends in .gguf."
        )
    config = read_json(directory / "config.json")
    family = _family_of(config, f"{directory}: ")
    generation = read_json(directory / "generation_config.json")
    tokenizer = family.load_tokenizer(directory)
    candidates = (
        generation.get("eos_token_id"),
        config.get("eos_token_id"),
        getattr(tokenizer, "eos_id", None),
    )
    eos = next((ids for ids in candidates if ids is not None), ())
    eos_ids = eos if isinstance(eos, list | tuple) else [eos]
    if not all(type(token) is int and abs(token) < 1 << 31 for token in eos_ids):
        raise ValueError(
            f"{directory}: eos_token_id={eos!r} must be a token id or a list of them."
        )
    given = directory, config, dtype, device, weights
    if not merged:
        decoder, params = family.load(*given)
    elif family.load_adapted is None:
        raise ValueError(
            f"{name} takes no adapter, as no model_type={config['model_type']!r} does: "
            f"leave {merged[0].folder} out."
        )
    else:
        decoder, params = family.load_adapted(*given, merged)
    return LanguageModel(
        decoder=decoder,
        params=params,
        tokenizer=tokenizer,
        eos_ids=tuple(eos_ids),
        name=str(name).rstrip("/"),
        generation=generation,
    )


def load_decoder(
    name: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    adapter: str | Path | None = None,
    mesh: parallel.AnyMesh | None = None,
) -> DecoderLM:
    """The decoder alone, from a `config.json` or a GGUF header: no weights are read.

    Args:
        name: as for :func:`load`; or the `config.json` itself, whatever it is called.
        dtype: of weights, activations and cache; None keeps the checkpoint's.
        adapter: as for :func:`load`.
        mesh: of devices, which need not be there (:func:`kvjax.parallel.imagined`).

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`load`.
    """
    name, folders = with_adapters(name, adapter)
    decoder = _load_decoder(name, dtype)
    for folder in map(Path, folders):
        adapters.read_config(folder.expanduser())
        alpha = adapters.attention_alpha(folder.expanduser())
        decoder = _attending(decoder, alpha)
    return decoder if mesh is None else _over(decoder, mesh)[0]


def _load_decoder(name: str | Path, dtype) -> DecoderLM:
    path = Path(name).expanduser()
    if not path.is_file():
        path = _resolve(name, ["config.json"])
    if gguf.is_gguf(path):
        return gguf.load_decoder(path, dtype=dtype)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no config.json.")
    config = read_json(path)
    family = _family_of(config, f"{path}: ")
    try:
        return family.load_decoder(config, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_pretrained(
    model: LanguageModel,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `model` in the Hugging Face layout; :func:`load` reads the same bits.

    Everything is written beside `directory` first and renamed at the end, so that
    `directory` either is complete or does not exist.

    Raises:
        FileExistsError: if `directory` exists and is not empty.
        ValueError: if the parameters do not fit the configuration, or its dtype, are
            packed, or the decoder is of no family.
        OSError: if it cannot be written; nothing is left of it then.
    """
    directory = Path(directory).expanduser()
    check_new(directory)
    family = _family_with(model.decoder)
    with files.replacing(directory) as partial:
        partial.mkdir()
        config = family.save(model.params, model.decoder, partial, max_shard_bytes)
        generation = dict(model.generation or {})
        if model.eos_ids:
            eos = model.eos_ids[0] if len(model.eos_ids) == 1 else list(model.eos_ids)
            config["eos_token_id"] = generation["eos_token_id"] = eos
        if (bos := getattr(model.tokenizer, "bos_id", None)) is not None:
            config["bos_token_id"] = bos
            generation.setdefault("bos_token_id", bos)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", generation)
        family.save_tokenizer(model.tokenizer, partial)


def save_tokenizer(model: LanguageModel, directory: str | Path) -> None:
    """Writes the tokenizer of `model` alone, into a folder that is there.

    Raises:
        ValueError: if the decoder is of no family.
    """
    _family_with(model.decoder).save_tokenizer(model.tokenizer, Path(directory))


def footprint(
    decoder: DecoderLM, weights: Packing = None, name: str | Path | None = None
) -> Footprint:
    """Returns the bytes of a model's weights, as :func:`load` would keep them.

    Args:
        name: of the model, as for :func:`load`: "stored" asks the header of its file.

    Raises:
        ValueError: if the decoder is of no family, there is no such `weights`, or
            nothing is "stored".
    """
    check_packing(weights)
    family = _family_with(decoder)
    if weights != "stored":
        return family.footprint(decoder, weights)
    _check_stored(name)
    dtype = decoder.cache_spec(1, 1).dtype
    return gguf.footprint(_resolve(str(name)), dtype=dtype)


def notes(decoder: DecoderLM, params: Params | None = None) -> tuple[str, ...]:
    """Returns what a user must know of a model, one line each; mostly none.

    Args:
        params: its weights, if they were loaded.

    Raises:
        ValueError: if the decoder is of no family.
    """
    return _family_with(decoder).notes(decoder, params)


def check_new(directory: str | Path) -> None:
    """Raises OSError if `directory` exists and is not empty, or cannot be made."""
    directory = Path(directory).expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(
            f"{directory} exists; remove it or choose another directory."
        )
    files.check_place(directory)


def _family_of(config: dict[str, Any], where: str = "") -> Family:
    """The family of a `config.json`."""
    name = config.get("model_type")
    for family in FAMILIES:
        if name in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ValueError(
        f"{where}model_type={name!r} is not supported; supported: {known}."
    )


def _family_with(decoder: DecoderLM) -> Family:
    """The family that a decoder is of."""
    for family in FAMILIES:
        if isinstance(decoder, family.decoder):
            return family
    raise ValueError(f"no family of models has decoders {type(decoder).__name__}.")


def _check_stored(name: str | Path | None) -> None:
    """Raises ValueError unless a name is that of a GGUF file: others store no codes."""
    given = str(name)
    if gguf.is_gguf(given) or (
        given in published.MODELS and not Path(given).expanduser().is_dir()
    ):
        return
    raise ValueError(
        f"weights='stored' keeps the integers of a GGUF file, and {name=} is none: "
        "give 'int8' or 'int4', or None for floats."
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(content, indent=2) + "\n")


def _resolve(name: str | Path, patterns: Sequence[str] = _HUB_FILES) -> Path:
    """The directory, or the GGUF file, that a model's name means."""
    directory = Path(name).expanduser()
    if directory.is_dir() or gguf.is_gguf(directory):
        return directory
    if str(name).startswith(embedded.PREFIX):
        return embedded.path(str(name))
    if str(name) in published.MODELS:
        return published.path(str(name))
    if not directory.exists() and _is_path(str(name)):
        raise FileNotFoundError(
            f"{name} does not exist: give the folder of a checkpoint in the Hugging "
            "Face layout, or a GGUF file."
        )
    hub_id, _, revision = str(name).partition("@")
    if directory.exists() or not _is_hub_id(hub_id):
        known = ", ".join((*embedded.names(), *published.MODELS))
        if directory.is_file():
            raise ValueError(
                f"{name} is a file that does not end in .gguf: give the folder of a "
                "checkpoint in the Hugging Face layout, or a GGUF file."
            )
        raise FileNotFoundError(
            f"{name} is no directory, and no hub id of the form owner/model; models "
            f"known by name: {known}."
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{name} is no directory; to fetch it from the hub, run "
            "`pip install huggingface_hub`, or give a directory."
        ) from error
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision or None,
                allow_patterns=list(patterns),
                ignore_patterns=_NOT_NEEDED,
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{name} is no directory and could not be fetched from the hub "
            f"({type(error).__name__}: {reason}); download it and give its directory."
        ) from error


def _is_path(name: str) -> bool:
    """Says if a name can only be meant as one of a file or folder."""
    return name.startswith((".", "/", "~")) or name.endswith(_FILES)


def _is_hub_id(name: str) -> bool:
    owner, _, model = name.partition("/")
    plain = all(part and part.strip("-_.") == part for part in (owner, model))
    return plain and "/" not in model and not any(c.isspace() for c in name)
