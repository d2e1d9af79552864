"""The small trained checkpoints that ship with the package, and how each was made.

`README.md` is their model card; `start.py` and `kvjax train` make them from any Python
installation.
"""

import pathlib

from kvjax import files

_FOLDER = pathlib.Path(__file__).parent


PREFIX = "embedded-"
DEFAULT = "embedded-softmax"


def names() -> tuple[str, ...]:
    """Names of the shipped checkpoints, as :func:`models.load` takes them."""
    folders = sorted(file.parent.name for file in _FOLDER.glob("*/config.json"))
    return tuple(PREFIX + folder for folder in folders)


def path(name: str = DEFAULT) -> pathlib.Path:
    """The folder of a shipped checkpoint, in the Hugging Face layout.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if name not in names():
        known = ", ".join(names()) or "none"
        raise ValueError(f"no embedded model {name!r}; shipped: {known}.")
    return _FOLDER / name.removeprefix(PREFIX)


def heldout_text() -> str:
    """Python sources that no embedded model was trained on, a third of a megabyte."""
    return files.read_text(_FOLDER / "heldout.txt")
