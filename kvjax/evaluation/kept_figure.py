"""Which tokens of a text a method still attends to, as time goes on: one picture.

A column a token of the text, a line a moment: what is dark is held then.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvjax import files
from kvjax.generate import empty_states, finish
from kvjax.inputs import check_vocabulary
from kvjax.interface import LanguageModel, Method
from kvjax.prompt_chunks import PAD

DARK = "#1b6ca8"
LATER = "#ececec"  # tokens that have not come yet


class Kept(NamedTuple):
    """Positions that one KV head attends to, moment by moment."""

    name: str  # of the method
    times: list[int]  # tokens seen, the newest included
    positions: list[Int[np.ndarray, "N"]]  # ascending, one list a moment
    layer: int
    head: int


def kept(
    model: LanguageModel,
    method: Method,
    tokens: Sequence[int],
    *,
    every: int,
    name: str = "",
    layer: int = -1,
    head: int = 0,
) -> Kept:
    """Reads a text and asks, every so many tokens, what a decode step attends to.

    Args:
        model: decoder, weights and tokenizer.
        method: any; its state at each moment is as if the prompt ended there.
        tokens: of the text, at least `every`.
        every: tokens from one moment to the next.
        name: of the method, for the picture.
        layer: negative counts from the last.
        head: KV head, or the first query head that reads it.

    Raises:
        ValueError: if `every` is not in [1, tokens], or there is no such layer or head.
    """
    decoder, params = model.decoder, model.params
    check_vocabulary(decoder, [tokens])
    if not 1 <= every <= len(tokens):
        raise ValueError(f"{every=} must be in [1, {len(tokens)}], the text's tokens.")
    spec = decoder.cache_spec(1, 1)
    if not -decoder.num_layers <= layer < decoder.num_layers:
        raise ValueError(f"{layer=}: the model has {decoder.num_layers} layers.")
    if not 0 <= head < spec.num_kv_heads:
        raise ValueError(f"{head=}: the model has {spec.num_kv_heads} KV heads.")

    @jax.jit
    def read(params, states, chunk, length):
        return decoder.prefill(params, states, chunk, length, method)[0]

    @jax.jit
    def probe(params, states, token):
        attended = []

        def inspect_step(state, q):
            state, out, diagnostics = method.inspect_step(state, q)
            attended.append(diagnostics.attended)
            return state, out, diagnostics

        recorder = method._replace(inspect_step=inspect_step)
        decoder.decode_step(params, states, token, recorder)
        return attended[layer]

    states = empty_states(decoder, method, 1, len(tokens), 1)
    times, positions = [], []
    # The newest token of a moment is asked by a decode step, and read afterwards.
    for start in range(0, len(tokens) // every * every, every):
        chunk = np.full((1, every), PAD, np.int32)
        chunk[0] = tokens[start : start + every]
        before = read(params, states, jnp.asarray(chunk), jnp.asarray([every - 1]))
        newest = np.full((1, method.rows), chunk[0, -1], np.int32)
        found = np.asarray(probe(params, finish(method, before), newest))[0]
        found = found[head * found.shape[0] // spec.num_kv_heads]
        times.append(start + every)
        positions.append(np.unique(found[found >= 0]))
        states = read(params, states, jnp.asarray(chunk), jnp.asarray([every]))
    return Kept(name, times, positions, layer % decoder.num_layers, head)


def figure(
    results: Sequence[Kept], path: str | pathlib.Path | None = None, columns: int = 512
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
        held = len(result.positions[-1])
        axis.set_title(f"{result.name}: {held:,} of {longest:,} tokens", fontsize=10)
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


def density(result: Kept, columns: int) -> np.ma.MaskedArray:
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
        kept(model, method, tokens, every=every, name=name)
        for name, method in methods.items()
    ]
    return figure(results, path)
