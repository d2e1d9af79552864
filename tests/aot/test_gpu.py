"""Every Mosaic kernel compiles for a GPU that is not there, as small as recorded."""

import json

import pytest
from aot import gpu

reason = gpu.unavailable()
needs_compiler = pytest.mark.skipif(reason is not None, reason=str(reason))

GROWTH = 1.1  # of registers and spills, over what is recorded


def _recorded():
    return {row["case"]: row for row in json.loads(gpu.RESULTS.read_text())}


@needs_compiler
@pytest.mark.parametrize("target", sorted({case.target for case in gpu.CASES.values()}))
def test_resources_and_temporaries(target):
    """No hidden copy of a cache, and programs that still fit side by side."""
    recorded = _recorded()
    rows = gpu.figures(target)
    assert [row["case"] for row in rows] == [
        name for name, case in gpu.CASES.items() if case.target == target
    ]
    for row in rows:
        case, before = gpu.CASES[row["case"]], recorded[row["case"]]
        assert row["kernel"] == case.kernel
        assert row["temp_bytes"] < case.temp_limit, row
        assert row["programs"] >= case.programs, row
        if row["jax"] != before["jax"]:  # a record is of one compiler
            continue
        for figure in ("registers", "spilled_bytes"):
            assert row[figure] <= GROWTH * before[figure], (figure, row, before)
        assert row["shared_bytes"] <= before["shared_bytes"], (row, before)


@needs_compiler
def test_a_failed_compilation_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)h100.*KeyError: 'no such case'"):
        gpu.figures("h100", "no such case")


def test_the_record_is_of_these_cases():
    assert list(_recorded()) == list(gpu.CASES)


def test_the_bars_are_met_by_the_record():
    """Two programs share a multiprocessor, without spills, up to a D of 128."""
    for name, row in _recorded().items():
        case = gpu.CASES[name]
        assert row["programs"] >= case.programs, row
        assert row["temp_bytes"] < case.temp_limit, row
        assert row["spilled_bytes"] == 0 or "D256" in name, row


def test_resources_are_read_from_what_was_printed():
    """Two kernels; the second spills, and its registers leave room for two."""
    listing = "".join(
        f"""
Resources(smem_scratch_bytes={shared}, tmem_scratch_cols=0)
ptxas info    : Compiling entry function '{name}_mosaic_gpu_kernel' for 'sm_90a'
    8 bytes stack frame, {spilled} bytes spill stores, 4 bytes spill loads
ptxas info    : Used {registers} registers, used 2 barriers, 1 bytes smem
"""
        for name, shared, spilled, registers in [
            ("one", 75_000, 0, 129),
            ("other", 1000, 12, 255),
        ]
    )
    one, other = gpu.resources(listing, 228 << 10)
    assert one == {
        "kernel": "one",
        "registers": 129,
        "spilled_bytes": 4,
        "shared_bytes": 75_000,
        "programs": 3,
    }
    assert (other["spilled_bytes"], other["programs"]) == (12, 2)
    with pytest.raises(ValueError, match="zip"):
        gpu.resources(listing[: listing.index("ptxas")], 228 << 10)
