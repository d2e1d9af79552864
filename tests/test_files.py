"""Files: every layout of an array is written by its values, every text read alike."""

import ast
import contextlib
import pathlib
import resource

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from kvjax import files
from kvjax.decoding import endless
from kvjax.methods.topk_completion import map_files
from kvjax.methods.topk_completion.feature_maps import Learned, Mlp

ROOT = pathlib.Path(__file__).parents[1]
GRID = np.arange(24, dtype=np.float32).reshape(4, 6)
LAYOUTS = {
    "plain": GRID,
    "transposed": GRID.T,
    "strided": GRID[::2, 1::3],
    "backwards": GRID[::-1, ::-2],
    "repeated": np.broadcast_to(GRID[:1], (3, 6)),
    "axes": np.arange(24, dtype=np.int32).reshape(2, 3, 4).transpose(1, 2, 0),
    "nothing": GRID[:0].T,
    "scalar": np.float32(3.5) * np.ones(()),
    "big endian": GRID.astype(">f4").T,
    "bfloat16": GRID.astype(ml_dtypes.bfloat16).T[::-1],
    "float16": GRID.astype(np.float16)[:, ::-1],
    "bool": (GRID.T > 9)[::-1],
    "of jax": jnp.asarray(GRID).T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_any_layout_are_written_by_their_values(tmp_path, layout):
    """Against NumPy's own idea of the same values one behind the other."""
    given = LAYOUTS[layout]
    path = tmp_path / "new" / "a.safetensors"
    files.save_tensors(path, {"a": given, "b": GRID})
    expected = np.ascontiguousarray(given).reshape(np.shape(given))
    found = load_file(path)
    assert found["a"].shape == expected.shape
    assert found["a"].dtype == expected.dtype.newbyteorder("=")
    assert found["a"].tobytes() == expected.astype(found["a"].dtype).tobytes()
    np.testing.assert_array_equal(found["b"], GRID)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_map_of_turned_weights_is_their_map(tmp_path):
    rng = np.random.default_rng(0)

    def turned(*shape):
        return np.asarray(rng.normal(size=shape[::-1]), np.float32).T

    names = Mlp._fields
    net = Mlp(*(turned(1, 2, 3, 4 + i)[:, :, ::-1] for i in range(len(names))))
    gain = turned(1, 8)[:, ::-2]
    found = map_files.MapFile("learned", 9, Learned(net, net), gain, {})
    path = tmp_path / "map.safetensors"
    map_files.save(path, found)
    read = map_files.load(path)
    for left, right in zip(read.weights.keys, net, strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(read.gain, gain)


def writers(tree: ast.AST) -> list[str]:
    """Calls of what writes arrays by their raw buffers."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [getattr(call, "attr", getattr(call, "id", "")) for call in calls]
    wrong = {"save_file", "serialize_file", "tofile", "savez", "savez_compressed"}
    found = [name for name in names if name in wrong]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "safetensors.numpy":
            found += [a.name for a in node.names if a.name in ("save", "save_file")]
    return found


def test_one_function_writes_arrays():
    assert writers(ast.parse("import numpy as np\nnp.ones(3).tofile('x')"))
    for room in ("kvjax", "models", "pallas_kernels", "benchmarks", "colab", "tests"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if path != ROOT / "kvjax" / "files" / "__init__.py":
                found = writers(ast.parse(path.read_text("utf-8")))
                assert not found, f"{path}: {found[0]}: use files.save_tensors"


# --- texts


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_text_is_read_without_its_mark_and_with_its_line_ends(tmp_path, mark):
    path = tmp_path / "text.txt"
    path.write_bytes(mark + "grün\r\nrot\n".encode())
    assert files.read_text(path) == "grün\r\nrot\n"
    blocks = [bytes([byte]) for byte in path.read_bytes()]
    assert "".join(endless.pieces(blocks)) == "grün\r\nrot\n"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_the_byte_that_is_not_utf8_is_named_by_its_place_in_the_file(tmp_path, mark):
    path = tmp_path / "text.txt"
    path.write_bytes(mark + b"caf\xe9 au lait")
    message = f"text.txt is not UTF-8: byte 0xe9 at offset {len(mark) + 3}; convert it"
    with pytest.raises(ValueError, match=message):
        files.read_text(path)
    with path.open("rb") as file, pytest.raises(ValueError, match=message):
        list(endless.pieces(iter(lambda: file.read(2), b""), name="text.txt"))


# --- whole or not at all


def half_write(path, error):
    with files.replacing(path) as new:
        new.write_text("half")
        raise error


def test_what_fails_on_the_way_leaves_what_was_there(tmp_path):
    old = tmp_path / "old.txt"
    old.write_text("old")
    for path in (old, tmp_path / "new" / "below" / "it.txt"):
        for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
            with pytest.raises(type(error)) as caught:
                half_write(path, error)
            if isinstance(error, OSError):
                assert str(path) in str(caught.value)
    assert old.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt"]
    files.write_text(old, "new")
    assert old.read_text() == "new"
    files.write_text(tmp_path / "new" / "below" / "it.txt", "it")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old.txt"]


def replace_full(path, text):
    with files.replacing(path, full=True) as new:
        new.mkdir()
        (new / "it").write_text(text)


def test_a_full_folder_is_replaced_where_it_may_be(tmp_path):
    for text in ("old", "new"):
        replace_full(tmp_path / "folder", text)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "it").read_text() == "new"
    assert not files.UNFINISHED


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("renames", [1, 2])
def test_a_full_folder_is_there_whenever_an_interrupt_comes(
    tmp_path, monkeypatch, renames, done
):
    """Before or after each of the two renames."""
    replace_full(tmp_path / "folder", "old")
    rename, count = pathlib.Path.rename, []

    def interrupted(self, target):
        count.append(target)
        if len(count) != renames or done:
            rename(self, target)
        if len(count) == renames:
            # What removes on another thread's behalf would take the old one along.
            assert not files.UNFINISHED
            raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_full(tmp_path / "folder", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    found = (tmp_path / "folder" / "it").read_text()
    assert found == ("new" if done and renames == 2 else "old")


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    (tmp_path / "empty").mkdir()
    with files.replacing(tmp_path / "empty") as new:
        new.mkdir()
        (new / "a").write_text("a")
    assert (tmp_path / "empty" / "a").read_text() == "a"
    with (
        pytest.raises(OSError, match="empty"),
        files.replacing(tmp_path / "empty") as n,
    ):
        n.mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@contextlib.contextmanager
def little_room():
    """No file may grow beyond 4 KiB: what writes gets an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    for write in (
        lambda path: files.write_text(path, "x" * 9000),
        lambda path: files.save_tensors(path, {"a": np.zeros(9000)}),
    ):
        path = tmp_path / "new" / "file"
        with (
            pytest.raises(OSError, match="File too large") as caught,
            little_room(),
        ):
            write(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_only_a_folder_or_a_gguf_file_is_located(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "embedded-softmax").write_bytes(b"")  # a file of that name
    assert files.located("model") == str(tmp_path / "model")
    assert files.located("./a.gguf") == str(tmp_path / "a.gguf")
    # A model and adapters, whatever their folders' names.
    (tmp_path / "a+b").mkdir()
    here = f"{tmp_path}/"
    assert files.located("a+b+model") == f"{here}a+b+{here}model"
    assert files.located("tiny+model+a+b") == f"tiny+{here}model+{here}a+b"
    for name in ("embedded-softmax", "smollm2", "owner/model", "", "tiny", "a+c"):
        assert files.located(name) == name


def test_reasons_are_one_line_in_the_systems_words():
    for error, expected in [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("a\nb [os_error_code='27' source=x]"), "File too large"),
        (RuntimeError("I/O error: File too large (os error 27)"), "File too large"),
        (ValueError("one\n  two"), "one two"),
    ]:
        assert files.reason(error) == expected


def test_a_folder_is_tried_before_the_work(tmp_path):
    files.check_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(
            NotADirectoryError, match="not a folder: give --out another"
        ):
            files.check_writable(folder)
