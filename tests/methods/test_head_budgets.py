"""The KV heads of a layer share one budget: the best of all of them stay."""

import drive
import numpy as np
import oracles
import pytest

import kvjax
from kvjax import accounting
from kvjax.methods.head_budgets import head_budgets
from kvjax.methods.quest import quest
from kvjax.methods.snapkv import snapkv
from kvjax.stores.buffers import kv_bytes

SNAPKV = {"window": 3, "kernel": 3, "pooling": "max", "group_reduce": "max"}
BUDGET = 9


def run(stream, alpha, budget=BUDGET, dtype="float32"):
    method = head_budgets(snapkv(budget=budget, **SNAPKV), alpha=alpha)
    return drive.run(method, drive.make_spec(stream, dtype=dtype), stream)


def kept(found, row):
    """The positions of each KV head in the first step, without that step's token."""
    lists = found.diagnostics.attended[0, row]
    newest = lists.max()
    return [sorted(p for p in one if 0 <= p < newest) for one in lists.tolist()]


@pytest.mark.parametrize(
    ("heads", "alpha"), [((4, 2), 0.2), ((3, 3), 0.0), ((8, 4), 0.7)]
)
def test_equals_float64_loops(heads, alpha):
    """Prompts below, at and above the budget, in one batch; over rings that fill."""
    stream = drive.make_stream((1, 4, 9, 10, 33), 4, heads=heads, sharpness=4.0)
    found = run(stream, alpha)
    options = {"budget": BUDGET, "alpha": alpha, **SNAPKV}
    drive.assert_matches(found, stream, oracles.head_budgets, **options)


def test_heads_keep_more_and_less_and_together_the_budget():
    stream = drive.make_stream((40,), 1, heads=(4, 4), sharpness=4.0, seed=5)
    stream.q[:, 0] *= 0.05  # looks everywhere: no token of its stands out
    freely, safely = (
        [len(one) for one in kept(run(stream, alpha), 0)] for alpha in (0.0, 0.8)
    )
    assert sum(freely) == sum(safely) == 4 * BUDGET
    assert max(freely) > BUDGET > 7 > min(freely)
    assert min(safely) == 7  # floor(0.8 * 9)


def test_an_alpha_of_one_is_the_method_itself():
    stream = drive.make_stream((30, 7), 3)
    alone = snapkv(budget=BUDGET, **SNAPKV)
    expected = drive.run(alone, drive.make_spec(stream), stream)
    found = run(stream, 1.0)
    for row in range(2):
        assert kept(found, row) == kept(expected, row)
    np.testing.assert_allclose(found.out, expected.out, rtol=1e-5, atol=1e-6)


def test_no_byte_of_keys_is_padding():
    """What is held and read is what the method holds and reads, but for the marks."""
    stream = drive.make_stream((40,), 5, heads=(4, 2))
    spec = drive.make_spec(stream, dtype="bfloat16")
    alone = snapkv(budget=BUDGET, **SNAPKV)
    shared = head_budgets(alone)
    slots = spec.num_kv_heads * (BUDGET + 5)
    more = accounting.state_bytes(shared, spec) - accounting.state_bytes(alone, spec)
    assert more == 4 * slots  # the head of each slot
    assert shared.traffic(spec, 40) == kvjax.Traffic(kv_bytes(spec, 14), 8 * slots)
    assert shared.traffic(spec, 3).kv == alone.traffic(spec, 3).kv


def test_half_precision_is_consistent():
    stream = drive.make_stream((40, 9), 4, dtype="bfloat16")
    drive.assert_consistent(run(stream, 0.2, dtype="bfloat16"), stream, "bfloat16")


def test_a_fifth_is_the_floor_by_default():
    stream = drive.make_stream((60,), 1, sharpness=4.0)
    method = head_budgets(snapkv(budget=20, **SNAPKV))
    found = drive.run(method, drive.make_spec(stream), stream)
    options = {"budget": 20, "alpha": 0.2, **SNAPKV}
    drive.assert_matches(found, stream, oracles.head_budgets, **options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_value_or_the_fix():
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"alpha={alpha} must be in .0, 1."):
            head_budgets(snapkv(), alpha=alpha)
    with pytest.raises(
        ValueError, match=r"which quest:.* does not tell: wrap .*head_budgets.snapkv'"
    ):
        head_budgets(quest())
    # Sharing out twice is no method of a number for each head.
    twice = head_budgets(snapkv())._replace(importance=snapkv().importance)
    stream = drive.make_stream((4,), 1)
    with pytest.raises(ValueError, match="becomes SharedSlots does not keep a number"):
        head_budgets(twice).init(drive.make_spec(stream))
