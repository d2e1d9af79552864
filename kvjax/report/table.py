"""The tables of a report, for a terminal and for the page alike."""

import math
from collections.abc import Mapping
from typing import Any

from kvjax import files
from kvjax.report import terminal


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
    """Says how the table was measured, in a sentence or two."""
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
        terminal.say(said)


def _comparisons(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The comparison and its sections, without those that were cut off too early."""
    return [one for one in (results, *results.get("sections", ())) if one["rows"]]


def left_out(results: Mapping[str, Any]) -> str:
    """A line on the methods that no row is of, and why; nothing if there is none."""
    reasons = results.get("left_out", {})
    parts = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return f"Left out: {'; '.join(parts)}." if parts else ""


def _print_comparison(results: Mapping[str, Any]) -> None:
    """Prints what is answered, then what attention loses."""
    tables = table_rows(results), attention_rows(results)
    names, shared = terminal.shared_options([row[0] for row in tables[0]])
    captions = caption(results), ATTENTION_CAPTION
    if shared:
        terminal.say(shared)
        print()
    for heads, rows, below in zip(
        (headings(results), ATTENTION_HEADINGS), tables, captions, strict=True
    ):
        rows = [[name, *row[1:]] for name, row in zip(names, rows, strict=True)]
        terminal.show(heads, rows)
        print()
        terminal.say(below)
        print()


def print_task(document: Mapping[str, Any]) -> None:
    """Prints one task's result."""
    document = files.json_ready(document)
    about = f"{document['task']}, {document['method']}, context {document['context']}"
    about += ", question after it" if document.get("question") == "after" else ""
    text = f" of {document['text']}" if "text" in document else ""
    if "accuracy" in document:
        own = text if document["task"] == "own" else ""
        terminal.say(
            f"{about}: {format_share(document['accuracy'])}, n={document['n']}{own}"
        )
        for cell in document.get("by_depth", ()):
            print(f"  depth {cell['depth']:.2f}: {cell['correct']}/{cell['asked']}")
    elif "tasks" in document:
        _print_tasks(about, document)
    elif "valid_steps" in document:
        share = format_share(document["valid_steps"])
        terminal.say(
            f"{about}: mean share of steps before the first mistake {share}, "
            f"n={document['n']}"
        )
    elif "f1" in document:
        share, rows = format_share(document["f1"]), document["rows"]
        terminal.say(f"{about}: mean F1 of {rows} rows {share}, n={document['n']}")
    elif "valid_prefix" in document:
        share = format_share(document["valid_prefix"])
        terminal.say(f"{about}: mean valid prefix {share}, n={document['n']}")
        scores = [example["score"] for example in document["examples"]]
        links = document["links"]
        for found in range(links + 1):
            times = sum(round(score * links) == found for score in scores)
            print(f"  {found} of {links} links: {times}")
    elif "perplexity" in document:
        terminal.say(
            f"{about}: perplexity {_value(document['perplexity'])}, "
            f"{_value(document['bits_per_byte'])} bits per byte, "
            f"n={document['n']} windows{text}"
        )
    else:
        terminal.say(
            f"{about}: top-1 agreement {format_share(document['top1_agreement'])}, "
            f"KL {document['kl']['mean']:.4f} nats, n={document['n']} windows{text}"
        )
        print()
        terminal.show(LAYER_HEADINGS, [_layer(layer) for layer in document["layers"]])


def _print_tasks(about: str, document: Mapping[str, Any]) -> None:
    """Prints tasks that are scored by string match, and their mean."""
    tasks = document["tasks"]
    terminal.say(f"{about}, string match:")
    print()
    cells = [
        [task, format_share(interval), str(interval["n"])]
        for task, interval in tasks.items()
    ]
    terminal.show(("task", "score", "n"), cells)
    print()
    terminal.say(f"mean of {len(tasks)} tasks {100 * document['average']:.1f}%")


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
