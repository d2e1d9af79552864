"""One HTML page of a comparison, with its figures, and the folder it stands in.

The page is self-contained: figures are inline SVG, and it loads nothing.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax import files
from kvjax.report import documents, labels, pictures, table, terminal

# Figures of a column's width by the names of their files.
FIGURES = ("accuracy-by-bytes", "kl-by-bytes")


def write(
    folder: pathlib.Path, results: Mapping[str, Any]
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the page, the data and the figures by themselves, each whole or not."""
    page = folder / "report.html"
    files.write_text(page, html(results))
    write_figures(folder, results)
    documents.write_columns(folder, results)
    return page, documents.write_data(folder, results)


def write_figures(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes results against bytes as pictures of each of `pictures.KINDS`.

    They are as wide as a column of a paper in two.
    """
    from kvjax.report.figures import compare

    measures = compare.answered(results), ("kl",)
    for name, panels in zip(FIGURES, measures, strict=True):
        figure = compare.scatter(results, panels, layout=compare.COLUMN)
        for kind in pictures.KINDS:
            files.write_bytes(folder / f"{name}.{kind}", pictures.drawn(figure, kind))


def begin(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Replaces the data of an earlier report by what is kept of it, and its page."""
    files.remove_partial(folder)
    documents.write_data(folder, results)
    pages = ("report.html", documents.CSV, documents.PARQUET, *_pictures())
    for name in pages:
        (folder / name).unlink(missing_ok=True)


def _pictures() -> list[str]:
    return [f"{name}.{kind}" for name in FIGURES for kind in pictures.KINDS]


def html(results: Mapping[str, Any]) -> str:
    """The whole report as one page."""
    import importlib.resources

    import jinja2

    from kvjax.report.figures import compare

    source = (
        importlib.resources.files("kvjax.report") / "templates" / "report.html.jinja"
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["breakable"] = _breakable
    template = environment.from_string(source.read_text(encoding="utf-8"))

    def drawn(one, name: str, layout) -> str:
        measures = ("kl", *compare.answered(one))
        return pictures.svg(compare.scatter(one, measures, layout=layout), name)

    comparisons = [
        {
            "shared": labels.of_results(one).shared,
            "sheets": table.sheets(one),
            "fronts": table.front_lines(one),
            "scatter": drawn(one, f"scatter{place}", compare.BROAD),
            "narrow": drawn(one, f"narrow{place}", compare.NARROW),
            "needles": pictures.svg(compare.needles(one), f"needles{place}"),
            "kept": _kept(one["kept"]),
            "manifest": one["manifest"],
        }
        for place, one in enumerate(table.comparisons(results))
    ]
    return template.render(
        comparisons=comparisons,
        left_out=table.left_out(results),
        front_caption=table.FRONT_CAPTION,
    )


def _breakable(name: str):
    """A spec for HTML, which may break where `terminal.fold` breaks it."""
    import markupsafe

    pieces = [markupsafe.escape(piece) for piece in terminal.pieces(name)]
    return markupsafe.Markup("<wbr>").join(pieces)


def _kept(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    from kvjax.evaluation import kept_tokens
    from kvjax.report.figures import kept as figures_kept

    held = [kept_tokens.Kept(**one) for one in found]
    return pictures.svg(figures_kept.figure(held, columns=256), "kept")
