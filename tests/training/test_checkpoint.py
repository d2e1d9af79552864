"""Checkpoints: bit for bit what was saved, or one clear error and the older ones."""

import gc
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import files
from kvjax.files import arrays
from kvjax.training import checkpoint

# Orbax drops the reads beside one that fails, which shows when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def state(seed=0, size=50_000):
    rng = np.random.default_rng(seed)
    return {
        "weights": jnp.asarray(rng.normal(size=(size // 50, 50)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(7,)), jnp.bfloat16),
        "none": None,
        "step": jnp.asarray(seed, jnp.int32),
        "finite": jnp.ones((), bool),
    }


def shapes(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


LIKE = shapes(state())


@pytest.fixture
def folder(tmp_path):
    """Opens the folder of checkpoints again and again, as a new process would."""
    opened = []

    def folder(**options):
        while opened:
            opened.pop().close()
        defaults = {"keep": 3}
        opened.append(checkpoint.open_folder(tmp_path, **(defaults | options)))
        return opened[-1]

    yield folder
    folder().close()
    gc.collect()


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_comes_back_is_what_was_saved(folder):
    saved, about = state(3), {"window": {"sum": 0.1 + 0.2, "best": None}, "text": "ä\n"}
    checkpoints = folder()
    checkpoints.save(3, saved, about)
    checkpoints.wait()
    found = checkpoint.restore(folder(), 3, LIKE)
    assert found.step == 3
    assert found.about == about
    assert_same(found.state, saved)
    assert found.state["half"].dtype == jnp.bfloat16


def test_arrays_of_any_layout_come_back_by_their_values(folder):
    """Of the host too: the library below is given what `files.dense` makes of them."""
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    saved = {
        "turned": grid.T,
        "backwards": grid[::-1, ::-2],
        "strided": grid[:, 1::3],
        "half": grid.astype(jnp.bfloat16).T[::-1],
        "big endian": grid.astype(">f4").T,
        "scalar": np.full((), 2.5, np.float32),
        "device": jnp.asarray(grid).T,
    }
    checkpoints = folder()
    checkpoints.save(1, saved, {})
    checkpoints.wait()
    like = shapes(jax.tree.map(jnp.asarray, jax.tree.map(files.dense, saved)))
    assert_same(checkpoint.restore(folder(), 1, like).state, saved)


def test_donating_what_is_being_saved_does_not_change_it(folder):
    checkpoints = folder()
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    big = {"weights": jnp.arange(4_000_000, dtype=jnp.float32)}
    like = shapes(big)
    checkpoints.save(1, big, {})
    for _ in range(5):
        big = change(big)
    checkpoints.wait()
    found = checkpoint.restore(checkpoints, 1, like).state
    np.testing.assert_array_equal(found["weights"], np.arange(4_000_000))


def test_the_newest_are_kept_and_the_best(folder):
    checkpoints = folder(keep=2, best_mode="min")
    for step, metric in enumerate([3.0, 1.0, 2.0, None, 4.0, None], 1):
        checkpoints.save(step, state(step), {}, metric)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]
    highest = folder(keep=1, best_mode="max")
    highest.save(7, state(7), {}, 0.5)
    highest.wait()
    assert highest.steps() == [5, 7]


def fill(folder, *steps):
    checkpoints = folder()
    for step in steps:
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    return checkpoints.folder


def largest(path):
    files = [f for f in path.rglob("*") if f.is_file()]
    return max(files, key=lambda f: f.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "flipped bit": lambda step: flip(largest(step)),
    "cut file": lambda step: cut(largest(step)),
    "missing file": lambda step: largest(step).unlink(),
    "missing state": lambda step: shutil.rmtree(step / "state"),
    "missing about": lambda step: shutil.rmtree(step / "about"),
    "about is no JSON": lambda step: cut(step / "about" / "metadata"),
    "about of another": lambda step: (step / "about" / "metadata").write_text("{}"),
    "structure cut": lambda step: cut(step / "state" / "_METADATA"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_an_error_and_the_one_before_is_found(
    folder, damage, tmp_path
):
    path = fill(folder, 1, 2)
    DAMAGE[damage](path / "2")
    with pytest.raises(arrays.DamagedError, match=r"checkpoints/2 is damaged") as e:
        checkpoint.restore(folder(), 2, LIKE)
    assert "\n" not in str(e.value)
    said = []
    checkpoints = folder()
    found = checkpoint.newest(checkpoints, LIKE, said.append)
    assert found.step == 1
    assert_same(found.state, state(1))
    assert len(said) == 1
    assert "put aside" in said[0]
    # The step is free again.
    assert checkpoints.steps() == [1]
    assert (tmp_path / "damaged" / "2").is_dir()
    checkpoints.save(2, state(9), {})
    checkpoints.wait()
    assert_same(checkpoint.restore(folder(), 2, LIKE).state, state(9))


def test_a_fingerprint_that_differs_by_one_bit_is_damage(folder):
    """Where the file system gives back other numbers in a file that can be read."""
    path = fill(folder, 1)
    file = path / "1" / "about" / "metadata"
    document = json.loads(file.read_text())
    document["fingerprints"][-1] ^= 1
    file.write_text(json.dumps(document))
    with pytest.raises(arrays.DamagedError, match=r"1 arrays .* first \['weights'\]"):
        checkpoint.restore(folder(), 1, LIKE)


def test_nothing_can_be_read(folder):
    path = fill(folder, 1)
    cut(largest(path / "1"))
    with pytest.raises(ValueError, match="no checkpoint can be read; the newest: "):
        checkpoint.newest(folder(), LIKE, print)
    assert (path / "1").is_dir()


def test_no_checkpoint_yet(folder):
    assert checkpoint.newest(folder(), LIKE, print) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"half": jnp.zeros(8, jnp.bfloat16)},
            r"\['half'\] is bfloat16\(7,\) there and bfloat16\(8,\) in this config\.",
        ),
        ({"half": jnp.zeros(7)}, r"is bfloat16\(7,\) there and float32\(7,\)"),
        ({"more": jnp.zeros(7)}, r"\['more'\] is nothing there and float32\(7,\)"),
        ({"half": None}, r"\['half'\] is bfloat16\(7,\) there and nothing in this"),
    ],
)
def test_a_foreign_checkpoint_is_an_error_that_names_what_differs(
    folder, change, message
):
    path = fill(folder, 1, 2)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.newest(folder(), shapes(state() | change), print)
    assert not isinstance(caught.value, arrays.DamagedError)
    assert sorted(p.name for p in path.iterdir()) == ["1", "2"]


def test_what_a_crash_left_half_written_is_removed(folder):
    path = fill(folder, 1)
    shutil.copytree(path / "1", path / "2.orbax-checkpoint-tmp")
    checkpoints = folder()
    assert checkpoints.steps() == [1]
    assert sorted(p.name for p in path.iterdir()) == ["1"]


def test_fingerprints_see_every_bit_and_every_exchange():
    base = state()
    expected = [int(f) for f in arrays.fingerprints(base)]
    index = [
        jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(base)
    ]
    rng = np.random.default_rng(0)
    for _ in range(20):
        row, column, bit = rng.integers(1000), rng.integers(50), rng.integers(32)
        host = np.array(base["weights"])
        host.view(np.uint32)[row, column] ^= np.uint32(1) << np.uint32(bit)
        changed = base | {"weights": jnp.asarray(host)}
        changed = [int(f) for f in arrays.fingerprints(changed)]
        differing = {
            n for n, a, b in zip(index, changed, expected, strict=True) if a != b
        }
        assert differing == {"['weights']"}
    swapped = base["weights"].at[:2].set(base["weights"][1::-1])
    assert int(arrays.fingerprints([swapped])[0]) not in expected
    (zero,) = arrays.fingerprints([jnp.zeros(3)])
    (negative,) = arrays.fingerprints([jnp.zeros(3).at[1].set(-0.0)])
    assert zero != negative


FULL = """
import pathlib, resource, sys
import jax.numpy as jnp
import numpy as np
from kvjax import files
from kvjax.training import checkpoint

checkpoints = checkpoint.open_folder(pathlib.Path(sys.argv[1]), keep=2)
rng = np.random.default_rng(0)
tree = {"weights": jnp.asarray(rng.normal(size=1_000_000), jnp.float32)}
checkpoints.save(1, tree, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, tree, {})
    checkpoints.wait()
except OSError as error:
    print(error)
print(sorted(p.name for p in checkpoints.folder.iterdir()))
"""


def test_a_disk_that_is_full_leaves_the_older_checkpoint(tmp_path):
    # A limit on the size of a file fails the same write calls as a full disk.
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    error, left = done.stdout.splitlines()
    assert "could not be written" in error
    assert "(File too large); that of step 1 is whole. Make room" in error
    assert left == "['1']"
    assert done.stderr == ""
    like = shapes({"weights": jnp.zeros(1_000_000)})
    found = checkpoint.newest(checkpoint.open_folder(tmp_path, keep=2), like, print)
    expected = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    np.testing.assert_array_equal(found.state["weights"], expected)
