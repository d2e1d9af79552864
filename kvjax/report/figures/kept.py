"""A picture of the tokens that a method still attends to as a text goes on.

A column a token of the text, a line a moment: what is dark is held then.
"""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from kvjax import files
from kvjax.evaluation import kept_tokens
from kvjax.interface import LanguageModel, Method

DARK = "#1b6ca8"


LATER = "#ececec"  # tokens that have not come yet


def figure(
    results: Sequence[kept_tokens.Kept],
    path: str | pathlib.Path | None = None,
    columns: int = 512,
):
    """Draws what :func:`kept` found, methods side by side.

    Args:
        results: of the same text, one a method.
        path: file to write, its kind by its ending (png, svg, pdf); None writes none.
        columns: most columns of a picture: longer texts share them, and a column is as
            dark as the share of its tokens that is held.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there are no results.
    """
    if not results:
        raise ValueError("results is empty: give one a method.")
    # No pyplot: it keeps state, and may look for a display.
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    colours = LinearSegmentedColormap.from_list("kept", ["white", DARK])
    colours = colours.with_extremes(bad=LATER)
    sheet = Figure(
        figsize=(1.2 + 5.2 * len(results), 4.6), layout="constrained", facecolor="white"
    )
    axes = sheet.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axis, result in zip(axes, results, strict=True):
        longest = result.times[-1]
        axis.imshow(
            density(result, min(columns, longest)),
            cmap=colours,
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(0, longest, longest + result.times[0] / 2, result.times[0] / 2),
        )
        attended = len(result.positions[-1])
        axis.set_title(
            f"{result.name}: {attended:,} of {longest:,} tokens", fontsize=10
        )
        axis.set_xlabel("token of the text", fontsize=9)
        axis.tick_params(length=2, labelsize=8)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("tokens seen", fontsize=9)
    sheet.suptitle(
        f"What is attended to: layer {results[0].layer}, KV head {results[0].head}",
        fontsize=11,
    )
    if path is not None:
        with files.replacing(path) as new:
            sheet.savefig(new, dpi=150)
    return sheet


def density(result: kept_tokens.Kept, columns: int) -> np.ma.MaskedArray:
    """Share of each column's tokens that is held, a row a moment; later ones masked."""
    longest = result.times[-1]
    edges = np.linspace(0, longest, columns + 1).round().astype(int)
    shares = np.zeros((len(result.times), columns))
    later = np.zeros(shares.shape, bool)
    for row, (time, held) in enumerate(
        zip(result.times, result.positions, strict=True)
    ):
        come = np.clip(time - edges[:-1], 0, np.diff(edges))
        counts = np.histogram(held, edges)[0]
        shares[row] = counts / np.maximum(come, 1)
        later[row] = come == 0
    return np.ma.masked_where(later, shares)


def of_methods(
    model: LanguageModel,
    methods: Mapping[str, Method],
    tokens: Sequence[int],
    *,
    every: int,
    path: str | pathlib.Path | None = None,
):
    """:func:`figure` of several methods, by the name they have in it."""
    results = [
        kept_tokens.kept(model, method, tokens, every=every, name=name)
        for name, method in methods.items()
    ]
    return figure(results, path)
