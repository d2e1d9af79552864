"""A method is one file, one line, one test: in a copy of the tree, a toy is added so.

The three alone leave one test red, which says what to write; then all is green.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("kvjax", "tests", "docs", "README.md")
LINKED = ("models", "pallas_kernels", "benchmarks", "colab", "pyproject.toml")
LINKED += ("CITATION.cff", "CONTRIBUTING.md", "NOTES.md")

METHOD = '''\
"""Toy: the newest token of every page of a few, and all of the newest page."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import dense
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, kept_slots
from pallas_kernels.decode_attention import decode_attention


@typed
@softmax_only
def toy(*, budget: int = 1024) -> Method:
    """Keeps every key; per step reads the newest tokens, and every second before them.

    Args:
        budget: tokens attended to per step, the current one included.

    Returns:
        A :class:`kvjax.Method` over :class:`kvjax.stores.contiguous.Contiguous`.

    State: k, v `(B, Hkv, S, D)` cache dtype; length `(B,)` int32.
    Reads per step and layer: 2*min(budget, length)*D*Hkv elements of KV, per row.
    Exact when: budget >= length.

    Raises:
        ValueError: if `budget` is below 1.

    Source:
        Nobody et al., "A Toy to Test With", 2031, arXiv:3101.00001, Sec. 1.
    Deviations:
        none known.
    """
    if budget < 1:
        raise ValueError(f"{budget=} must be at least 1 token.")

    def chosen(length: Int[Array, "B"], heads: int) -> Int[Array, "B H N"]:
        back = jnp.arange(budget, dtype=jnp.int32)
        far = jnp.where(length[:, None] > budget, 2 * back, back)
        kept = jnp.maximum(length[:, None] - 1 - far, -1)
        return jnp.repeat(kept[:, None], heads, axis=1)

    def inspect_step(
        state: contiguous.Contiguous, q: Float[Array, "B Hq T D"]
    ) -> tuple[contiguous.Contiguous, Float[Array, "B Hq T D"], Diagnostics]:
        rotated, positions = contiguous.rotate_queries(state.spec, q, state.length)
        kept = chosen(state.length, state.spec.num_kv_heads)
        k, v = buffers.gather(state.k, kept), buffers.gather(state.v, kept)
        out, lse = decode_attention(
            rotated, k, v, positions, kept, sm_scale=state.spec.sm_scale
        )
        exact = kept_slots.holds_all(kept, state.length, q.shape[1])
        diagnostics = Diagnostics(kept, lse, state.length <= budget, exact)
        return state, out.astype(q.dtype), diagnostics

    def traffic(spec: CacheSpec, length: int) -> Traffic:
        return Traffic(kv=buffers.kv_bytes(spec, min(budget, length)), metadata=0)

    return dense.method()._replace(inspect_step=inspect_step, traffic=traffic)
'''

TEST = '''\
"""Toy: what it reads."""

import drive

from kvjax.methods.toy import toy


def test_reads_every_second_token():
    stream = drive.make_stream((9,), 2)
    run = drive.run(toy(budget=3), drive.make_spec(stream), stream)
    drive.assert_consistent(run, stream)
    for step, expected in enumerate(([5, 7, 9], [6, 8, 10])):
        attended = run.diagnostics.attended[step, 0]
        assert drive.attended_positions(attended, 4) == [expected] * 4
'''

CARD = (
    "| Every second token | `kvjax/methods/toy.py:inspect_step` "
    "| `tests/methods/test_toy.py:test_reads_every_second_token` |\n"
)

# Of files that are about all methods, what is about this one; the rest whole.
ABOUT_IT = ("test_contract", "test_accounting", "test_registry", "test_architecture")
WHOLE = ("test_citations", "test_fidelity_cards", "test_readme", "test_named")


@pytest.fixture
def tree(tmp_path):
    """A copy of the repository, with the toy in it."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            junk = shutil.ignore_patterns("__pycache__", "_build", "notebooks")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=junk)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    # Pages that are not current are another test's.
    assert run(tmp_path, "tests/test_readme.py").returncode == 0
    (tmp_path / "kvjax/methods/toy.py").write_text(METHOD)
    with (tmp_path / "kvjax/registry/built_in.py").open("a") as file:
        file.write("from kvjax.methods.toy import toy as toy\n")
    (tmp_path / "tests/methods/test_toy.py").write_text(TEST)
    return tmp_path


def run(tree, *command):
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_three_files_make_a_method(tree):
    pytest_of_it = ("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--tb=short")
    # Commands that pages show are run as they are; none is about this method.
    about = " or ".join(ABOUT_IT)
    chosen = ("-k", f"(toy or not ({about})) and not shown")
    files = [f"tests/{name}.py" for name in (*WHOLE, *ABOUT_IT, "methods/test_toy")]
    done = run(tree, *pytest_of_it, *files, *chosen)
    last = done.stdout.splitlines()[-1]
    assert re.match(r"1 failed, \d+ passed", last), done.stdout[-5000:]
    assert "docs/fidelity.md has no card of toy." in done.stdout
    assert "`python tests/test_fidelity_cards.py` writes it but for its rows" in (
        done.stdout
    )

    # As it says.
    assert run(tree, "tests/test_fidelity_cards.py").returncode == 0
    with (tree / "docs/fidelity.md").open("a") as page:
        page.write(CARD)
    done = run(tree, "tests/test_readme.py")
    assert done.returncode == 0, done.stderr
    assert "| `toy` | Keeps every key; per step" in (tree / "README.md").read_text()
    assert "  methods/toy.py " in (tree / "docs/tree.md").read_text()
    files = ["tests/test_fidelity_cards.py", "tests/test_readme.py"]
    done = run(tree, *pytest_of_it, *files, *chosen)
    assert re.match(r"\d+ passed", done.stdout.splitlines()[-1]), done.stdout[-5000:]
