"""Pareto fronts: the rows of a comparison that none beats in bytes and result both."""

from collections.abc import Mapping, Sequence
from typing import Any

# Results that a front may be of, and whether more is better.
MORE_IS_BETTER = {
    "kl": False,
    "passkey": True,
    "multikey": True,
    "chain": True,
    "own": True,
    "passkey_after": True,
    "multikey_after": True,
    "chain_after": True,
    "own_after": True,
}


def front(
    num_bytes: Sequence[int | float],
    values: Sequence[int | float | None],
    *,
    more_is_better: bool,
) -> list[int]:
    """The indices of what no other beats, by bytes and then in the given order.

    One beats another by no more bytes and no worse a value, and one of the two better.
    What has no value is on no front.
    """
    sign = -1.0 if more_is_better else 1.0
    costs = [
        (size, sign * value, index)
        for index, (size, value) in enumerate(zip(num_bytes, values, strict=True))
        if value is not None
    ]
    return [
        index
        for size, cost, index in sorted(costs)
        if not any(
            (a, b) != (size, cost) and a <= size and b <= cost for a, b, _ in costs
        )
    ]


def fronts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The methods on the front of each result against the bytes read per token.

    By the estimates alone: intervals of neighbours may overlap.

    Args:
        rows: of a comparison, as JSON has them.
    """
    sizes = [row["bytes_read"] for row in rows]
    found = {}
    for name, more_is_better in MORE_IS_BETTER.items():
        values = [(row.get(name) or {}).get("mean") for row in rows]
        if any(value is not None for value in values):
            places = front(sizes, values, more_is_better=more_is_better)
            found[name] = [rows[place]["method"] for place in places]
    return found
