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
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


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
        **{package: _version(package) for package in _PACKAGES},
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

    A row is a :class:`kvjax.evaluation.compare.Row`, or what this made of one.
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


def check_free(folder: pathlib.Path, *, overwrite: bool, go_on: bool) -> None:
    """Refuses a folder that holds a report, unless told what to do with it.

    Raises:
        ValueError: if it is to be overwritten and gone on with.
        FileExistsError: if there is a report and neither is wanted.
    """
    if overwrite and go_on:
        raise ValueError("give --overwrite or --continue, not both.")
    data = folder / DATA
    if data.exists() and not (overwrite or go_on):
        raise FileExistsError(
            f"{data} is there from an earlier run: go on with it by --continue, "
            "replace it by --overwrite, or give --out another folder."
        )


def earlier_batch(folder: pathlib.Path) -> int | None:
    """Rows decoded together in the report of a folder; None if it does not say."""
    try:
        found = json.loads(files.read_text(folder / DATA))
        return int(found["manifest"]["settings"]["batch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def earlier_rows(
    folder: pathlib.Path, manifest: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Rows by method that an earlier run left in the folder; none without a report.

    Raises:
        ValueError: if the report is damaged, or of another model, settings or version
            than `manifest` says; names the first difference.
    """
    path = folder / DATA
    if not path.exists():
        return {}
    try:
        found = json.loads(files.read_text(path))
        before, rows = found["manifest"], {row["method"]: row for row in found["rows"]}
        form, settings = found["format"], dict(before["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): begin anew with "
            "--overwrite."
        ) from error
    pairs = {"format": (form, FORMAT)}
    for key in ("kvjax", "model", "backend", "device", "cpu_count", *_PACKAGES):
        pairs[key] = before.get(key), manifest[key]
    wanted = json_ready(manifest["settings"])
    for key in wanted | settings:
        pairs[key] = settings.get(key), wanted.get(key)
    for key, (old, new) in pairs.items():
        if old != new:
            raise ValueError(
                f"{path} was made with {key}={old!r} and cannot go on with {new!r}: "
                "use that one, or --overwrite, or another --out."
            )
    return rows


def check_writable(folder: pathlib.Path) -> None:
    """Makes `folder` and tries it, before hours of work.

    Raises:
        PermissionError, NotADirectoryError: if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{folder} is not a folder: give --out another one."
        ) from error
    except OSError as error:
        raise PermissionError(
            f"{folder} cannot be written ({error.strerror}): give --out another folder."
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


def table_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The cells under `HEADINGS`, one list a method."""
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
    return (
        f"{about['model']}, context {settings['context']:,} tokens, the last "
        f"{settings['new_tokens']} of them decoded; {settings['examples']} examples a "
        f"retrieval task, {settings['windows']} windows of held-out text; 95% "
        f"intervals. Chain: links of {links} before the first mistake. Bytes are of "
        f"cache: read for one token of one row, held for one row. Speed: "
        f"{settings['batch']} rows together on {about['device']} "
        f"({about['backend']}), median of batches after a warm-up; prefill: one row's "
        "prompt, read alone. KL and nats are per token, against the first row."
    )


def print_table(results: Mapping[str, Any]) -> None:
    """Prints the comparison: what is answered, then what attention loses."""
    found = table_rows(results), attention_rows(results)
    names, shared = tables.shared_options([row[0] for row in found[0]])
    said = caption(results), ATTENTION_CAPTION
    if shared:
        tables.say(shared)
        print()
    for headings, rows, below in zip(
        (HEADINGS, ATTENTION_HEADINGS), found, said, strict=True
    ):
        rows = [[name, *row[1:]] for name, row in zip(names, rows, strict=True)]
        tables.show(headings, rows)
        print()
        tables.say(below)
        print()


def print_task(document: Mapping[str, Any]) -> None:
    """Prints one task's result."""
    document = json_ready(document)
    about = f"{document['task']}, {document['method']}, context {document['context']}"
    if "accuracy" in document:
        tables.say(f"{about}: {format_share(document['accuracy'])}, n={document['n']}")
        for cell in document["by_depth"]:
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
            f"n={document['n']} windows"
        )
    else:
        tables.say(
            f"{about}: top-1 agreement {format_share(document['top1_agreement'])}, "
            f"KL {document['kl']['mean']:.4f} nats, n={document['n']} windows"
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
    return template.render(
        caption=caption(results),
        headings=HEADINGS,
        rows=table_rows(results),
        attention_caption=ATTENTION_CAPTION,
        attention_headings=ATTENTION_HEADINGS,
        attention_rows=attention_rows(results),
        scatter=pictures.svg(compare_figures.scatter(results), "scatter"),
        narrow=pictures.svg(compare_figures.scatter(results, is_narrow=True), "narrow"),
        needles=pictures.svg(compare_figures.needles(results), "needles"),
        kept=_kept(results["kept"]),
        manifest=results["manifest"],
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
