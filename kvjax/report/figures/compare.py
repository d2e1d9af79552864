"""The comparison as pictures: results against bytes, and needles by depth.

A method has one colour and one marker, and a line through its budgets. Colours are few
enough to be apart for colour-blind readers too, as a test simulates; where they begin
again markers are others, and hollow.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvjax.evaluation import fronts
from kvjax.report import labels, terminal

# Results that can be drawn, by the fields of rows, and what panels are called.
TITLES = {
    "kl": "KL to the first row, nats",
    "passkey": "pass key",
    "multikey": "one key of many",
    "chain": "chain before a mistake",
    "own": "own questions",
}
TITLES |= {f"{name}_after": f"{TITLES[name]}, after" for name in list(TITLES)[1:]}
DEPTHS = {
    f"{task}{suffix}_by_depth": TITLES[task + suffix]
    for suffix in ("", "_after")
    for task in ("passkey", "multikey")
}
REFERENCE = "#000000"  # the first row
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7"),
    *("#e69f00", "#56b4e9", "#882255", "#332288"),
)
MARKERS = ("o", "^", "D", "v", "P", "X", "p", "<", "*", ">", "h", "d", "8")
SOFT = "#52606d"
LEAST_KL = 1e-3  # nats; below, the axis is linear, and has a 0

# When the questions of what is drawn come, by the setting of the run.
WHEN = {
    "seen": "Questions end the prompt.",
    "after": "Questions come after it was read.",
    "both": "After: questions come after the prompt was read.",
}
NOTE = (
    "A colour and a marker a method, a line through its budgets. Bars are 95% "
    "intervals; markers that would hide each other stand aside, tied to their place. "
    "Dotted: the Pareto front."
)


class Layout(NamedTuple):
    """The place where a figure is to be read: lengths in inches, sizes in points."""

    width: float
    height: float  # of a panel with its title
    across: int  # panels in a line, at most
    font: float
    marker: float
    has_key_beside: bool = False
    note: float | None = None  # size of the note that explains it; None: no note


BROAD = Layout(12.0, 3.4, 4, 10.0, 7.0, has_key_beside=True, note=8.0)
NARROW = Layout(4.9, 2.9, 1, 10.0, 7.0, note=7.0)  # a narrow screen
COLUMN = Layout(3.3, 1.45, 2, 7.0, 4.5)  # of a paper in two


class Series(NamedTuple):
    """The rows of one method, which differ in budget alone."""

    label: str
    rows: tuple[int, ...]  # by bytes read
    colour: str
    marker: str
    is_hollow: bool


def series(results: Mapping[str, Any]) -> list[Series]:
    """The methods of a comparison, in its order, each with a look of its own."""
    called = labels.of_results(results)
    methods: dict[str, list[int]] = {}
    for index, row in enumerate(results["rows"]):
        methods.setdefault(terminal.without_value(row["method"], "budget"), []).append(
            index
        )
    found = []
    for rows in methods.values():
        rows = sorted(rows, key=lambda index: results["rows"][index]["bytes_read"])
        is_reference = 0 in rows
        place = len(found) - 1  # the reference comes first and counts apart
        label = called.names[rows[0]] if len(rows) > 1 else called.whole(rows[0])
        found.append(
            Series(
                label,
                tuple(rows),
                REFERENCE if is_reference else COLOURS[place % len(COLOURS)],
                "s" if is_reference else MARKERS[place % len(MARKERS)],
                not is_reference and place // len(COLOURS) % 2 == 1,
            )
        )
    return found


def answered(results: Mapping[str, Any]) -> tuple[str, ...]:
    """The results of a comparison that are shares of answers."""
    rows = results["rows"]
    return tuple(
        name
        for name in list(TITLES)[1:]
        if any(row.get(name) is not None for row in rows)
    )


def scatter(
    results: Mapping[str, Any],
    measures: Sequence[str] | None = None,
    *,
    layout: Layout = BROAD,
):
    """Results against bytes read per token, a panel each.

    Args:
        results: of a comparison.
        measures: some of `TITLES`; KL and whatever is answered if left out.
        layout: where the figure is to be read.

    Returns:
        The `matplotlib.figure.Figure`.
    """
    import matplotlib

    if measures is None:
        measures = ("kl", *answered(results))
    sizes: dict[Any, float] = {
        "font.size": layout.font,
        "axes.titlesize": layout.font + (layout.font > 8),
        "axes.labelsize": layout.font,
        "xtick.labelsize": max(layout.font - 1, 7),
        "ytick.labelsize": max(layout.font - 1, 7),
        "legend.fontsize": layout.font,
        "legend.title_fontsize": max(layout.font - 1, 7),
    }
    with matplotlib.rc_context(sizes):
        return _scatter(results, measures, layout)


def _scatter(results, measures: Sequence[str], layout: Layout):
    methods = series(results)
    across = min(layout.across, len(measures))
    lines = math.ceil(len(measures) / across)
    longest = max(len(method.label) for method in methods)
    line_of_key = 1.5 * layout.font / 72
    columns = 1 if longest > 24 or layout.has_key_beside else 2
    if layout.has_key_beside and len(methods) > 18:
        columns = 2
    key = line_of_key * (math.ceil((len(methods) + 1) / columns) + 2)
    height = layout.height * lines
    height = max(height, key + 0.5) if layout.has_key_beside else height + key
    if layout.note is not None:
        height += 0.5 if layout.has_key_beside else 0.8
    figure = _figure(layout.width, height)
    grid = figure.add_gridspec(lines, across)
    panel = 72 * (layout.width * 0.78 / across), 72 * layout.height * 0.7
    for place, measure in enumerate(measures):
        axis = figure.add_subplot(grid[divmod(place, across)])
        _dress(axis, measure, results["rows"], is_last=place + across >= len(measures))
        _draw(figure, axis, measure, results["rows"], methods, layout, panel)
    said = [labels.of_results(results).shared]
    if tuple(measures) != ("kl",):
        settings = results["manifest"]["settings"]
        said.append(WHEN[settings.get("question", "seen")])
    _key(figure, " ".join(said).strip(), layout, columns)
    if layout.note is not None:
        note = terminal.wrapped(NOTE, 200 if layout.has_key_beside else 70)
        say = figure.supxlabel if layout.has_key_beside else figure.suptitle
        say(note, fontsize=layout.note, color=SOFT)
    return figure


def _figure(width: float, height: float):
    # No pyplot: it keeps state, and may look for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _key(figure, said: str, layout: Layout, columns: int) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    width = 28 if layout.has_key_beside else round(layout.width * 110 / layout.font)
    figure.legend(
        handles,
        names,
        loc="outside right center" if layout.has_key_beside else "outside lower left",
        frameon=False,
        ncols=columns,
        title=terminal.wrapped(said, width) or None,
        alignment="left",
        handletextpad=0.4,
        columnspacing=1.0,
    )


def _draw(figure, axis, measure, rows, methods, layout: Layout, panel) -> None:
    """Draws the methods into a panel, and the front through the best of them."""
    from matplotlib.transforms import offset_copy

    kib = [row["bytes_read"] / 1024 for row in rows]
    values = [row.get(measure) for row in rows]
    _draw_front(axis, measure, rows, values)
    is_sweep = any(len(method.rows) > 1 for method in methods)
    moved = [0.0] * len(rows)
    if not is_sweep:  # lines go through the true places
        moved = _aside(axis, kib, values, layout, panel)
    for method in methods:
        there = [index for index in method.rows if values[index] is not None]
        if len(there) > 1:
            axis.plot(
                [kib[index] for index in there],
                [values[index]["mean"] for index in there],
                color=method.colour,
                linewidth=1.2,
                alpha=0.7,
                zorder=1.5,
            )
        for index in there:
            mean = values[index]["mean"]
            if abs(moved[index]) > layout.marker / 2:
                _tie(axis, (kib[index], mean), moved[index], method.colour)
            axis.errorbar(
                kib[index],
                mean,
                yerr=_spread(values[index]),
                fmt=method.marker,
                markersize=layout.marker,
                markeredgecolor=method.colour if method.is_hollow else "white",
                markeredgewidth=1.0 if method.is_hollow else 0.5,
                markerfacecolor="white" if method.is_hollow else method.colour,
                capsize=0 if is_sweep else layout.marker / 2.4,
                elinewidth=0.6 if is_sweep else 1,
                color=method.colour,
                label=method.label if index == there[0] else None,
                transform=offset_copy(
                    axis.transData, figure, x=moved[index], units="points"
                ),
            )


def _draw_front(axis, measure: str, rows, values) -> None:
    means = [None if value is None else value["mean"] for value in values]
    sizes = [row["bytes_read"] for row in rows]
    places = fronts.front(sizes, means, more_is_better=fronts.MORE_IS_BETTER[measure])
    axis.plot(
        [sizes[place] / 1024 for place in places],
        [means[place] for place in places],
        color=SOFT,
        linewidth=0.9,
        linestyle=":",
        drawstyle="steps-post",
        zorder=1,
        label="Pareto front",
    )


def _tie(axis, place: tuple[float, float], moved: float, colour: str) -> None:
    axis.annotate(
        "",
        xy=place,
        xytext=(moved, 0),
        textcoords="offset points",
        arrowprops={
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.8,
            "alpha": 0.6,
        },
    )


def _spread(value: Mapping[str, Any]) -> list[list[float]]:
    # An interval of one example has no ends.
    mean, low, high = (value[key] for key in ("mean", "low", "high"))
    low, high = (mean if end is None else end for end in (low, high))
    return [[max(mean - low, 0)], [max(high - mean, 0)]]


def _aside(axis, kib, values, layout: Layout, panel) -> list[float]:
    """Points by which each marker is moved sideways, so that none hides another.

    As little as will do, and in the order of the bytes: what is moved right reads more.
    """
    wide, high = panel
    apart = 1.3 * layout.marker
    to_panel = axis.transScale + axis.transLimits  # shares of its width and height
    there = [index for index, value in enumerate(values) if value is not None]
    places = {
        index: to_panel.transform((kib[index], values[index]["mean"]))
        for index in there
    }
    moved = [0.0] * len(values)
    for band in _bands({index: high * places[index][1] for index in there}, apart):
        band = sorted(band, key=lambda index: (kib[index], index))
        gap = min(apart, wide / len(band))
        own = [wide * places[index][0] for index in band]
        for index, place, at in zip(band, _spread_out(own, gap), own, strict=True):
            moved[index] = place - at
    return moved


def _bands(heights: Mapping[int, float], apart: float) -> list[list[int]]:
    """Indices of markers that could touch, by their heights alone."""
    bands: list[list[int]] = []
    for index in sorted(heights, key=lambda index: heights[index]):
        if bands and heights[index] - heights[bands[-1][-1]] < apart:
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


def _dress(axis, measure: str, rows, *, is_last: bool) -> None:
    """Scales and labels of a panel; the last of its column says what bytes they are."""
    axis.set_title(TITLES[measure])
    if is_last:
        axis.set_xlabel("cache read per token")
    axis.set_xscale("log")
    _plain_ticks(axis, [row["bytes_read"] / 1024 for row in rows])
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if measure == "kl":
        ends = [row["kl"]["high"] or row["kl"]["mean"] for row in rows]
        axis.set_yscale("symlog", linthresh=LEAST_KL)
        axis.set_ylim(-LEAST_KL / 4, 1.6 * max(*ends, 10 * LEAST_KL))
        axis.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    else:
        axis.set_ylim(-0.04, 1.06)
        axis.yaxis.set_major_formatter(lambda value, position: f"{100 * value:.0f}%")


def _plain_ticks(axis, values: Sequence[float]) -> None:
    # Decades are too coarse for a factor of four, and 2 x 10^1 is hard to read.
    low, high = math.log2(min(values)), math.log2(max(values))
    step = max(1, math.ceil((high - low) / 3))
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
    rows, called = results["rows"], labels.of_results(results)
    tasks = [name for name in DEPTHS if any(row.get(name) for row in rows)]
    lines = math.ceil(len(tasks) / 2)
    figure = _figure(10.0, (1.3 + 0.34 * len(rows)) * lines)
    axes = figure.subplots(lines, 2, sharey=True, squeeze=False).flat
    for axis, task in zip(axes, tasks, strict=True):
        cells = [row[task] for row in rows]
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
        names = [called.whole(place) for place in range(len(rows))]
        axis.set_yticks([y + 0.5 for y in range(len(rows))], names)
        axis.set_ylim(len(rows), 0)
        axis.tick_params(length=0)
        axis.set_title(DEPTHS[task])
        axis.set_xlabel("depth of the needle in the prompt")
        axis.spines[:].set_visible(False)
    return figure
