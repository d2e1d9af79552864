"""A paper's claim, what was measured of it here, and what follows from the two.

A verdict is computed from the value, its interval and the bar that the claim names
before anything is measured; nobody writes it.
"""

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from kvjax.evaluation.statistics import Interval

Verdict = Literal["reproduced", "direction only", "not reproduced", "not measured"]
VERDICTS: tuple[Verdict, ...] = (
    "reproduced",
    "direction only",
    "not reproduced",
    "not measured",
)
# When a row was measured: else the date and machine of the recorded run.
NOW = "now"
FROM_SHAPES = "never: counted"  # what a formula gives, whatever the machine


class NotMeasuredError(Exception):
    """A claim cannot be measured here; the message says what it would take."""


class Measured(NamedTuple):
    """A value with its 95% interval and the number of independent samples.

    A count, which has no sampling error, is its own interval; ends that are infinite
    say that the spread is not known.
    """

    value: float
    low: float
    high: float
    n: int
    when: str = NOW
    # What else was found: JSON-ready, for the document and the report's figures.
    details: Mapping[str, Any] = {}
    note: str = ""  # what a reader must know beside the value, with its figures


def of_interval(interval: Interval, **about: Any) -> Measured:
    """An estimate of :mod:`kvjax.evaluation.statistics`; `about` are other fields."""
    return Measured(interval.mean, interval.low, interval.high, interval.n, **about)


def in_whole(value: float, n: int, **about: Any) -> Measured:
    """A value over everything there is, such as a largest: no sample of it."""
    return Measured(value, value, value, n, **about)


def from_shapes(value: float, **about: Any) -> Measured:
    """A value that formulas of kvjax give: nothing was run, and no run can differ."""
    return Measured(value, value, value, 1, when=FROM_SHAPES, **about)


def without_spread(value: float, n: int, **about: Any) -> Measured:
    """A value whose spread was not recorded: it can show a direction and no more."""
    return Measured(value, -math.inf, math.inf, n, **about)


class Effect(NamedTuple):
    """The claim is that something changes: beyond `none`, and as far as `bar`."""

    none: float  # the value that says: no effect
    bar: float  # the value that says: as much as claimed
    better: Literal["higher", "lower"] = "higher"

    def verdict(self, found: Measured) -> tuple[Verdict, str]:
        """The verdict, and what it follows from."""
        sign = 1.0 if self.better == "higher" else -1.0
        # The end of the interval that speaks against the claim.
        worst = found.low if self.better == "higher" else found.high
        side = "above" if self.better == "higher" else "below"
        if not sign * (found.value - self.none) > 0:
            return "not reproduced", f"not {side} {_say(self.none)}, which is no effect"
        if not sign * (worst - self.none) > 0:
            if math.isinf(worst):
                return "direction only", "the spread is not known"
            return "direction only", f"the interval holds {_say(self.none)}, no effect"
        if sign * (found.value - self.bar) < 0:
            return (
                "direction only",
                f"smaller than claimed: the bar is {self.describe()}",
            )
        return "reproduced", f"the interval is {side} {_say(self.none)}, no effect"

    def describe(self) -> str:
        """The bar in symbols."""
        if self.bar == self.none:
            return ("> " if self.better == "higher" else "< ") + _say(self.none)
        return ("≥ " if self.better == "higher" else "≤ ") + _say(self.bar)


class Within(NamedTuple):
    """The claim is that something does not change or stays small: up to `bound`."""

    bound: float
    better: Literal["higher", "lower"] = "lower"

    @property
    def none(self) -> float:
        """The value up to which the claim holds."""
        return self.bound

    def verdict(self, found: Measured) -> tuple[Verdict, str]:
        """The verdict, and what it follows from."""
        sign = 1.0 if self.better == "higher" else -1.0
        worst = found.low if self.better == "higher" else found.high
        if not sign * (found.value - self.bound) >= 0:
            return "not reproduced", f"outside the bar of {self.describe()}"
        if sign * (worst - self.bound) >= 0:
            return "reproduced", f"the whole interval is {self.describe()}"
        if math.isinf(worst):
            return "direction only", "the spread is not known"
        return "direction only", f"the interval is not all {self.describe()}"

    def describe(self) -> str:
        """The bar in symbols."""
        return ("≥ " if self.better == "higher" else "≤ ") + _say(self.bound)


def _say(value: float) -> str:
    return f"{value:.4g}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        name: what `--claim` takes.
        method: the factory that the claim is about, as `kvjax methods` lists it.
        sentence: the claim, in the present tense.
        source: arXiv id, and the table, figure or section; "ours" is said where the
            paper does not say it.
        paper: its figure, in words.
        value: what `measure` gives, with its unit.
        bar: what the value is held against.
        measure: takes the session, returns the value.
        because: of a verdict that is not "reproduced", the reason that was found.
        note: where the setting here is not the paper's.
        elsewhere: fields that differ on another model than the embedded ones.
        model: that other model.
    """

    name: str
    method: str
    sentence: str
    source: str
    paper: str
    value: str
    bar: Effect | Within
    measure: Callable[[Any], Measured]
    because: Mapping[Verdict, str] = dataclasses.field(default_factory=dict)
    note: str = ""
    elsewhere: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""

    @property
    def command(self) -> str:
        """The command that measures it alone."""
        given = f"--model {shlex.quote(self.model)} " if self.model else ""
        return f"kvjax reproduce {given}--claim {self.name}"

    def on(self, model: str) -> "Claim":
        """The claim as it is measured on another model than the embedded ones.

        The reasons that were found are of the embedded models, and are left out.
        """
        fields: dict[str, Any] = {"because": {}, "model": model, **self.elsewhere}
        return dataclasses.replace(self, **fields)


@dataclasses.dataclass(frozen=True)
class Row:
    """A claim, judged."""

    claim: Claim
    found: Measured | None
    verdict: Verdict
    reason: str
    seconds: float  # of wall clock
    cpu_seconds: float  # of all threads of this process


def judge(
    claim: Claim, found: Measured, seconds: float = 0.0, cpu_seconds: float = 0.0
) -> Row:
    """The row of a claim that was measured.

    Raises:
        ValueError: if the value is not finite, or not within its own interval.
    """
    if not math.isfinite(found.value) or not found.low <= found.value <= found.high:
        raise ValueError(
            f"{claim.name}: value={found.value} must be finite and within its interval "
            f"[{found.low}, {found.high}]."
        )
    verdict, reason = claim.bar.verdict(found)
    parts = [reason, claim.because.get(verdict, ""), claim.note, found.note]
    reason = " ".join(f"{part[0].upper()}{part[1:]}." for part in parts if part)
    return Row(claim, found, verdict, reason, seconds, cpu_seconds)


def not_measured(claim: Claim, reason: str) -> Row:
    """The row of a claim that could not be measured."""
    return Row(claim, None, "not measured", reason, 0.0, 0.0)


def of_dict(claim: Claim, entry: Mapping[str, Any]) -> Row:
    """The row that :func:`as_dict` wrote, judged again."""
    seconds = float(entry["seconds"]), float(entry["cpu_seconds"])
    if entry["value"] is None:
        return not_measured(claim, entry["reason"])
    low, high = entry["interval"]
    found = Measured(
        entry["value"],
        -math.inf if low is None else low,
        math.inf if high is None else high,
        entry["n"],
        when=entry["measured"],
        details=entry["details"],
        note=entry["note"],
    )
    return judge(claim, found, *seconds)


def as_dict(row: Row) -> dict[str, Any]:
    """A row for JSON; infinite ends are left to `report.json_ready`."""
    claim, found = row.claim, row.found
    entry: dict[str, Any] = {
        "name": claim.name,
        "method": claim.method,
        "claim": claim.sentence,
        "source": claim.source,
        "paper": claim.paper,
        "measures": claim.value,
        "bar": claim.bar.describe(),
        "none": claim.bar.none,
        "better": claim.bar.better,
        "value": None,
        "interval": None,
        "n": 0,
        "measured": None,
        "verdict": row.verdict,
        "reason": row.reason,
        "note": "",
        "command": claim.command,
        "seconds": round(row.seconds, 1),
        "cpu_seconds": round(row.cpu_seconds, 1),
        "details": {},
    }
    if found is not None:
        entry |= {
            "value": found.value,
            "interval": [found.low, found.high],
            "n": found.n,
            "measured": found.when,
            "note": found.note,
            "details": dict(found.details),
        }
    return entry
