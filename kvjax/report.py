"""What people and programs get to see: a table, one HTML page, one JSON file.

The page is self-contained: figures are inline SVG, and it loads nothing.
"""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax import files, pictures, tables

FORMAT = 2  # of results.json; a change that breaks readers adds one
DATA = "results.json"
FIGURE = "accuracy-by-bytes"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def manifest(
    *, version: str, model: str, arguments: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What is needed to run it again: versions, device, arguments, seeds, date.

    Args:
        version: of kvjax.
        model: its name or folder.
        arguments: of the command line, after the program's name.
        settings: every setting, defaults included.
    """
    import jax

    device = jax.devices()[0]
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.isoformat(timespec="seconds"),
        "kvjax": version,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "device": device.device_kind,
        "backend": device.platform,
        "devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "model": model,
        "arguments": list(arguments),
        "settings": dict(settings),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def results(
    rows: Sequence,
    manifest: Mapping[str, Any],
    kept: Sequence = (),
    *,
    complete: bool = True,
) -> dict[str, Any]:
    """A comparison's rows, its manifest and `kept_figure.Kept`s, JSON-ready.

    A row is a :class:`kvjax.evaluation.compare.Row`, or what this made of one. A
    comparison may have `sections`, which are others on other models, and `left_out`:
    names of methods by the reason.
    """
    return json_ready(
        {
            "format": FORMAT,
            "manifest": dict(manifest),
            "complete": complete,
            "rows": [_as_dict(row) for row in rows],
            "kept": [
                found._replace(
                    positions=[x.tolist() for x in found.positions]
                )._asdict()
                for found in kept
            ],
        }
    )


def _as_dict(row) -> dict[str, Any]:
    if isinstance(row, Mapping):
        return dict(row)
    fields = row._asdict()
    for name, value in fields.items():
        if hasattr(value, "_asdict"):
            fields[name] = value._asdict()
        elif name.endswith("_by_depth"):
            keys = ("depth", "correct", "asked")
            fields[name] = [dict(zip(keys, cell, strict=True)) for cell in value]
    return fields


def json_ready(value):
    """JSON knows no infinity and no NaN: they become null. Tuples become lists."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_writable(folder: pathlib.Path, option: str = "--out") -> None:
    """Makes `folder` and tries it, before hours of work.

    Args:
        folder: that is to be written to.
        option: by which it was given, for messages.

    Raises:
        PermissionError, NotADirectoryError: if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{folder} is not a folder: give {option} another one."
        ) from error
    except OSError as error:
        raise PermissionError(
            f"{folder} cannot be written ({error.strerror}): give {option} another "
            "folder."
        ) from error


def write(
    folder: pathlib.Path, results: Mapping[str, Any]
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the page, the data and the figure by itself, each whole or not at all."""
    page = folder / "report.html"
    files.write_text(page, html(results))
    write_figure(folder, results)
    return page, write_data(folder, results)


def write_figure(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes accuracy against bytes as a picture of each of `pictures.KINDS`."""
    from kvjax.evaluation import compare_figures

    figure = compare_figures.scatter(results)
    for kind in pictures.KINDS:
        files.write_bytes(folder / f"{FIGURE}.{kind}", pictures.drawn(figure, kind))


def begin(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Replaces the data of an earlier report by what is kept of it, and its page."""
    files.remove_partial(folder)
    write_data(folder, results)
    for name in ("report.html", *(f"{FIGURE}.{kind}" for kind in pictures.KINDS)):
        (folder / name).unlink(missing_ok=True)


def write_data(folder: pathlib.Path, results: Mapping[str, Any]) -> pathlib.Path:
    """Writes `results.json` alone, as after each row."""
    data = folder / DATA
    files.write_text(data, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return data


def format_bytes(count: int) -> str:
    """Binary units, three digits: `96.0 KiB`."""
    if count < 1024:
        return f"{count} B"
    power = min(int(math.log(count, 1024)), 4)
    scaled = count / 1024**power
    digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {'KMGT'[power - 1]}iB"


def format_share(interval: Mapping[str, Any]) -> str:
    """`87% [64, 96]`: percent and interval."""
    low, high = (interval[key] for key in ("low", "high"))
    mean = f"{100 * interval['mean']:.0f}%"
    if low is None or high is None:
        return mean
    return f"{mean} [{100 * low:.0f}, {100 * high:.0f}]"


def _value(interval: Mapping[str, Any]) -> str:
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    mean = "not finite" if mean is None else f"{mean:.3f}"
    # One window gives no interval: its ends are infinite, and then null.
    return mean if low is None or high is None else f"{mean} [{low:.3f}, {high:.3f}]"


def _signed(interval: Mapping[str, Any]) -> str:
    if interval["low"] is None:
        return f"{interval['mean']:+.3f}"
    half = (interval["high"] - interval["low"]) / 2
    return f"{interval['mean']:+.3f} ±{half:.3f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


HEADINGS = (
    "method",
    "read / token",
    "held",
    "perplexity",
    "nats lost",
    "KL",
    "passkey",
    "multi-key",
    "chain",
    "top-1",
    "tokens/s",
    "prefill s",
)


def headings(results: Mapping[str, Any]) -> tuple[str, ...]:
    """`HEADINGS`, and one of the user's own questions if any were asked."""
    has_own = any(row.get("own") for row in results["rows"])
    return (*HEADINGS, "own") if has_own else HEADINGS


def table_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The cells under :func:`headings`, one list a method."""
    table = []
    for row in results["rows"]:
        is_reference = row is results["rows"][0]
        table.append(
            [
                row["method"],
                format_bytes(row["bytes_read"]),
                format_bytes(row["bytes_held"]),
                f"{row['perplexity']['mean']:.3f}",
                "-" if is_reference else _signed(row["nats_lost"]),
                "-" if is_reference else f"{row['kl']['mean']:.2g}",
                format_share(row["passkey"]),
                format_share(row["multikey"]),
                format_share(row["chain"]),
                "-" if is_reference else format_share(row["top1_agreement"]),
                _rate(row["tokens_per_second"]),
                f"{row['prefill_seconds']:.2f}",
                *([format_share(row["own"])] if row.get("own") else []),
            ]
        )
    return table


ATTENTION_HEADINGS = (
    "method",
    "read / token, at most",
    "measured",
    "output error",
    "dropped mass",
    "support kept",
    "proved exact",
    "full steps",
)


def attention_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The cells under `ATTENTION_HEADINGS`, one list a method."""
    return [
        [
            row["method"],
            format_bytes(row["bytes_read"]),
            format_bytes(round(row["bytes_measured"])),
            _small(row["output_error"]),
            _small(row["dropped_mass"]),
            format_share(row["support"]),
            f"{100 * row['proved_exact']['mean']:.1f}%",
            f"{100 * row['full_steps']['mean']:.0f}%",
        ]
        for row in results["rows"]
    ]


def _small(interval: Mapping[str, Any]) -> str:
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    if mean is None:
        return "not finite"
    if low is None or high is None:
        return f"{mean:.2g}"
    return f"{mean:.2g} [{low:.2g}, {high:.2g}]"


ATTENTION_CAPTION = (
    "Attention of the layers, each fed what the first row's is, over the tokens that "
    "decode steps predict. Measured: what choosing reads, and the keys and values "
    "attended to. Dropped mass: of the first row's weights, on what was not attended "
    "to. Support kept: share of the tokens with any weight that was. Proved exact: "
    "share of heads and steps known to equal attention over every token. Full steps: "
    "share of steps that read the whole cache; its inverse is the effective stride."
)


def caption(results: Mapping[str, Any]) -> str:
    """How the table was measured, in a sentence or two."""
    settings = results["manifest"]["settings"]
    about = results["manifest"]
    links = results["rows"][0]["chain_links"]
    text = about.get("text", "held-out text")
    asked = "Asked in the chat template. " if settings.get("chat") else ""
    if "tasks" in settings:
        asked += (
            f"Own: {results['rows'][0]['own']['n']} questions of {settings['tasks']}. "
        )
    return (
        f"{about['model']}, context {settings['context']:,} tokens, the last "
        f"{settings['new_tokens']} of them decoded; {settings['examples']} examples a "
        f"retrieval task, {settings['windows']} windows of {text}; 95% "
        f"intervals. {asked}Chain: links of {links} before the first mistake. Bytes "
        f"are of cache: read for one token of one row, held for one row. Speed: "
        f"{settings['batch']} rows together on {about['device']} "
        f"({about['backend']}), median of batches after a warm-up; prefill: one row's "
        "prompt, read alone. KL and nats are per token, against the first row."
    )


def print_table(results: Mapping[str, Any]) -> None:
    """Prints a comparison, its sections, and what is in neither."""
    for one in _comparisons(results):
        _print_comparison(one)
    if said := left_out(results):
        tables.say(said)


def _comparisons(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The comparison and its sections, without those that were cut off too early."""
    return [one for one in (results, *results.get("sections", ())) if one["rows"]]


def left_out(results: Mapping[str, Any]) -> str:
    """A line on the methods that no row is of, and why; nothing if there is none."""
    found = results.get("left_out", {})
    parts = [f"{', '.join(names)} ({reason})" for reason, names in found.items()]
    return f"Left out: {'; '.join(parts)}." if parts else ""


def _print_comparison(results: Mapping[str, Any]) -> None:
    """Prints what is answered, then what attention loses."""
    found = table_rows(results), attention_rows(results)
    names, shared = tables.shared_options([row[0] for row in found[0]])
    said = caption(results), ATTENTION_CAPTION
    if shared:
        tables.say(shared)
        print()
    for heads, rows, below in zip(
        (headings(results), ATTENTION_HEADINGS), found, said, strict=True
    ):
        rows = [[name, *row[1:]] for name, row in zip(names, rows, strict=True)]
        tables.show(heads, rows)
        print()
        tables.say(below)
        print()


def print_task(document: Mapping[str, Any]) -> None:
    """Prints one task's result."""
    document = json_ready(document)
    about = f"{document['task']}, {document['method']}, context {document['context']}"
    text = f" of {document['text']}" if "text" in document else ""
    if "accuracy" in document:
        own = text if document["task"] == "own" else ""
        tables.say(
            f"{about}: {format_share(document['accuracy'])}, n={document['n']}{own}"
        )
        for cell in document.get("by_depth", ()):
            print(f"  depth {cell['depth']:.2f}: {cell['correct']}/{cell['asked']}")
    elif "f1" in document:
        share, rows = format_share(document["f1"]), document["rows"]
        tables.say(f"{about}: mean F1 of {rows} rows {share}, n={document['n']}")
    elif "valid_prefix" in document:
        share = format_share(document["valid_prefix"])
        tables.say(f"{about}: mean valid prefix {share}, n={document['n']}")
        scores = [example["score"] for example in document["examples"]]
        links = document["links"]
        for found in range(links + 1):
            times = sum(round(score * links) == found for score in scores)
            print(f"  {found} of {links} links: {times}")
    elif "perplexity" in document:
        tables.say(
            f"{about}: perplexity {_value(document['perplexity'])}, "
            f"{_value(document['bits_per_byte'])} bits per byte, "
            f"n={document['n']} windows{text}"
        )
    else:
        tables.say(
            f"{about}: top-1 agreement {format_share(document['top1_agreement'])}, "
            f"KL {document['kl']['mean']:.4f} nats, n={document['n']} windows{text}"
        )
        print()
        tables.show(LAYER_HEADINGS, [_layer(layer) for layer in document["layers"]])


LAYER_HEADINGS = ("layer", *ATTENTION_HEADINGS[3:])


def _layer(layer: Mapping[str, Any]) -> list[str]:
    return [
        str(layer["layer"]),
        f"{layer['error']['mean']:.4f}",
        f"{layer['dropped']['mean']:.2g}",
        f"{layer['support']['mean']:.0%}",
        f"{layer['exact']['mean']:.0%}",
        f"{layer['refreshed']['mean']:.0%}",
    ]


def html(results: Mapping[str, Any]) -> str:
    """The whole report as one page."""
    import importlib.resources

    import jinja2

    from kvjax.evaluation import compare_figures

    source = importlib.resources.files("kvjax") / "templates" / "report.html.jinja"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["breakable"] = _breakable
    template = environment.from_string(source.read_text(encoding="utf-8"))

    def drawn(draw, one, name: str, **options) -> str:
        return pictures.svg(draw(one, **options), name)

    comparisons = [
        {
            "caption": caption(one),
            "headings": headings(one),
            "rows": table_rows(one),
            "attention_rows": attention_rows(one),
            "scatter": drawn(compare_figures.scatter, one, f"scatter{place}"),
            "narrow": drawn(
                compare_figures.scatter, one, f"narrow{place}", is_narrow=True
            ),
            "needles": drawn(compare_figures.needles, one, f"needles{place}"),
            "kept": _kept(one["kept"]),
            "manifest": one["manifest"],
        }
        for place, one in enumerate(_comparisons(results))
    ]
    return template.render(
        comparisons=comparisons,
        left_out=left_out(results),
        attention_caption=ATTENTION_CAPTION,
        attention_headings=ATTENTION_HEADINGS,
    )


def _breakable(name: str):
    """A spec for HTML, which may break where `tables.fold` breaks it."""
    import markupsafe

    pieces = [markupsafe.escape(piece) for piece in tables.pieces(name)]
    return markupsafe.Markup("<wbr>").join(pieces)


def _kept(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    from kvjax.evaluation import kept_figure

    held = [kept_figure.Kept(**one) for one in found]
    return pictures.svg(kept_figure.figure(held, columns=256), "kept")
