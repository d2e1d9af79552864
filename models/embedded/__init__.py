"""The small trained checkpoints that ship with the package, and how each was made.

`README.md` is their model card; `start.py` and `kvjax train` make them from any Python
installation.
"""

import pathlib

_FOLDER = pathlib.Path(__file__).parent


def names() -> tuple[str, ...]:
    """Names of the shipped checkpoints, for :func:`path`."""
    return tuple(sorted(file.parent.name for file in _FOLDER.glob("*/config.json")))


def path(name: str = "softmax") -> pathlib.Path:
    """The folder of a shipped checkpoint, in the Hugging Face layout.

    Args:
        name: such as "softmax", or in full "embedded-softmax".

    Raises:
        ValueError: if there is no such checkpoint.
    """
    short = name.removeprefix("embedded-")
    if short not in names():
        known = ", ".join(names()) or "none"
        raise ValueError(f"no embedded model {name!r}; shipped: {known}.")
    return _FOLDER / short


def heldout_text() -> str:
    """Python sources that no embedded model was trained on, a third of a megabyte."""
    return (_FOLDER / "heldout.txt").read_text(encoding="utf-8")
