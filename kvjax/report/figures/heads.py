"""The heads of a model as one picture: a grid a measure, and three attention maps.

Colours run from light to dark in one palette that colour-blind readers can tell apart,
and every cell also says its number.
"""

import pathlib
from typing import Any

import numpy as np

from kvjax import files
from kvjax.evaluation.heads import MASS, Heads, Map

COLOURS = "YlGnBu"
UNSEEN = "#ececec"  # what a query may not look at: later tokens
MOST_LABELLED = 16  # heads or layers in a grid whose cells still hold a number


def figure(result: Heads, path: str | pathlib.Path | None = None):
    """Draws :func:`kvjax.evaluation.heads.inspect`'s result.

    Top: sink mass, entropy, support and what every head retrieves. Bottom: the
    attention of three heads, a query a row.

    Args:
        result: of a model.
        path: file to write, its kind by its ending (png, svg, pdf); None writes none.

    Returns:
        The `matplotlib.figure.Figure`.
    """
    # No pyplot: it keeps state, and may look for a display.
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(13.6, 8.7), layout="constrained", facecolor="white")
    halves: Any = sheet.subfigures(2, 1, height_ratios=(1.0, 1.45), hspace=0.04)
    top, bottom = halves
    is_softmax = result.alpha == 1
    kind = "softmax" if is_softmax else f"entmax, alpha = {result.alpha:g}"
    sheet.suptitle(
        f"{result.model or 'model'} ({kind}): {result.windows} windows of "
        f"{result.context:,} tokens of {result.text}; retrieval over {result.answers} "
        "answer tokens of pass keys",
        fontsize=11,
    )
    support = result.effective_support if is_softmax else result.support
    named = (
        f"effective support\n(fewest keys of {MASS:.0%} mass)"
        if is_softmax
        else "support\n(keys of non-zero weight)"
    )
    grids = (
        ("attention sink\n(mass on first token)", result.sink, 1.0, "{:.2f}"),
        ("entropy, bits\n(of a query's weights)", result.entropy, None, "{:.1f}"),
        (named, support, None, "{:.0f}"),
        ("retrieval score\n(most weight on source)", result.retrieval, 1.0, "{:.2f}"),
        ("needle\n(mass on what is asked)", result.needle_mass, 1.0, "{:.2f}"),
    )
    for axis, grid in zip(top.subplots(1, len(grids)), grids, strict=True):
        _grid(axis, *grid)
    axes = bottom.subplots(1, len(result.maps), squeeze=False)[0]
    images = [
        _map(axis, shown, is_first=index == 0)
        for index, (axis, shown) in enumerate(zip(axes, result.maps, strict=True))
    ]
    bar = bottom.colorbar(
        images[-1], ax=axes, shrink=0.8, pad=0.01, ticks=(0, 0.1, 0.5, 1)
    )
    bar.set_label("weight", fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    if path is not None:
        with files.replacing(path) as new:
            sheet.savefig(new, dpi=150)
    return sheet


def _grid(axis, title: str, values: np.ndarray, top: float | None, form: str) -> None:
    layers, heads = values.shape
    top = max(float(values.max()), 1e-6) if top is None else top
    axis.pcolormesh(
        values, vmin=0, vmax=top, cmap=COLOURS, edgecolors="white", linewidth=1.5
    )
    if max(layers, heads) <= MOST_LABELLED:
        size = 9 if heads <= 8 else 7
        for layer in range(layers):
            for head in range(heads):
                value = float(values[layer, head])
                axis.text(
                    head + 0.5,
                    layer + 0.5,
                    form.format(value),
                    ha="center",
                    va="center",
                    fontsize=size,
                    color="white" if value > 0.55 * top else "#333333",
                )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("head", fontsize=9)
    axis.set_ylabel("layer", fontsize=9)
    axis.set_ylim(layers, 0)
    for ticks, count in ((axis.set_xticks, heads), (axis.set_yticks, layers)):
        step = -(-count // MOST_LABELLED)
        marks = range(0, count, step)
        ticks([mark + 0.5 for mark in marks], [str(mark) for mark in marks])
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)


def _map(axis, shown: Map, *, is_first: bool):
    import matplotlib
    from matplotlib.colors import PowerNorm

    # Square roots: most weights are small, and what matters must not be the only thing
    # to be seen.
    colours = matplotlib.colormaps[COLOURS].with_extremes(bad=UNSEEN)
    length = len(shown.weights)
    visible = np.tril(np.ones((length, length), bool))
    image = axis.imshow(
        np.ma.masked_where(~visible, shown.weights),
        cmap=colours,
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        interpolation="nearest",
    )
    axis.set_title(
        f"{shown.label} ({shown.score:.2f}): layer {shown.layer}, head {shown.head}",
        fontsize=10,
    )
    axis.set_xlabel("key: token looked at", fontsize=9)
    if is_first:
        axis.set_ylabel("query: token that looks", fontsize=9)
    axis.tick_params(length=2, labelsize=8)
    axis.spines[:].set_visible(False)
    return image
