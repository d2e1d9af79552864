"""The comparison as pictures: accuracy against bytes, and needles by depth.

A method has one colour and one marker, and a line through its budgets. Colours are
apart for colour-blind readers too (those of Okabe and Ito, then of Tol), and where they
begin again the markers do not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvjax.report import terminal

DEPTH_TASKS = {"passkey": "pass key", "multikey": "one key of many"}
TASKS = DEPTH_TASKS | {"chain": "chain of keys, before a mistake"}
REFERENCE = "#000000"  # the first row
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#332288", "#882255", "#999933", "#117733", "#aa4499", "#44aa99"),
    *("#cc6677", "#663333", "#666633", "#777777", "#225555", "#994f00"),
)
MARKERS = ("o", "^", "D", "v", "P", "X", "p", "<", "*", ">", "h", "d", "8")
SIZE = 7.0  # of a marker, points
APART = 9.0  # between the middles of two that would hide each other
NARROW = 4.9  # inches of a figure for a narrow screen
PANEL = 205.0, 214.0  # about its width and height, points

NOTE = (
    "A colour and a marker a method, a line through its budgets. Bars are 95% "
    "intervals; markers that would hide each other stand aside, tied to their place."
)


class Series(NamedTuple):
    """The rows of one method, which differ in budget alone."""

    label: str
    rows: tuple[int, ...]  # by bytes read
    colour: str
    marker: str


def series(results: Mapping[str, Any]) -> list[Series]:
    """The methods of a comparison, in its order, each with a look of its own."""
    names, _ = terminal.shared_options([row["method"] for row in results["rows"]])
    methods: dict[str, list[int]] = {}
    for index, row in enumerate(results["rows"]):
        methods.setdefault(terminal.without_value(row["method"], "budget"), []).append(
            index
        )
    found = []
    for rows in methods.values():
        rows = sorted(rows, key=lambda index: results["rows"][index]["bytes_read"])
        label = names[rows[0]]
        if len(rows) > 1:
            label = terminal.without_value(label, "budget")
        is_reference = 0 in rows
        place = len(found) - 1  # the reference comes first and counts apart
        found.append(
            Series(
                label,
                tuple(rows),
                REFERENCE if is_reference else COLOURS[place % len(COLOURS)],
                "s" if is_reference else MARKERS[place % len(MARKERS)],
            )
        )
    return found


def _figure(width: float, height: float):
    # No pyplot: it keeps state, and may look for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def scatter(results: Mapping[str, Any], *, is_narrow: bool = False):
    """Accuracy against bytes read per token, a panel a retrieval task.

    Args:
        results: of a comparison.
        is_narrow: panels below each other, for a narrow screen.
    """
    from matplotlib.transforms import offset_copy

    rows, methods = results["rows"], series(results)
    columns = 1 if len(methods) <= 18 and not is_narrow else 2
    key = 0.2 * math.ceil(len(methods) / columns)
    if is_narrow:
        figure = _figure(NARROW, 2.9 * len(TASKS) + key + 1.0)
        axes = figure.subplots(len(TASKS), 1)
    else:
        figure = _figure(12.0, max(3.9, 0.9 + key))
        axes = figure.subplots(1, len(TASKS), sharey=True)
    kib = [row["bytes_read"] / 1024 for row in rows]
    for axis, task in zip(axes, TASKS, strict=True):
        _dress(axis, TASKS[task], kib)
        moved = _aside(rows, task)
        for method in methods:
            means = [rows[index][task]["mean"] for index in method.rows]
            if len(means) > 1:
                axis.plot(
                    [kib[index] for index in method.rows],
                    means,
                    color=method.colour,
                    linewidth=1.2,
                    alpha=0.6,
                    zorder=1.5,
                )
            for index in method.rows:
                share = rows[index][task]
                if abs(moved[index]) > SIZE / 2:
                    axis.annotate(
                        "",
                        xy=(kib[index], share["mean"]),
                        xytext=(moved[index], 0),
                        textcoords="offset points",
                        arrowprops={
                            "arrowstyle": "-",
                            "color": method.colour,
                            "linewidth": 0.8,
                            "alpha": 0.6,
                        },
                    )
                shift = offset_copy(
                    axis.transData, figure, x=moved[index], units="points"
                )
                axis.errorbar(
                    kib[index],
                    share["mean"],
                    yerr=_spread(share),
                    fmt=method.marker,
                    markersize=SIZE,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                    capsize=3,
                    elinewidth=1,
                    color=method.colour,
                    label=method.label if index == method.rows[0] else None,
                    transform=shift,
                )
    for axis in axes if is_narrow else axes[:1]:
        axis.set_ylabel("answered correctly")
        axis.yaxis.set_major_formatter(lambda value, position: f"{100 * value:.0f}%")
    handles, labels = axes[0].get_legend_handles_labels()
    _, shared = terminal.shared_options([row["method"] for row in rows])
    figure.legend(
        handles,
        labels,
        loc="outside lower left" if is_narrow else "outside right center",
        frameon=False,
        ncols=columns,
        title=terminal.wrapped(shared, 28) or None,
        title_fontsize="small",
        alignment="left",
    )
    note = terminal.wrapped(NOTE, 70 if is_narrow else 200)
    if is_narrow:
        figure.suptitle(note, fontsize=7, color="#52606d")
    else:
        figure.supxlabel(note, fontsize=8, color="#52606d")
    return figure


def _spread(share: Mapping[str, Any]) -> list[list[float]]:
    # An interval of one example has no ends.
    mean, low, high = (share[key] for key in ("mean", "low", "high"))
    low, high = (mean if end is None else end for end in (low, high))
    return [[max(mean - low, 0)], [max(high - mean, 0)]]


def _aside(rows, task: str) -> list[float]:
    """Points by which each marker is moved sideways, so that none hides another.

    As little as will do, and in the order of the bytes: what is moved right reads more.
    """
    wide, high = PANEL
    logs = [math.log2(row["bytes_read"]) for row in rows]
    span = max(logs) - min(logs) + 1.0  # half an octave on either side
    moved = [0.0] * len(rows)
    for band in _bands([high * row[task]["mean"] / 1.1 for row in rows]):
        band = sorted(band, key=lambda index: (logs[index], index))
        gap = min(APART, wide / len(band))
        places = [wide * (logs[index] - min(logs)) / span for index in band]
        for index, place, own in zip(
            band, _spread_out(places, gap), places, strict=True
        ):
            moved[index] = place - own
    return moved


def _bands(heights: Sequence[float]) -> list[list[int]]:
    """Indices of markers that could touch, by their heights alone."""
    bands: list[list[int]] = []
    for index in sorted(range(len(heights)), key=lambda index: heights[index]):
        if bands and heights[index] - heights[bands[-1][-1]] < APART:
            bands[-1].append(index)
        else:
            bands.append([index])
    return bands


def _spread_out(places: Sequence[float], gap: float) -> list[float]:
    """The nearest ascending places that are `gap` apart (least squares)."""
    # Less the gaps they must be a rising sequence: neighbours that fall are pooled.
    pools: list[tuple[float, int]] = []  # mean, how many
    for index, place in enumerate(places):
        mean, count = place - gap * index, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean = (before * many + mean * count) / (many + count)
            count += many
        pools.append((mean, count))
    found = [mean for mean, count in pools for _ in range(count)]
    return [place + gap * index for index, place in enumerate(found)]


def _dress(axis, title: str, kib: Sequence[float]) -> None:
    axis.set_title(title)
    axis.set_xlabel("cache read per token")
    axis.tick_params(axis="x", labelsize=9)
    axis.set_xscale("log")
    _plain_ticks(axis, kib)
    axis.set_ylim(-0.04, 1.06)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _plain_ticks(axis, values: Sequence[float]) -> None:
    # Decades are too coarse for a factor of four, and 2 x 10^1 is hard to read.
    low, high = math.log2(min(values)), math.log2(max(values))
    step = max(1, math.ceil((high - low) / 5))
    powers = range(math.floor(low), math.ceil(high) + 1, step)
    axis.set_xticks([2.0**power for power in powers])
    axis.xaxis.set_major_formatter(
        lambda value, position: (
            f"{value / 1024:g} MiB" if value >= 1024 else f"{value:g} KiB"
        )
    )
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
