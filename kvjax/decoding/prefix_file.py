"""The document beside a saved prefix: what it holds and belongs to, read and checked.

The arrays themselves lie in a folder next to it.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import files
from kvjax.files import arrays as file_arrays
from kvjax.interface import LanguageModel

# Of a folder, by whether the prompt has ended; a change that breaks readers adds one.
FORMATS = {False: 2, True: 3}
SEALED = 4  # that of a prompt which was sealed
ABOUT = "prefix.json"
_LAYOUT = ("prompt_tokens", "longest", "room", "leaves")
_KEYS = {
    *("method", "dtype", "decoder", "weights", "model"),
    *(*_LAYOUT, "layout", "fingerprints"),
}


def about(folder: str | pathlib.Path) -> dict[str, Any]:
    """Reads what a folder says it holds: the names of model and method, sizes, dtype.

    Raises:
        FileNotFoundError: if there is no prefix.
        ValueError: if it is of another format, or damaged.
    """
    path = pathlib.Path(folder) / ABOUT
    if not path.is_file():
        why = f"holds no prefix ({ABOUT} is missing)"
        if not path.parent.is_dir():
            why = "is a file" if path.parent.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {why}: make a prefix with prefill --save.")
    try:
        found = json.loads(files.read_text(path))
        found_format, expected = found["format"], format_of(found)
    except (ValueError, KeyError, TypeError) as error:
        raise file_arrays.DamagedError(f"{path} is damaged: {error}.") from error
    if found_format != expected:
        raise ValueError(
            f"{folder} has format {found_format}, this kvjax reads {expected}: read "
            "the prompt anew."
        )
    if missing := sorted(_KEYS - found.keys()):
        raise file_arrays.DamagedError(f"{path} is damaged: no {', '.join(missing)}.")
    if found["layout"] != digest(found):
        raise file_arrays.DamagedError(
            f"{path} is damaged: {', '.join(_LAYOUT)} are not what was saved."
        )
    messages = found.get("messages")
    # Folders of earlier versions have none of these, or no digest of them.
    if found.get("said", sha256(messages)) != sha256(messages):
        raise file_arrays.DamagedError(
            f"{path} is damaged: messages are not what was saved."
        )
    if messages is not None and not is_conversation(messages):
        raise file_arrays.DamagedError(
            f"{path} is damaged: messages must be objects with texts role and content."
        )
    return found


def is_finished(about: Mapping[str, Any]) -> bool:
    """Says whether the prompt has ended: what is held is what the method kept."""
    return about.get("finished") is True


def document(
    model: LanguageModel,
    prefix: Any,
    arrays: Mapping[str, Any],
    method_name: str,
    messages: Any,
) -> dict[str, Any]:
    """Returns what a folder says of a :class:`kvjax.decoding.saved_prompt.Prefix`."""
    about = {"finished": True} if prefix.is_finished else {}
    about |= {"sealed": prefix.sealed} if prefix.sealed else {}
    about = {
        "format": format_of(about),
        **about,
        **identity(model, method_name),
        # Found from any folder; a name that `models.load` knows stays one.
        "model": files.located(model.name),
        "prompt_tokens": [len(prompt) for prompt in prefix.prompts],
        "longest": prefix.longest,
        "room": prefix.room,
        "leaves": file_arrays.describe(arrays),
        "stored_as": stored_as(model.params),
        "fingerprints": [int(f) for f in file_arrays.fingerprints(arrays)],
        "messages": messages,
    }
    about["layout"] = digest(about)
    return about | {"said": sha256(messages)}


def format_of(about: Mapping[str, Any]) -> int:
    """Returns the format of a folder, by what was made of the prompt."""
    return SEALED if "sealed" in about else FORMATS[is_finished(about)]


def sealed(about: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the tokens of each prompt when it was sealed, if it was."""
    return tuple(about.get("sealed", ()))


def digest(about: Mapping[str, Any]) -> str:
    """Hashes what the arrays are cut by; who may read them is compared, not trusted."""
    layout = [about[key] for key in _LAYOUT]
    if "sealed" in about:
        layout.append(list(sealed(about)))
    return sha256([*layout, True] if is_finished(about) else layout)


def check_new(folder: str | pathlib.Path) -> None:
    """Raises OSError unless a prefix may be written there, and can be."""
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists; remove it or choose another folder.")
    files.check_place(folder)


def sha256(value: Any) -> str:
    """Hashes a value of JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_conversation(messages: Any) -> bool:
    """Says whether these are the messages of a chat."""
    return isinstance(messages, list | tuple) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )


def identity(model: LanguageModel, method_name: str) -> dict[str, Any]:
    """Returns what must agree, coarse before fine: the first difference is named."""
    spec = model.decoder.cache_spec(1, 1)
    return {
        "method": method_name,
        "dtype": jnp.dtype(spec.dtype).name,
        "decoder": repr(model.decoder),
        "weights": file_arrays.digest(model.params),
        "model": model.name,
    }


def stored_as(params: Any) -> list[str]:
    """Returns the dtypes of weights, the names of formats where they are packed."""
    nodes = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "dtype"))
    return sorted({str(node.dtype) for node in nodes})


def refusal(
    folder: str | pathlib.Path,
    key: str,
    found: Mapping[str, Any],
    model: str,
    value: str,
) -> str:
    """Says in one line what of a folder belongs to another method or model."""
    if key in ("method", "dtype"):
        return (
            f"{folder} was saved with {key} {found[key]} and cannot go on with "
            f"{value}: use that one, or read the prompt anew."
        )
    differ = {"decoder": "sizes", "weights": "weights"}[key]
    return (
        f"{folder} was saved with model {found['model']!r} and cannot go on with "
        f"{model!r}: their {differ} differ; go on with the model it was saved with "
        "(leave --model out), or read the prompt anew."
    )
