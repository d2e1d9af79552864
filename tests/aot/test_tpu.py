"""Every kernel compiles for TPUs that are not there, and its schedule has not grown."""

import json

import pytest
from aot import cases, tpu

pytest.importorskip("libtpu", reason=tpu.REASON)

GROWTH = 1.1  # of bundles per iteration, over what is recorded


def _recorded():
    rows = json.loads(tpu.RESULTS.read_text())
    return {(row["generation"], row["case"]): row for row in rows}


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_schedules_and_temporaries(generation):
    """No hidden copy of a cache; loops as short as recorded, and within the bars.

    A record is of one compiler: another's schedules only have to keep to the bars.
    """
    recorded = _recorded()
    names = list(cases.CASES)
    if generation != "v5e":  # once for all, elsewhere where there are bars to keep
        names = [n for n in names if generation in cases.CASES[n].bars]
    rows = tpu.figures(generation, *names)
    assert [row["case"] for row in rows] == names
    for row in rows:
        case = cases.CASES[row["case"]]
        before = recorded[generation, row["case"]]
        assert row["temp_bytes"] < case.temp_limit, row
        bundles = row["bundles_per_iteration"]
        if row["compiler"] == before["compiler"]:
            assert bundles <= GROWTH * before["bundles_per_iteration"], (row, before)
        if generation in case.bars:
            assert bundles <= row["hbm_cycles_per_iteration"], row


@pytest.mark.parametrize("generation", ["v5p", "v7x"])
def test_other_generations_compile(generation):
    rows = tpu.figures(generation, *cases.SMOKE)
    assert [row["case"] for row in rows] == list(cases.SMOKE)
    for row in rows:
        assert row["temp_bytes"] < cases.CASES[row["case"]].temp_limit, row


@pytest.mark.parametrize("name", cases.EDGES)
def test_what_is_supported_compiles(name):
    program = tpu.compiled(cases.EDGES[name], "v5e").as_text()
    assert "tpu_custom_call" in program  # the kernel, not XLA's code instead


def test_the_record_is_of_these_cases():
    expected = {
        (generation, name) for generation in ("v5e", "v6e") for name in cases.CASES
    }
    assert set(_recorded()) == expected


def test_loops_are_read_from_a_listing():
    """A loop in a loop, with a branch of few bundles, and code behind both."""
    listing = """
LB: loop body
     0   :  { a }
   0x1 LB: > { b }
   0x2   : > { c }
   0x3 LB: >> { d }
   0x4   :  { e }
   0x5   : > { e }
   0x6 PF: >> { f }
   0x7 PF: > { g }
""" + "".join(f"  {i:#x}   :  {{ h }}\n" for i in range(8, 20))
    assert tpu.loops(listing) == [7, 4]


def test_loops_side_by_side():
    """The second begins a few bundles behind the branch back of the first."""
    listing = """
     0 LB: > { a }
   0x1 LB: >> { b }
   0x2   : >> { c }
   0x3 PF: > { d }
   0x4   :  { e }
   0x5 LB: >> { f }
   0x6 PF: > { g }
"""
    assert tpu.loops(listing) == [7, 2, 1]


def test_a_failed_compilation_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)v5e.*KeyError: 'no such case'"):
        tpu.figures("v5e", "no such case")
