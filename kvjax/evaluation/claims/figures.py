"""Claims as pictures: every interval beside no effect, and what lies behind some."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvjax.evaluation.claims.claim import VERDICTS

_COLOURS = dict(
    zip(VERDICTS, ("#3b8f4b", "#a98a12", "#b3315f", "#9aa5b1"), strict=True)
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

    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    return figure, axis


def position(row: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Value and ends on a scale where 0 is no effect and right is what is claimed.

    The end farthest from 0 is at 1 or -1; None where nothing was measured.
    """
    if row["value"] is None:
        return None
    sign = -1.0 if row["better"] == "lower" else 1.0
    ends = [row["value"] if x is None else x for x in row["interval"]]
    found = [sign * (x - row["none"]) for x in (row["value"], *ends)]
    scale = max(map(abs, found)) or 1.0
    value, *ends = (x / scale for x in found)
    return value, min(ends), max(ends)


def intervals(rows: Sequence[Mapping[str, Any]]):
    """A line a claim: its interval, each on a scale of its own."""
    figure, axis = _figure(9.0, 0.8 + 0.24 * len(rows))
    for index, row in enumerate(rows):
        colour = _COLOURS[row["verdict"]]
        placed = position(row)
        if placed is None:
            axis.plot(0, index, "x", color=colour)
            continue
        value, low, high = placed
        axis.hlines(index, low, high, color=colour)
        axis.plot(value, index, "o", color=colour, markersize=5)
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(-1.1, 1.1)
    axis.set_xticks([-1, 0, 1], ["against the claim", "no effect", "as claimed"])
    return figure


def gains(found: Mapping[str, Any]):
    """The error that completion saves a head, by the entropy of its attention."""
    figure, axis = _figure(6.0, 3.4)
    axis.scatter(found["entropy"], found["gain"], s=28, color="#2a78b5")
    axis.axhline(0, color="#333333", linewidth=0.8)
    axis.set_xlabel("entropy of the middle, over its logarithm")
    axis.set_ylabel("relative error saved")
    return figure


def drift(found: Mapping[str, Any]):
    """What is lost to full attention by the place in the output."""
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
