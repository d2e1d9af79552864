"""Every Triton kernel compiles for GPUs that are not there, as small as recorded."""

import importlib.util
import json

import pytest
from aot import gpu, triton_cases
from aot.cases import PROBLEMS

REASON = gpu.unavailable()
if REASON is None and importlib.util.find_spec("jax_triton") is None:
    REASON = "Triton kernels need jax-triton: pip install 'kvjax[triton]'"
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))

GROWTH = 1.1  # of registers, over what is recorded


def _recorded(target):
    rows = json.loads(triton_cases.RESULTS.read_text())
    return [row for row in rows if row["target"] == target]


@needs_compiler
@pytest.mark.parametrize("target", triton_cases.TARGETS)
def test_resources_and_temporaries(target):
    """No hidden copy of a cache; no spills; registers and shared memory as recorded."""
    rows, recorded = triton_cases.figures(target), _recorded(target)
    for row, before in zip(rows, recorded, strict=True):
        assert (row["case"], row["kernel"]) == (before["case"], before["kernel"])
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] <= GROWTH * before["registers"], (row, before)
        assert row["shared_bytes"] <= before["shared_bytes"], (row, before)
        assert row["temp_bytes"] < triton_cases.TEMP_LIMIT, row
        # Of pages while others are multiplied; of float32 without tensor cores.
        is_piped = row["kernel"] in (
            "_decode_attention",
            "_page_attention",
            "_page_entmax_scores",
        )
        assert (row["async_copies"] > 0) == is_piped
        multiplies = (
            row["kernel"].startswith(("_page", "_decode")) and "f32" not in row["case"]
        )
        assert (row["matrix_products"] > 0) == multiplies


def test_the_record_is_of_these_cases():
    for target, expected in triton_cases.TARGETS.items():
        names = [row["case"] for row in _recorded(target)]
        assert tuple(dict.fromkeys(names)) == expected
    names = {x for names in triton_cases.TARGETS.values() for x in names}
    assert names <= set(PROBLEMS)


@needs_compiler
def test_a_failed_compilation_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)a100.*KeyError: 'no such case'"):
        triton_cases.figures("a100", "no such case")
