"""Git LFS leaves a text of three lines where a large file was not downloaded."""

from pathlib import Path

_BEGINNING = b"version https://git-lfs"


def check_content(path: Path) -> None:
    """Checks that a file is here itself, and not a pointer of Git LFS to it.

    Raises:
        ValueError: if it is a pointer.
    """
    with path.open("rb") as file:
        beginning = file.read(len(_BEGINNING))
    if beginning == _BEGINNING:
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in "
            "its folder."
        )
