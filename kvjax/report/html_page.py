"""One HTML page of a comparison, with its figures, and the folder it stands in."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax import files
from kvjax.report import documents, pictures, table, terminal

FIGURE = "accuracy-by-bytes"


def write(
    folder: pathlib.Path, results: Mapping[str, Any]
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the page, the data and the figure by itself, each whole or not at all."""
    page = folder / "report.html"
    files.write_text(page, html(results))
    write_figure(folder, results)
    return page, documents.write_data(folder, results)


def write_figure(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes accuracy against bytes as a picture of each of `pictures.KINDS`."""
    from kvjax.report.figures import compare

    figure = compare.scatter(results)
    for kind in pictures.KINDS:
        files.write_bytes(folder / f"{FIGURE}.{kind}", pictures.drawn(figure, kind))


def begin(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Replaces the data of an earlier report by what is kept of it, and its page."""
    files.remove_partial(folder)
    documents.write_data(folder, results)
    for name in ("report.html", *(f"{FIGURE}.{kind}" for kind in pictures.KINDS)):
        (folder / name).unlink(missing_ok=True)


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

    def drawn(draw, one, name: str, **options) -> str:
        return pictures.svg(draw(one, **options), name)

    comparisons = [
        {
            "caption": table.caption(one),
            "headings": table.headings(one),
            "rows": table.table_rows(one),
            "attention_rows": table.attention_rows(one),
            "scatter": drawn(compare.scatter, one, f"scatter{place}"),
            "narrow": drawn(compare.scatter, one, f"narrow{place}", is_narrow=True),
            "needles": drawn(compare.needles, one, f"needles{place}"),
            "kept": _kept(one["kept"]),
            "manifest": one["manifest"],
        }
        for place, one in enumerate(table._comparisons(results))
    ]
    return template.render(
        comparisons=comparisons,
        left_out=table.left_out(results),
        attention_caption=table.ATTENTION_CAPTION,
        attention_headings=table.ATTENTION_HEADINGS,
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
