"""Figures as bytes, inline SVG or files: the same figure gives the same bytes."""

import io
from typing import Any

KINDS = ("svg", "pdf", "png")  # of files


def svg(figure, name: str = "kvjax") -> str:
    """Returns a figure as inline SVG, its text as text.

    Args:
        figure: of matplotlib.
        name: figures of one page need several, as their parts have names of their own.
    """
    text = drawn(figure, "svg", name).decode()
    return text[text.index("<svg") :]  # no XML declaration inside HTML


def drawn(figure, kind: str, name: str = "kvjax") -> bytes:
    """Returns a figure as a file of one of `KINDS`."""
    import matplotlib

    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    options: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "pdf.fonttype": 42,
    }
    target = io.BytesIO()
    with matplotlib.rc_context(options):
        figure.savefig(target, format=kind, dpi=300, metadata=dates.get(kind))
    return target.getvalue()
