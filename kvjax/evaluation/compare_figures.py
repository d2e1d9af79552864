"""The comparison as pictures: accuracy against bytes, and needles by depth."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

DEPTH_TASKS = {"passkey": "pass key", "multikey": "one key of many"}
TASKS = DEPTH_TASKS | {"chain": "chain of keys"}
_COLOURS = (
    *("#4c5866", "#c2571a", "#2a78b5", "#3b8f4b", "#8a5fb0"),
    *("#b3315f", "#1f9e9a", "#a98a12", "#6b6ecf", "#7b4a2e"),
)


def _figure(width: float, height: float):
    # No pyplot: it keeps state, and may look for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def scatter(results: Mapping[str, Any]):
    """Accuracy against bytes read per token, a panel a retrieval task."""
    figure = _figure(12.0, 3.9)
    axes = figure.subplots(1, len(TASKS), sharey=True)
    rows = results["rows"]
    for axis, task in zip(axes, TASKS, strict=True):
        for index, row in enumerate(rows):
            share = row[task]
            spread = [
                [max(share["mean"] - share["low"], 0)],
                [max(share["high"] - share["mean"], 0)],
            ]
            axis.errorbar(
                row["bytes_read"] / 1024,
                share["mean"],
                yerr=spread,
                fmt="s" if index == 0 else "o",
                markersize=7,
                capsize=3,
                elinewidth=1,
                color=_COLOURS[index % len(_COLOURS)],
                label=row["method"],
            )
        axis.set_title(TASKS[task])
        axis.set_xlabel("KiB of cache read per token")
        axis.set_xscale("log")
        _plain_ticks(axis, [row["bytes_read"] / 1024 for row in rows])
        axis.set_ylim(-0.04, 1.06)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("answered correctly; of chains, before a mistake")
    axes[0].yaxis.set_major_formatter(lambda value, position: f"{100 * value:.0f}%")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def _plain_ticks(axis, values: Sequence[float]) -> None:
    # Decades are too coarse for a factor of four, and 2 x 10^1 is hard to read.
    low, high = math.log2(min(values)), math.log2(max(values))
    step = max(1, math.ceil((high - low) / 5))
    powers = range(math.floor(low), math.ceil(high) + 1, step)
    axis.set_xticks([2.0**power for power in powers])
    axis.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.minorticks_off()
    axis.set_xlim(2 ** (low - 0.5), 2 ** (high + 0.5))


def needles(results: Mapping[str, Any]):
    """Share of needles found, depth by method, a panel a task."""
    rows = results["rows"]
    figure = _figure(10.0, 1.3 + 0.34 * len(rows))
    axes = figure.subplots(1, len(DEPTH_TASKS), sharey=True)
    for axis, task in zip(axes, DEPTH_TASKS, strict=True):
        cells = [row[f"{task}_by_depth"] for row in rows]
        shares = [[c["correct"] / c["asked"] for c in line] for line in cells]
        # Vectors, not a bitmap: sharp at any size.
        axis.pcolormesh(
            shares, vmin=0, vmax=1, cmap="YlGnBu", edgecolors="white", linewidth=2
        )
        for y, line in enumerate(cells):
            for x, cell in enumerate(line):
                axis.text(
                    x + 0.5,
                    y + 0.5,
                    f"{cell['correct']}/{cell['asked']}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if shares[y][x] > 0.55 else "#333333",
                )
        depths = [f"{100 * cell['depth']:.0f}%" for cell in cells[0]]
        axis.set_xticks([x + 0.5 for x in range(len(depths))], depths)
        names = [row["method"] for row in rows]
        axis.set_yticks([y + 0.5 for y in range(len(rows))], names)
        axis.set_ylim(len(rows), 0)
        axis.tick_params(length=0)
        axis.set_title(DEPTH_TASKS[task])
        axis.set_xlabel("depth of the needle in the prompt")
        axis.spines[:].set_visible(False)
    return figure
