"""The tables of a report, for a terminal and for the page alike.

A comparison has three: what is predicted, KL to full attention first; what is answered;
and what attention loses. A column is there if any row has its field.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kvjax import files
from kvjax.evaluation import fronts
from kvjax.report import labels, terminal


def format_bytes(count: int | float) -> str:
    """Binary units, three digits: `96.0 KiB`."""
    if count < 1024:
        return f"{round(count)} B"
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


def _small(interval: Mapping[str, Any]) -> str:
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    if mean is None:
        return "not finite"
    if low is None or high is None:
        return f"{mean:.2g}"
    return f"{mean:.2g} [{low:.2g}, {high:.2g}]"


def _open(interval: Mapping[str, Any]) -> str:
    """Writes an interval that may have a lower end alone, `[low, ∞)`."""
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    if mean is None or high is not None or not low:
        return _small(interval)
    return f"{mean:.2g} [{low:.2g}, ∞)"


def _count(interval: Mapping[str, Any]) -> str:
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def _mean(form: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(interval):
        mean = interval["mean"]
        return "not finite" if mean is None else format(mean, form)

    return cell


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


class Column(NamedTuple):
    """A column of a table: a field of the rows, and how it is written."""

    heading: str
    field: str
    cell: Callable[[Any], str]
    is_of_reference: bool = True  # else the first row has none: it is the measure


BYTES = Column("read / token", "bytes_read", format_bytes)
PREDICTED = (
    BYTES,
    Column("held", "bytes_held", format_bytes),
    Column("in host", "bytes_in_host", format_bytes),
    Column("KL", "kl", _small, False),
    Column("KL p99", "kl_p99", _open, False),
    Column("top-1", "top1_agreement", format_share, False),
    Column("same tokens", "tokens_before_difference", _count, False),
    Column("perplexity", "perplexity", _mean(".3f")),
    Column("nats lost", "nats_lost", _signed, False),
)
ANSWERED = (
    BYTES,
    Column("passkey", "passkey", format_share),
    Column("multi-key", "multikey", format_share),
    Column("chain", "chain", format_share),
    Column("own", "own", format_share),
    Column("passkey, after", "passkey_after", format_share),
    Column("multi-key, after", "multikey_after", format_share),
    Column("chain, after", "chain_after", format_share),
    Column("own, after", "own_after", format_share),
    Column("tokens/s", "tokens_per_second", _rate),
    Column("prompt pairs", "prompt_share", "{:.0%}".format),
    Column("prefill s", "prefill_seconds", "{:.2f}".format),
)
ATTENTION = (
    Column("read / token, at most", "bytes_read", format_bytes),
    Column("measured", "bytes_measured", format_bytes),
    Column("over the link", "bytes_moved", format_bytes),
    Column("found", "pages_found", format_share),
    Column("output error", "output_error", _small),
    Column("dropped mass", "dropped_mass", _small),
    Column("support kept", "support", format_share),
    Column("proved exact", "proved_exact", _mean(".1%")),
    Column("full steps", "full_steps", _mean(".0%")),
)
# What the fields that have a front are called in it.
FRONTS = {"kl": "KL"} | {
    column.field: column.heading
    for column in ANSWERED
    if column.field in fronts.MORE_IS_BETTER
}


class Sheet(NamedTuple):
    """A table: the first column names the rows."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]
    caption: str


def table_rows(
    results: Mapping[str, Any], columns: Sequence[Column]
) -> tuple[tuple[str, ...], list[list[str]]]:
    """The headings of a table, the rows' names first, and its cells."""
    rows, called = results["rows"], labels.of_results(results)
    columns = [
        column
        for column in columns
        if any(row.get(column.field) is not None for row in rows)
    ]
    headings = ["method", *(column.heading for column in columns)]
    if called.budgets is not None:
        headings.insert(1, "budget")
    table = []
    for place, row in enumerate(rows):
        cells = [called.names[place]]
        if called.budgets is not None:
            budget = called.budgets[place]
            cells.append("-" if budget is None else str(budget))
        for column in columns:
            value = row.get(column.field)
            is_none = value is None or (place == 0 and not column.is_of_reference)
            cells.append("-" if is_none else column.cell(value))
        table.append(cells)
    return tuple(headings), table


def sheets(results: Mapping[str, Any]) -> list[Sheet]:
    """The three tables of a comparison."""
    return [
        Sheet(title, *table_rows(results, columns), caption)
        for title, columns, caption in (
            ("What is predicted", PREDICTED, predicted_caption(results)),
            ("What is answered", ANSWERED, answered_caption(results)),
            ("What attention loses", ATTENTION, attention_caption(results)),
        )
    ]


LAYERS = (
    "Attention of the layers, each fed what the first row's is, over the tokens that "
    "decode steps predict. Measured: what choosing reads, and the keys and values "
    "attended to. Dropped mass: of the first row's weights, on what was not attended "
    "to. Support kept: share of the tokens with any weight that was. Proved exact: "
    "share of heads and steps known to equal attention over every token. Full steps: "
    "share of steps that read the whole cache; its inverse is the effective stride."
)
LINK = (
    " Over the link: the keys and values that came from the host's memory, in whole "
    "pages and blocks. Found: share of the pages listed there, or values, that the "
    "device had already."
)
WHEN = {
    "seen": "Questions end the prompt: a method sees them before it chooses.",
    "after": "Questions come after a method has chosen what to keep of their context.",
    "both": (
        "Questions end the prompt, so that a method sees them before it chooses; "
        "after: they come once it has."
    ),
}


def _of(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def attention_caption(results: Mapping[str, Any]) -> str:
    """Says how layers were fed, and what the columns of the third table are."""
    return LAYERS + (LINK if _is_offloaded(results) else "")


def _is_offloaded(results: Mapping[str, Any]) -> bool:
    return any(row.get("bytes_in_host") for row in results["rows"])


def predicted_caption(results: Mapping[str, Any]) -> str:
    """Says on what the first table was measured, and what its columns are."""
    about = results["manifest"]
    settings = about["settings"]
    text = about.get("text", "held-out text")
    caption = (
        f"{about['model']}, context {settings['context']:,} tokens, the last "
        f"{settings['new_tokens']} of them decoded; "
        f"{_of(settings['windows'], 'window')} of {text}; 95% intervals. Bytes are of "
        "cache: read for one token of one row, held for one row. KL, top-1 and nats: "
        "against the first row, per token that decode steps predict."
    )
    if any(row.get("kl_p99") for row in results["rows"]):
        caption += (
            " KL p99: the 99th percentile of tokens; ∞ where they are too few to say. "
            f"Same tokens: of {settings['new_tokens']} chosen greedily, those before "
            "the first that differs from the first row's."
        )
    if _is_offloaded(results):
        caption += " In host: held in the host's memory; held: in the device's."
    return caption


def answered_caption(results: Mapping[str, Any], *, speed: bool = True) -> str:
    """Says what was asked and when, and how speeds were measured."""
    about = results["manifest"]
    settings = about["settings"]
    caption = (
        f"{_of(settings['examples'], 'example')} a retrieval task. "
        f"{WHEN[settings.get('question', 'seen')]} Chain: links of "
        f"{results['rows'][0]['chain_links']} before the first mistake."
    )
    if settings.get("chat"):
        caption += " Asked in the chat template."
    if "tasks" in settings:
        row = results["rows"][0]
        asked = row.get("own") or row["own_after"]
        caption += f" Own: {_of(asked['n'], 'question')} of {settings['tasks']}."
    if speed:
        caption += (
            f" Speed: {_of(settings['batch'], 'row')} together on {about['device']} "
            f"({about['backend']}), median of batches; prefill: one row's prompt, read "
            "alone."
        )
    if any(row.get("prompt_share") for row in results["rows"]):
        caption += (
            " Prompt pairs: of a prompt's query-key pairs, those that are attended to, "
            "if not all."
        )
    return caption


def front_lines(results: Mapping[str, Any]) -> list[str]:
    """A line a result: the rows on its Pareto front, in the order of their bytes."""
    called = labels.of_results(results)
    places = {row["method"]: place for place, row in enumerate(results["rows"])}
    return [
        f"{FRONTS[name]}: {', '.join(called.whole(places[x]) for x in methods)}"
        for name, methods in fronts.fronts(results["rows"]).items()
    ]


FRONT_CAPTION = (
    "Pareto fronts: of the rows that read as few bytes none does better, by the "
    "estimates alone."
)


def print_table(results: Mapping[str, Any]) -> None:
    """Prints a comparison, its sections, and what is in neither."""
    for one in comparisons(results):
        _print_comparison(one)
    if said := left_out(results):
        terminal.say(said)


def comparisons(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The comparison and its sections, without those that were cut off too early."""
    return [one for one in (results, *results.get("sections", ())) if one["rows"]]


def left_out(results: Mapping[str, Any]) -> str:
    """A line on the methods that no row is of, and why; nothing if there is none."""
    reasons = results.get("left_out", {})
    parts = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return f"Left out: {'; '.join(parts)}." if parts else ""


def _print_comparison(results: Mapping[str, Any]) -> None:
    """Prints what is predicted, answered and lost, and who reads least for it."""
    if shared := labels.of_results(results).shared:
        terminal.say(shared)
        print()
    for sheet in sheets(results):
        terminal.show(sheet.headings, sheet.rows)
        print()
        terminal.say(sheet.caption)
        print()
    terminal.say(FRONT_CAPTION)
    for line in front_lines(results):
        terminal.say(f"  {line}", later="    ")
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
            f"n={_of(document['n'], 'window')}{text}"
        )
    else:
        terminal.say(
            f"{about}: top-1 agreement {format_share(document['top1_agreement'])}, "
            f"KL {document['kl']['mean']:.4f} nats, "
            f"n={_of(document['n'], 'window')}{text}"
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


LAYER_HEADINGS = ("layer", *(column.heading for column in ATTENTION[4:]))


def _layer(layer: Mapping[str, Any]) -> list[str]:
    return [
        str(layer["layer"]),
        f"{layer['error']['mean']:.4f}",
        f"{layer['dropped']['mean']:.2g}",
        f"{layer['support']['mean']:.0%}",
        f"{layer['exact']['mean']:.0%}",
        f"{layer['refreshed']['mean']:.0%}",
    ]
