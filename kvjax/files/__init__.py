"""Files: every text is read here, every array written, and nothing is left half done.

What is written takes its place when it is complete. A kill leaves at most a hidden
folder whose name ends in `.partial`, which nothing reads.
"""

import contextlib
import math
import os
import pathlib
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def decode(data: bytes, name: object) -> str:
    """UTF-8 as text, without a byte order mark; line ends stay as they are.

    Raises:
        ValueError: at the first byte that is not UTF-8; the message has its offset.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(error, len(data), name) from error


def not_utf8(error: UnicodeDecodeError, end: int, name: object) -> ValueError:
    """The error to raise; `end` is the offset of the end of what was being decoded."""
    # Counted from the end: the codec has cut a byte order mark off before it counts.
    offset = end - len(error.object) + error.start
    return ValueError(
        f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at offset "
        f"{offset}; convert it to UTF-8 first."
    )


def read_text(path: str | pathlib.Path) -> str:
    """The text of a UTF-8 file, as :func:`decode` has it.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is a folder, or not UTF-8.
    """
    path = pathlib.Path(path)
    check_file(path)
    return decode(path.read_bytes(), path)


def check_file(path: pathlib.Path) -> None:
    """Raises ValueError for a folder, and FileNotFoundError where nothing is."""
    name = os.fsencode(path).decode("utf-8", "replace")
    if path.is_dir():
        raise ValueError(f"{name} is a folder: give a UTF-8 file.")
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist: give a UTF-8 file.")


def located(name: str) -> str:
    """The absolute path of a folder or GGUF file; any other name as it is.

    Of a model with adapters, MODEL+ADAPTER, all are located.
    """
    path = pathlib.Path(name).expanduser()
    if name and (path.is_dir() or (path.suffix == ".gguf" and path.is_file())):
        return os.path.abspath(path)
    for at, sign in enumerate(name):
        behind = name[at + 1 :]
        if sign == "+" and pathlib.Path(behind).expanduser().is_dir():
            return f"{located(name[:at])}+{located(behind)}"
    return name


# Folders that are being written: of an interrupt that cannot wait for them.
UNFINISHED: set[pathlib.Path] = set()


@contextlib.contextmanager
def replacing(
    path: str | pathlib.Path, *, full: bool = False
) -> Iterator[pathlib.Path]:
    """Gives the place to write a file or a folder at; it replaces `path` in the end.

    A folder that is not empty is replaced if it may be `full`. If anything goes wrong,
    an interrupt too, `path` is what it was, and of what was made on the way, folders
    above it among them, nothing is left.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    path = pathlib.Path(os.path.abspath(path))
    made = [folder for folder in path.parents if not folder.exists()]
    room = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    UNFINISHED.add(room)
    try:
        room.mkdir(parents=True)
        yield room / path.name
        if full and path.is_dir():
            _swap(room / path.name, path)
        else:
            (room / path.name).replace(path)
        shutil.rmtree(room, ignore_errors=True)
        made = []
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        remove(room)
        UNFINISHED.discard(room)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _swap(new: pathlib.Path, path: pathlib.Path) -> None:
    """Puts a folder in the place of another, which is beside it afterwards."""
    old = new.with_name(f"{new.name}.old")
    # For a moment the old one is in there: an interrupt that cannot wait leaves it.
    UNFINISHED.discard(new.parent)
    try:
        path.rename(old)
        new.rename(path)
    finally:
        if not path.exists():
            old.rename(path)


def remove(folder: pathlib.Path) -> None:
    """Removes a folder, if it is there, that threads may still be writing into.

    A library whose first write failed does not wait for the others to end.
    """
    left = 5 if folder.exists() else 0  # looks in a row at which it stays away
    for _ in range(100):
        if not left:
            return
        left = 5 if folder.exists() else left - 1
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


def remove_partial(folder: str | pathlib.Path) -> None:
    """Removes what kills left half written in a folder that nobody else writes to."""
    for partial in pathlib.Path(folder).glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes UTF-8 as :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | pathlib.Path, data: bytes) -> None:
    """Writes a file, so that a reader finds the old content or the new one."""
    with replacing(path) as new, new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def dense(leaf: Any) -> np.ndarray:
    """An array's values on the host, one behind the other, in native byte order."""
    array = np.asarray(leaf)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # Not `ascontiguousarray`, which makes a vector of a scalar.
    return np.asarray(array, order="C")


def save_tensors(
    path: str | pathlib.Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all; arrays of any memory layout.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # Its 0.8 writes the raw buffer, whatever the strides.
    arrays = {name: dense(leaf) for name, leaf in tensors.items()}
    with replacing(path) as new:
        new.touch()
        mode = new.stat().st_mode
        try:
            save_file(arrays, new, dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({reason(error)}).") from error
        new.chmod(mode)  # 0.8 leaves a file that only its owner can read


def save_npz(path: str | pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes a compressed `.npz` file, whole or not at all."""
    with replacing(path) as new:
        dense_arrays: dict[str, Any] = {name: dense(x) for name, x in arrays.items()}
        np.savez_compressed(new, **dense_arrays)


def reason(error: Exception) -> str:
    """Says in one line why a library could not write, in the system's words if any."""
    code = re.search(r"os[ _]error(?:_code)?\W{1,3}(\d+)", str(error))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return os.strerror(int(code[1])) if code else " ".join(str(error).split())[:200]


def json_ready(value: Any) -> Any:
    """JSON knows no infinity and no NaN: they become null. Tuples become lists."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_place(path: str | pathlib.Path, *, within: bool = False) -> None:
    """Tries the folder that `path` is to be made in, before hours of work.

    Nothing is made: of folders that are still to be made, the one above them is tried.

    Args:
        path: of a file or a folder.
        within: try the folder `path` itself where it is there: files go into it.

    Raises:
        PermissionError, NotADirectoryError: if nothing can be written there.
    """
    path = pathlib.Path(os.path.abspath(path))
    tried = (path, *path.parents) if within else (*path.parents, path)
    above = next(folder for folder in tried if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        kind = PermissionError if above.is_dir() else NotADirectoryError
        raise kind(
            f"{path} cannot be made ({error.strerror}): choose another folder."
        ) from error


def check_writable(folder: pathlib.Path, option: str = "--out") -> None:
    """Tries to write to `folder`, before hours of work, and leaves nothing there.

    Not a folder either, if it was not there: what is refused afterwards makes none.

    Args:
        folder: that is to be written to.
        option: by which it was given, for messages.

    Raises:
        PermissionError, NotADirectoryError: if nothing can be written there.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for one in made:
            with contextlib.suppress(OSError):  # somebody else writes there by now
                one.rmdir()
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{folder} is not a folder: give {option} another one."
        ) from error
    except OSError as error:
        raise PermissionError(
            f"{folder} cannot be written ({error.strerror}): give {option} another "
            "folder."
        ) from error
