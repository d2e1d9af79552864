"""Text to train on: files of yours, or the sources of the running Python.

Tokens 0, 1 and 2 have no fixed meaning here; a corpus knows its tokenizer's own.
"""

import glob
import pathlib
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvjax import files
from kvjax.text import encoding as text_encoding
from kvjax.training.data import records

STDLIB = "stdlib"
HELD_OUT_SHARE = 1 / 20  # of a corpus' characters, its end

# Never trained on, neither as text nor as a haystack: held-out text is made of them.
HELD_OUT = (
    "argparse.py",
    "calendar.py",
    "csv.py",
    "difflib.py",
    "fractions.py",
    "heapq.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
)

# Tests repeat themselves, tables of code points teach nothing, vendored code is not
# under the PSF licence.
_EXCLUDED_FOLDERS = frozenset(
    {
        *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
        *("test", "tests", "idle_test", "turtledemo", "__phello__"),
        *("encodings", "ensurepip", "lib2to3"),
    }
)
_EXCLUDED_FILES = re.compile(r"_sysconfigdata.*|entities\.py|stringprep\.py|this\.py")


class Corpus(NamedTuple):
    """Text in the two forms that samples are cut from, and how to tokenise more."""

    lines: Sequence[str]  # with their line ends
    tokens: np.ndarray  # (N,) the same text, each file as the tokenizer has it whole
    prefix: tuple[int, ...]  # what the tokenizer puts before every text, such as BOS
    encode: Callable  # text -> (ids, offsets in characters), without the prefix
    vocab: np.ndarray  # ids that stand for text, special ones left out
    chars_per_token: float


def stdlib_files() -> list[pathlib.Path]:
    """Sources of the standard library, in a fixed order, held-out modules included."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        wanted = _EXCLUDED_FOLDERS.isdisjoint(inside.parts[:-1])
        if wanted and not _EXCLUDED_FILES.fullmatch(path.name):
            sources.append(inside)
    return [root / inside for inside in sorted(sources, key=lambda p: p.as_posix())]


def stdlib_training_files() -> list[pathlib.Path]:
    """:func:`stdlib_files` without `HELD_OUT`."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    held_out = {root / name for name in HELD_OUT}
    return [path for path in stdlib_files() if path not in held_out]


def stdlib_held_out() -> str:
    """The text of the held-out modules, as they ship with the embedded models."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    header = (
        "# Sources of Python's standard library (see LICENSE-PYTHON.txt), copyright\n"
        "# Python Software Foundation, PSF License Agreement. Never trained on.\n"
    )
    return header + "".join(_decode(root / name) or "" for name in HELD_OUT)


def read(
    corpus: str | Sequence[str], *, field: str = "text", key: str = "data.corpus"
) -> list[str]:
    """The texts of a corpus: `"stdlib"`, or files and glob patterns.

    A file is one text, UTF-8; one that ends in `.jsonl`, `.ndjson` or `.parquet`, in
    whatever case, has a text a record. Files of the standard library that are not UTF-8
    are left out; one that was asked for by name must be.

    Args:
        field: of a record, its text.
        key: what errors call the corpus.

    Raises:
        ValueError: if a pattern matches nothing, a file is not UTF-8 or a record no
            text, or all are empty.
        ImportError: if there are parquet files and no pyarrow.
    """
    if corpus == STDLIB:
        texts = [_decode(path) for path in stdlib_training_files()]
        return [text for text in texts if text]
    texts = []
    for path in paths(corpus, key=key):
        texts += [text for text in _texts(path, field) if text.strip()]
    if not texts:
        raise ValueError(f"{key}={corpus!r} holds no text: every file is empty.")
    return texts


def paths(
    corpus: str | Sequence[str], *, key: str = "data.corpus"
) -> list[pathlib.Path]:
    """The files that :func:`read` reads, in its order.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    if corpus == STDLIB:
        return stdlib_training_files()
    found = []
    for pattern in [corpus] if isinstance(corpus, str) else corpus:
        # A file whose name has brackets is no pattern.
        names = (
            [pattern]
            if pathlib.Path(pattern).is_file()
            else glob.glob(pattern, recursive=True)
        )
        matching = [path for path in map(pathlib.Path, sorted(names)) if path.is_file()]
        if not matching:
            raise ValueError(f"{key}={pattern!r} matches no file.")
        found += matching
    return found


def _texts(path: pathlib.Path, field: str) -> Iterator[str]:
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        yield from records.jsonl(path, field)
    elif kind == ".parquet":
        yield from records.parquet(path, field)
    else:
        yield files.read_text(path)


def split(
    texts: Sequence[str], share: float = HELD_OUT_SHARE
) -> tuple[list[str], list[str]]:
    """Texts to train on, and the end of them, to check by: cut where a line begins."""
    kept = list(texts)
    wanted = int(share * sum(map(len, kept)))
    aside: list[str] = []
    while wanted > 0 and kept:
        last = kept.pop()
        if len(last) > wanted:
            cut = len(last) - wanted
            # Where there is no line near, anywhere.
            cut = last.rfind("\n", max(cut - wanted, 0), cut) + 1 or cut
            kept.append(last[:cut])
            last = last[cut:]
        aside.append(last)
        wanted -= len(last)
    return kept, aside[::-1]


def make(texts: Sequence[str], tokenizer) -> Corpus:
    """Tokenises `texts` with a `tokenizers.Tokenizer`.

    Raises:
        ValueError: if the texts have fewer than two tokens.
    """
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    before, behind = text_encoding.added(lambda text: tokenizer.encode(text).ids)
    pieces = [np.array([*before, *x.ids, *behind], np.int32) for x in encodings]
    tokens = np.concatenate(pieces)
    if len(tokens) < 2:
        raise ValueError(
            f"a text of {len(tokens)} tokens is too short to train on or to check by: "
            "give more."
        )
    special = tokenizer.get_added_tokens_decoder()
    vocab = np.array([i for i in range(tokenizer.get_vocab_size()) if i not in special])

    def encode(text):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), encoding.offsets

    return Corpus(
        lines=[line for text in texts for line in text.splitlines(keepends=True)],
        tokens=tokens,
        prefix=before,
        encode=encode,
        vocab=vocab,
        chars_per_token=sum(map(len, texts)) / len(tokens),
    )


def haystack(rng: np.random.Generator, corpus: Corpus, num_chars: int) -> list[str]:
    """Consecutive lines of the corpus, at most `num_chars` characters of them."""
    start, lines = int(rng.integers(len(corpus.lines))), []
    while True:
        line = corpus.lines[(start + len(lines)) % len(corpus.lines)]
        num_chars -= max(len(line), 1)
        if num_chars < 0:
            return lines
        lines.append(line)


def _decode(path: pathlib.Path) -> str | None:
    try:
        return files.read_text(path)
    except ValueError:
        return None
