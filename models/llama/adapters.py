"""LoRA adapters in the layout of PEFT: `adapter_config.json` and a file of tensors.

An adapter of a matrix W is A and B with W + scale * B A in its place. What a folder
asks for beyond that is refused by name.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvjax import files
from models.llama.tensors import few, open_file
from models.llama.tokenizer import read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OWN = "kvjax.json"  # beside them: what PEFT has no word for
ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model."
_OUTPUT = "lm_head"
_NAME = re.compile(re.escape(_PREFIX) + r"(.+?)(?:\.(lora_A|lora_B))?\.weight")

# Keys that are read, with the types of their values.
_READ: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "use_rslora": (bool,),
    "target_modules": (str, list),
    "exclude_modules": (str, list),
    "modules_to_save": (list,),
    "layers_to_transform": (int, list),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
}
# Keys that say nothing of what a trained adapter computes.
_IGNORED = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "revision", "bias"),
    *("base_model_name_or_path", "inference_mode", "lora_dropout", "init_lora_weights"),
    *("eva_config", "qalora_group_size", "megatron_core", "runtime_config"),
}
# Beginnings that leave the matrices of the model as they were.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


class Targets(NamedTuple):
    """The rule by which matrices of a model are adapted, and norms replaced.

    A name of `target_modules` or `exclude_modules` is that of a module or its last
    parts. One text is a regular expression of whole names, or "all-linear": all
    matrices but the output. `modules_to_save` are ends of names of norms.
    """

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()

    def adapted(self, matrices: Iterable[str]) -> list[str]:
        """Lists those modules of the matrices that are adapted.

        Raises:
            ValueError: if a regular expression is none.
        """
        matched = [name for name in matrices if self._is_target(name)]
        return [name for name in matched if not _matches(self.exclude_modules, name)]

    def saved(self, norms: Iterable[str]) -> list[str]:
        """Lists those modules of the norms that are replaced."""
        return [name for name in norms if name.endswith(self.modules_to_save)]

    def _is_target(self, name: str) -> bool:
        targets = self.target_modules
        if isinstance(targets, str):
            if targets.lower() == ALL_LINEAR:
                return name != _OUTPUT
            return _matches(targets, name)
        if self.layers_to_transform and name not in targets:
            layer = re.search(r"\.(\d+)\.", name)
            if layer is None or int(layer[1]) not in self.layers_to_transform:
                return False
        return _matches(targets, name)


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if not isinstance(names, str):
        return f".{module}".endswith(tuple(f".{name}" for name in names))
    try:
        return re.fullmatch(names, module) is not None
    except re.error as error:
        raise ValueError(
            f"{names!r} is no regular expression of modules ({error}): give one, a "
            f"list of names, or {ALL_LINEAR!r}."
        ) from error


_EVERYWHERE = Targets()


@dataclasses.dataclass(frozen=True)
class Options:
    """The sizes of an adapter, alike for all its matrices, and which they are."""

    rank: int
    alpha: float
    use_rslora: bool = False
    targets: Targets = _EVERYWHERE

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return scale_of(self.alpha, self.rank, self.use_rslora)


def scale_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """Returns the factor of B A: alpha / rank, or alpha / sqrt(rank) of rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


class Factors(NamedTuple):
    """The low-rank part of one matrix, outputs first: `scale * up @ down`."""

    down: np.ndarray  # lora_A: (R, I)
    up: np.ndarray  # lora_B: (O, R)
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """The sizes of the matrix: outputs, inputs."""
        return self.up.shape[0], self.down.shape[1]


class Adapter(NamedTuple):
    """The adapter of a folder, by the names that modules have in a checkpoint."""

    folder: Path
    made_for: str  # the model, as the folder names it
    targets: Targets
    factors: Mapping[str, Factors]
    replaced: Mapping[str, np.ndarray]  # norms
    attention_alpha: float | None  # of the attention it is for; None is the model's


def is_adapter(folder: str | Path) -> bool:
    """Says if there is a folder with an adapter's config."""
    return (Path(folder).expanduser() / CONFIG).is_file()


def read(folder: str | Path) -> Adapter:
    """Reads an adapter as PEFT writes it; its dropout has no effect.

    Raises:
        FileNotFoundError: if the folder, or a file in it, is missing.
        ValueError: if a file is damaged, or asks for what is not supported.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    path = folder / TENSORS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {TENSORS}; an adapter_model.bin is not read, because "
            "unpickling runs code: save it with safetensors."
        )
    downs, ups, replaced = {}, {}, {}
    groups = {"lora_A": downs, "lora_B": ups, None: replaced}
    with open_file(path) as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is no mapping
            match = _NAME.fullmatch(name)
            if match is None or not (match[2] or match[1].endswith("norm")):
                raise ValueError(
                    f"{path}: tensor {name} is not supported: only lora_A and lora_B "
                    "of matrices are, and norms."
                )
            groups[match[2]][match[1]] = _finite(path, name, tensors.get_tensor(name))
    if single := downs.keys() ^ ups.keys():
        raise ValueError(
            f"{path} has only one of lora_A and lora_B of {few(single)}; it is damaged."
        )
    return Adapter(
        folder=folder,
        made_for=str(config.get("base_model_name_or_path") or "another model"),
        targets=_targets(config),
        factors={m: _factors(path, m, config, downs[m], ups[m]) for m in downs},
        replaced=replaced,
        attention_alpha=attention_alpha(folder),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config of an adapter, if it is one that can be merged.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or asks for what is not supported; by name.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}: give the folder of an adapter in PEFT's layout."
        )
    config = read_json(path)
    fixed = {"peft_type": ("LORA",), "bias": ("none", None)}
    fixed["init_lora_weights"] = _BEGINNINGS
    for key, known in fixed.items():
        if config.get(key) not in known:
            raise _unsupported(path, key, config.get(key))
    for key, value in config.items():
        if key not in _READ:
            if value and key not in _IGNORED:
                raise _unsupported(path, key, value)
        elif value is not None and type(value) not in _READ[key]:
            names = " or ".join(kind.__name__ for kind in _READ[key])
            raise ValueError(f"{path}: {key}={value!r} must be of type {names}.")
        elif isinstance(value, list | dict):
            _check_inside(path, key, value)
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            raise ValueError(f"{path}: {key}={config.get(key)!r} must be above 0.")
    if not config.get("target_modules"):
        raise _unsupported(path, "target_modules", config.get("target_modules"))
    return config


def attention_alpha(folder: Path) -> float | None:
    """Returns alpha of the attention an adapter was trained for, None if unchanged.

    Raises:
        ValueError: if the file that says so is damaged.
    """
    path = folder / OWN
    if not path.is_file():
        return None
    alpha = read_json(path).get("attention_alpha")
    if alpha is not None and not (_is_positive(alpha) and alpha >= 1):
        raise ValueError(f"{path}: attention_alpha={alpha!r} must be at least 1.")
    return alpha


def _unsupported(path: Path, key: str, value: Any) -> ValueError:
    return ValueError(
        f"{path}: {key}={value!r} is not supported: of PEFT's adapters a plain LoRA of "
        "matrices is, with norms in modules_to_save."
    )


def _check_inside(path: Path, key: str, value: list | dict) -> None:
    inner = int if key == "layers_to_transform" else str
    if not all(type(one) is inner for one in value):
        raise ValueError(f"{path}: {key}={value!r} must hold {inner.__name__}s.")
    if isinstance(value, dict):
        for pattern, number in value.items():
            _matches(pattern, "")
            if not _is_positive(number):
                raise ValueError(f"{path}: {key}={value!r} must hold numbers above 0.")


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _finite(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iub" or not np.isfinite(array.astype(np.float32)).all():
        raise ValueError(
            f"{path}: tensor {name} holds integers, NaN or infinite values; it is "
            "damaged."
        )
    return array


def _targets(config: Mapping[str, Any]) -> Targets:
    def names(key: str) -> Any:
        value = config.get(key) or ()
        return tuple(value) if isinstance(value, list) else value

    layers = config.get("layers_to_transform")
    return Targets(
        target_modules=names("target_modules"),
        modules_to_save=tuple(names("modules_to_save")),
        exclude_modules=names("exclude_modules"),
        layers_to_transform=(layers,)
        if isinstance(layers, int)
        else tuple(layers or ()),
    )


def _factors(
    path: Path,
    module: str,
    config: Mapping[str, Any],
    down: np.ndarray,
    up: np.ndarray,
) -> Factors:
    def of_module(key: str, pattern: str) -> Any:
        # The first pattern that names the module, or its last parts.
        for name, value in (config.get(pattern) or {}).items():
            if re.fullmatch(rf"(.*\.)?({name})", module):
                return value
        return config[key]

    rank = of_module("r", "rank_pattern")
    shapes = down.shape, up.shape
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
        raise ValueError(
            f"{path}: lora_A {shapes[0]} and lora_B {shapes[1]} of {module} do not fit "
            "each other; it is damaged."
        )
    if down.shape[0] != rank:
        raise ValueError(
            f"{path}: lora_A of {module} has rank {down.shape[0]}, {CONFIG} says "
            f"{rank}; one of the two is wrong."
        )
    alpha = of_module("lora_alpha", "alpha_pattern")
    return Factors(down, up, scale_of(alpha, rank, bool(config.get("use_rslora"))))


def write(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    options: Options,
    *,
    made_for: str,
    attention_alpha: float | None = None,
) -> None:
    """Writes an adapter into a new folder, for PEFT and for :func:`read`.

    Args:
        tensors: by the names that they have in a checkpoint.
        made_for: the name of the model.
        attention_alpha: of the attention it was trained for, if not the model's own.

    Raises:
        OSError: if it cannot be written.
    """
    targets, modules = options.targets, []
    if targets.target_modules == ALL_LINEAR:
        # By name: what is linear depends on who looks.
        modules = sorted({name.split(".")[-3] for name in tensors if "lora_A" in name})
    elif not isinstance(targets.target_modules, str):
        modules = list(targets.target_modules)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": made_for,
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": _plain(options.alpha),
        "use_rslora": options.use_rslora,
        "target_modules": modules or targets.target_modules,
        "modules_to_save": list(targets.modules_to_save) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    folder.mkdir()
    named = {_PREFIX + name: array for name, array in tensors.items()}
    files.save_tensors(folder / TENSORS, named, {"format": "pt"})
    files.write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    if attention_alpha is not None:
        own = json.dumps({"attention_alpha": attention_alpha}, indent=2)
        files.write_text(folder / OWN, own + "\n")


def _plain(number: float) -> float:
    """Returns a whole number as an integer, as PEFT has it."""
    return int(number) if float(number).is_integer() else number
