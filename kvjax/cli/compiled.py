"""Compiled code, kept between runs in a folder of the user's, and bounded."""

import contextlib
import pathlib
import warnings

# Bytes; a program of a layer takes some 100 KB.
MOST = 2_000_000_000


def keep_compiled_code() -> None:
    """Turns JAX's persistent compilation cache on; without a folder it stays off.

    What was used least lately goes first, until all of it takes at most `MOST` bytes.
    """
    import jax

    from models.published import cache_folder

    # A full disk, or an entry that one cut short, costs time and no more.
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache entry"
    )
    folder = cache_folder() / "xla"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        shorten(folder, MOST)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def shorten(folder: pathlib.Path, most: int) -> None:
    """Removes files, those used least lately first, until they take `most` bytes.

    Folders stay, such as that of a GPU's tuning, and files that cannot be removed.
    Here and not by JAX's own bound, which looks at every entry whenever it writes one,
    and needs a package for it.
    """
    entries, total = [], 0
    for path in filter(pathlib.Path.is_file, folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            about = path.stat()
            # Where no reading is noted, the time of writing.
            entries.append((max(about.st_atime, about.st_mtime), about.st_size, path))
            total += about.st_size
    for _, size, path in sorted(entries):
        if total <= most:
            return
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            total -= size
