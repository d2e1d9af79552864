"""Claims as pictures: every interval beside no effect, and what lies behind some."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kvjax.evaluation.claims.claim import VERDICTS


class Look(NamedTuple):
    """The look of a verdict: apart in colour, and in shape."""

    colour: str
    marker: str
    is_filled: bool


LOOKS: dict[str, Look] = dict(
    zip(
        VERDICTS,
        (
            Look("#0072b2", "o", True),
            Look("#b8860b", "o", False),
            Look("#b3315f", "s", True),
            Look("#7b8794", "x", True),
        ),
        strict=True,
    )
)
# Where a value without an interval is drawn: on its side, at no distance.
SIDE = 0.5
SCALE = (
    "Each row has a scale of its own: 0 is no effect, or the bound of what is to stay "
    "small, and the end of the 95% interval that is farthest from it is 1. Lengths of "
    "two rows do not compare, and how much was claimed is not on it. A triangle is a "
    "value without an interval: counted, or of unknown spread; only its side says "
    "something."
)


def every(
    rows: Sequence[Mapping[str, Any]], details: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """Titles and figures of what these rows have found."""
    if any(row["value"] is not None for row in rows):
        yield "Every value beside no effect", intervals(rows)
    if "gain" in details.get("completion-entropy", {}):
        yield (
            "Completion by the entropy of a head",
            gains(details["completion-entropy"]),
        )
    if "nats_lost_by_place" in details.get("refresh-drift", {}):
        yield "Nats lost, token by token", drift(details["refresh-drift"])
    if "by_window" in details.get("retro-exposure", {}):
        yield "Pages a token comes to see", exposure(details["retro-exposure"])


def _figure(width: float, height: float):
    # No pyplot: it keeps state, and may look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    return figure, axis


def position(row: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Value and ends on a scale where 0 is no effect and right is the claim's side.

    The end farthest from 0 is at 1 or -1. A value without an interval has no scale: it
    is at `SIDE` or -`SIDE`, or 0. None where nothing was measured.
    """
    if row["value"] is None:
        return None
    sign = -1.0 if row["better"] == "lower" else 1.0
    ends = [sign * (row["value"] - row["none"])]
    if not has_interval(row):
        side = SIDE * ((ends[0] > 0) - (ends[0] < 0))
        return side, side, side
    ends += [sign * (end - row["none"]) for end in row["interval"]]
    scale = max(map(abs, ends)) or 1.0
    value, *ends = (x / scale for x in ends)
    return value, min(ends), max(ends)


def has_interval(row: Mapping[str, Any]) -> bool:
    """Says whether a value has ends that differ: counts and single runs have none."""
    ends = row["interval"] or (None, None)
    known = all(end is not None and math.isfinite(end) for end in ends)
    return known and ends[0] != ends[1]


def intervals(rows: Sequence[Mapping[str, Any]]):
    """A line a claim: its interval, each on a scale of its own, with a key."""
    figure, axis = _figure(9.0, 2.0 + 0.24 * len(rows))
    for index, row in enumerate(rows):
        look = LOOKS[row["verdict"]]
        placed = position(row)
        if placed is None:
            _mark(axis, 0.0, index, look, look.marker)
            continue
        value, low, high = placed
        if has_interval(row):
            axis.hlines(index, low, high, color=look.colour)
            _mark(axis, value, index, look, look.marker)
        else:
            marker = {-1: "<", 0: look.marker, 1: ">"}[round(value / SIDE)]
            _mark(axis, value, index, look, marker)
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(-1.1, 1.1)
    axis.set_xticks([-1, 0, 1], ["-1", "0, no effect", "1"])
    left, right = "\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"
    axis.set_xlabel(f"against the claim  {left}     {right}  in its direction")
    _key(figure, [verdict for verdict in LOOKS if verdict in _verdicts(rows)])
    figure.supxlabel(textwrap.fill(SCALE, 120), fontsize=8, color="#52606d")
    return figure


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    return {row["verdict"] for row in rows}


def _mark(axis, x: float, row: int, look: Look, marker: str) -> None:
    face = look.colour if look.is_filled else "white"
    axis.plot(x, row, marker, color=look.colour, markerfacecolor=face, markersize=6)


def _key(figure, verdicts: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for verdict in verdicts:
        look = LOOKS[verdict]
        face = look.colour if look.is_filled else "white"
        line = "none" if look.marker == "x" else "-"
        handles.append(
            Line2D(
                [],
                [],
                color=look.colour,
                marker=look.marker,
                markerfacecolor=face,
                linestyle=line,
                label=verdict,
            )
        )
    handles.append(
        Line2D(
            [], [], color="#52606d", marker=">", linestyle="none", label="no interval"
        )
    )
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False
    )


def gains(found: Mapping[str, Any]):
    """The error that completion saves a head, by the entropy of its attention."""
    figure, axis = _figure(6.0, 3.4)
    axis.scatter(found["entropy"], found["gain"], s=28, color="#2a78b5")
    axis.axhline(0, color="#333333", linewidth=0.8)
    axis.set_xlabel("entropy of the middle, over its logarithm")
    axis.set_ylabel("relative error saved")
    return figure


def drift(found: Mapping[str, Any]):
    """Draws what is lost to full attention by the place in the output."""
    figure, axis = _figure(6.0, 3.4)
    for name, nats in found["nats_lost_by_place"].items():
        places = [found["bucket"] * (i + 0.5) for i in range(len(nats))]
        axis.plot(places, nats, "o-", label=name)
    axis.axhline(0, color="#333333", linewidth=0.8)
    axis.set_xlabel("tokens after the prompt")
    axis.set_ylabel("nats a token lost to full attention")
    axis.legend(frameon=False)
    return figure


def exposure(found: Mapping[str, Any]):
    """Pages seen, over those of a token's own step, by the window."""
    figure, axis = _figure(6.0, 3.4)
    windows = sorted(found["by_window"], key=int)
    values = [found["by_window"][window] for window in windows]
    axis.plot([int(window) for window in windows], values, "o-", color="#2a78b5")
    axis.set_xlabel("window, tokens")
    axis.set_ylabel("pages seen, over its own")
    return figure
