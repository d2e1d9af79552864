"""The names of a comparison's rows: without what all share, their budgets apart."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvjax.evaluation import records
from kvjax.report import terminal


class Labels(NamedTuple):
    """Names of rows, in their order, each with its budget where that tells them apart.

    Fields:
        names: specs, without options that all rows share.
        budgets: of each row, None where it has none; None if no two rows differ in
            their budget alone.
        shared: a sentence on what was left out of the names, or "".
    """

    names: list[str]
    budgets: list[int | None] | None
    shared: str

    def whole(self, row: int) -> str:
        """The name of a row with its budget, as in a sentence."""
        budget = None if self.budgets is None else self.budgets[row]
        return self.names[row] if budget is None else f"{self.names[row]} at {budget}"


def of_specs(specs: Sequence[str]) -> Labels:
    """The labels of rows with these specs, which all differ."""
    methods = [terminal.without_value(spec, "budget") for spec in specs]
    if len(set(methods)) == len(set(specs)):
        names, shared = terminal.shared_options(specs)
        return Labels(names, None, shared)
    names, shared = terminal.shared_options(methods)
    return Labels(names, [records.budget(spec) for spec in specs], shared)


def of_results(results: Mapping[str, Any]) -> Labels:
    """The labels of a comparison's rows."""
    return of_specs([row["method"] for row in results["rows"]])
