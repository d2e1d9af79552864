"""Configs in YAML files, presets and `key=value`; what a resumed run may change.

Every error is one line that names the key, its place and, for an unknown one, the
nearest known key.
"""

import difflib
import glob
import importlib.resources
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pydantic
import yaml

from kvjax import files
from kvjax.training.config import Config, Section

Place = tuple[str | int, ...]
UNFILLED = "???"  # a value that a preset leaves to its user


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two differences: 1e-3 is a number, and a repeated key an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise ValueError(f"line {line}: key {key!r} is given twice.")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def presets() -> tuple[str, ...]:
    """Names of the configs that come with the package."""
    folder = importlib.resources.files("kvjax.training") / "presets"
    files = [file.name for file in folder.iterdir()]
    return tuple(sorted(n.removesuffix(".yaml") for n in files if n.endswith(".yaml")))


def load(source: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file or preset, with `key=value` settings on top.

    Args:
        source: a path, or the name of a preset.
        overrides: such as "optimizer.lr=1e-3" or "stages.0.steps=100"; a value is
            YAML, or a pattern that begins with `*`.

    Raises:
        FileNotFoundError: if there is neither such a file nor such a preset.
        ValueError: if the config is not right; one line.
    """
    path = pathlib.Path(source)
    if str(source) in presets() and not path.is_file():
        file = (
            importlib.resources.files("kvjax.training") / "presets" / f"{source}.yaml"
        )
        return parse(file.read_text("utf-8"), f"preset {source}", overrides)
    if not path.is_file():
        raise FileNotFoundError(
            f"{source} is no file and no preset; presets: {', '.join(presets())}."
        )
    return parse(files.read_text(path), str(path), overrides)


def parse(text: str, place: str = "config", overrides: Sequence[str] = ()) -> Config:
    """The config that a YAML text says; `place` is what errors call it."""
    try:
        return _parsed(text, place, overrides)
    except ValueError as error:  # whose key or value may have lines
        raise ValueError(" ".join(str(error).split())) from error


def _parsed(text: str, place: str, overrides: Sequence[str]) -> Config:
    document = _yaml(text, place)
    if not isinstance(document, dict):
        raise ValueError(f"{place} must be a mapping with keys such as model, stages.")
    for item in overrides:
        _override(document, item)
    if unfilled := [".".join(map(str, key)) for key in _unfilled(document)]:
        changes = " ".join(f"--set {key}=..." for key in unfilled)
        raise ValueError(
            f"{place} leaves {' and '.join(unfilled)} to you: give {changes}, or a "
            "copy of it in which they are filled in."
        )
    try:
        return Config.model_validate(document)
    except pydantic.ValidationError as error:
        raise ValueError(_explain(error, text, place, overrides)) from error


def _unfilled(document: Any) -> Iterator[Place]:
    """Places of the values that are left to be filled in."""
    open_nodes, seen = [((), document)], set()
    while open_nodes:
        place, node = open_nodes.pop(0)
        if node == UNFILLED:
            yield place
        if id(node) in seen or not isinstance(node, dict | list):
            continue
        seen.add(id(node))  # YAML may refer to a node from within itself
        inner = node.items() if isinstance(node, dict) else enumerate(node)
        open_nodes += [((*place, key), value) for key, value in inner]


def located(config: Config) -> Config:
    """The config with absolute paths: a run is resumed from any folder."""

    def absolute(pattern: str) -> str:
        pattern = os.path.expanduser(pattern)
        if pattern.split("/")[0] == "stdlib" or os.path.isabs(pattern):
            return pattern
        if os.path.isfile(pattern):
            return os.path.abspath(pattern)
        return os.path.join(glob.escape(os.getcwd()), pattern)

    data, model = config.data, config.model
    held_out = data.held_out
    if held_out is not None:
        held_out = tuple(map(absolute, held_out))
    corpus = tuple(map(absolute, data.corpus))
    changes = {}
    for name in ("checkpoint", "tokenizer"):
        given = getattr(model, name)
        if given not in (None, "train"):
            changes[name] = files.located(given)
    return config.model_copy(
        update={
            "data": data.model_copy(update={"corpus": corpus, "held_out": held_out}),
            "model": model.model_copy(update=changes),
        }
    )


def dump(config: Config) -> str:
    """YAML text from which :func:`parse` makes an equal config."""
    return yaml.safe_dump(_plain(config.model_dump()), sort_keys=False)


def _plain(value: Any) -> Any:
    # Lists for tuples; numbers stay numbers, also as keys.
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [*map(_plain, value)] if isinstance(value, tuple) else value


def differences(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ; a list counts as one value."""
    return [
        ".".join(key)
        for key in _leaves(old) | _leaves(new)
        if _leaves(old).get(key, ...) != _leaves(new).get(key, ...)
    ]


def _leaves(value: Any, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(value, Section):
        return {place: value}
    leaves = {}
    for name in type(value).model_fields:
        leaves |= _leaves(getattr(value, name), (*place, name))
    return leaves


def _yaml(text: str, place: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # a bad character has none
        line = "" if mark is None else f" line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        told = f"{getattr(error, 'context', None)}: {problem}"
        if "alias" in told or "cannot start any token" in told:
            problem += '; a value that begins so, such as "*.txt", must be in quotes'
        raise ValueError(f"{place}{line} is not YAML: {problem}.") from error
    except ValueError as error:
        raise ValueError(f"{place} {error}") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply.") from error


def _override(document: dict, item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {item}: give key=value, such as optimizer.lr=1e-3.")
    place = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    if not _is_known(place):
        raise ValueError(f"--set {item}: {_unknown(place)}")
    node: Any = document
    for depth, part in enumerate(cast(tuple[Any, ...], place)):
        # A bare number is a key of `lengths`, or an index of a list.
        if isinstance(node, list) and not (isinstance(part, int) and part < len(node)):
            raise ValueError(
                f"--set {item}: {'.'.join(map(str, place[:depth]))} has entries 0 to "
                f"{len(node) - 1}."
            )
        if depth + 1 == len(place):
            # Nothing on a command line is there for an alias to refer to.
            is_pattern = text.startswith("*")
            node[part] = text if is_pattern else _yaml(text, f"--set {item}:")
            return
        if isinstance(node, dict) and not isinstance(node.get(part), dict | list):
            node[part] = {}
        node = node[part]


def _schema(annotation: Any) -> Iterator[tuple[Place, Any]]:
    # (place, annotation) of every key; "*" stands for an index or a free name.
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            yield (name,), field.annotation
            for place, kind in _schema(field.annotation):
                yield (name, *place), kind
    elif origin is typing.Annotated:
        yield from _schema(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _schema(argument)
    elif origin in (tuple, dict):
        inner = arguments[0] if origin is tuple else arguments[1]
        yield ("*",), inner
        for place, kind in _schema(inner):
            yield ("*", *place), kind


_PLACES = {place for place, _ in _schema(Config)}


def _is_known(place: Place) -> bool:
    def fits(pattern):
        return len(pattern) == len(place) and all(
            a in ("*", b) for a, b in zip(pattern, place, strict=True)
        )

    # Anything may stand below a free name: nested keys of a config.json.
    is_nested = place[:2] == ("model", "config") and len(place) > 2
    return is_nested or any(map(fits, _PLACES))


def _unknown(place: Place) -> str:
    name, text = str(place[-1]), ".".join(map(str, place))
    pattern = tuple("*" if isinstance(part, int) else part for part in place)
    names = {str(known[-1]): known for known in sorted(_PLACES) if known[-1] != "*"}
    siblings = {
        str(known[-1]): known for known in _PLACES if known[:-1] == pattern[:-1]
    } or {str(known[0]): known for known in _PLACES if len(known) == 1}
    tried = ((names, 1.0), (siblings, 0.6), (names, 0.8), (siblings, 0.0))
    for candidates, cutoff in tried:
        nearest = difflib.get_close_matches(name, sorted(candidates), 1, cutoff)
        if nearest and nearest != ["*"]:
            guess = candidates[nearest[0]]
            shown = [
                str(place[i] if part == "*" and i < len(place) else part)
                for i, part in enumerate(guess)
            ]
            return f"unknown key {text}; did you mean {'.'.join(shown)}?"
    return f"unknown key {text}."


_KINDS = {
    "too_short": "more than nothing",
    "model_type": "a mapping with keys and values",
    "dict_type": "a mapping with keys and values",
}


def _explain(
    error: pydantic.ValidationError, text: str, place: str, overrides: Sequence[str]
) -> str:
    errors = error.errors()
    first = errors[0]
    # Pydantic adds which member of a union it tried; keys of ours are never so called.
    where = tuple(part for part in first["loc"] if part != "[key]")
    while where and not _is_known(where) and first["type"] != "extra_forbidden":
        where = where[:-1]
    key = ".".join(map(str, where))
    is_set = any(_is_above(item.partition("=")[0], key) for item in overrides)
    line = None if is_set else _line(text, where)
    spot = "--set" if is_set else place if line is None else f"{place} line {line}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{spot}: {_unknown(where)}{more}"
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "missing":
        return f"{spot}: {key} is missing.{more}"
    # Pydantic's words are those of Python: a config has lists and mappings.
    kind = _KINDS.get(first["type"])
    if first["type"] == "tuple_type":
        message = f"must be a list of {where[-1]}"
    elif kind is not None:
        message = f"must be {kind}"
    if first["type"] != "value_error":
        message = f"{key}={first['input']!r}: {message}"
    elif key:
        message = f"{key}: {message}"
    return f"{spot}: {message}.{more}"


def _is_above(given: str, key: str) -> bool:
    return key == given or key.startswith(f"{given}.") or given.startswith(f"{key}.")


def _line(text: str, where: Place) -> int | None:
    node, line = yaml.compose(text, _Loader), None
    for part in where:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            pairs = [pair for pair in node.value if pair[0].value == str(part)]
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        else:
            break
    return line


# What changes no step that was done: how a run is watched, and where it runs; and where
# files are, since a run knows its data and its model by what is in them.
_FREE = ("log.", "checkpoint.", "evaluate.", "mesh.", "data.threads", "data.held_out")
_FREE += ("data.corpus", "data.field")
_FREE += ("model.checkpoint", "model.tokenizer", "model.dtype")
# What may change for steps to come only.
_LATER = ("stages", "optimizer.decay_steps", "optimizer.final")


def check_resume(
    old: Config, new: Config, step: int, before: np.ndarray, now: np.ndarray
) -> None:
    """Raises unless the first `step` steps are the same under both configs.

    Args:
        before, now: learning rates of those steps under the old and the new one.

    Raises:
        ValueError: if they are not, naming the keys.
    """
    changed = [key for key in differences(old, new) if not key.startswith(_FREE)]
    fixed = [key for key in changed if key not in _LATER]
    if fixed:
        values = ", ".join(f"{key} ({_value(old, key)} was saved)" for key in fixed)
        raise ValueError(
            f"a resumed run may not change {values}; leave it as it was, or start a "
            "new --out."
        )
    if step > new.steps:
        raise ValueError(
            f"the run is at step {step}, and the stages now end at {new.steps}: append "
            "steps, do not remove them."
        )
    starts = [0]
    for config in (old, new):
        done = 0
        for stage in config.stages:
            done += stage.steps
            starts.append(done)
    for start in sorted({start for start in starts if start < step}):
        if _recipe(old, start) != _recipe(new, start):
            raise ValueError(
                f"stages differ at step {start}, which is done (the run is at step "
                f"{step}): a resumed run may change later steps only."
            )
    differing = np.flatnonzero(before != now)
    if len(differing):
        first = int(differing[0])
        would_be, was = _apart(float(now[first]), float(before[first]))
        spread = ""
        if new.optimizer.schedule != "constant":
            spread = (
                f" schedule={new.optimizer.schedule} is spread over all steps: go on "
                "from this run's model in a new --out, or begin with schedule=constant."
            )
        raise ValueError(
            f"with the changed {', '.join(changed)} the learning rate of step "
            f"{first}, which is done, would be {would_be} and was {was}: a resumed run "
            f"may change later steps only.{spread}"
        )


def _apart(a: float, b: float) -> tuple[str, str]:
    """Two numbers that differ, with the digits that tell them apart, three at least."""
    shown = "", ""
    for digits in range(3, 17):
        shown = f"{a:.{digits}g}", f"{b:.{digits}g}"
        if shown[0] != shown[1]:
            break
    return shown


def _recipe(config: Config, step: int) -> dict[str, Any]:
    return config.stage(step).model_dump(exclude={"steps"})


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)  # of a section that one of two lacks
    return value
