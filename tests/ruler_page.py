"""The table of RULER's scores on its page, from what `benchmarks/ruler.py` gathered."""

import json
import pathlib
import textwrap

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
# Columns, and the tasks whose mean each is.
COLUMNS = {
    "single": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "multi-key": ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "multi-value, -query": ("niah_multivalue", "niah_multiquery"),
    "vt": ("vt",),
    "cwe": ("cwe",),
    "fwe": ("fwe",),
    "qa": ("qa_1", "qa_2"),
}
TASKS = [task for tasks in COLUMNS.values() for task in tasks]


def is_there() -> bool:
    """Says if any rows were gathered."""
    return any(RESULTS.glob("*-ruler.json"))


def table() -> str:
    """A line a method and protocol whose thirteen tasks are all there."""
    document = json.loads(max(RESULTS.glob("*-ruler.json")).read_text("utf-8"))
    groups = {}
    for row in document["rows"]:
        if "scores" in row:
            key = row["context"], row["question"], row["method"]
            groups.setdefault(key, {})[row["task"]] = row
    whole = {key: rows for key, rows in groups.items() if len(rows) == len(TASKS)}
    heads = ["context", "method", "question", *COLUMNS, "mean of 13"]
    lines = ["| " + " | ".join(heads) + " |", "|--:|---|---" + "|--:" * 8 + "|"]

    def mean(rows, tasks):
        scores = [rows[task]["string_match"]["mean"] for task in tasks]
        return sum(scores) / len(scores)

    def order(key):
        context, question, method = key
        return context, method != "full", question, -mean(whole[key], TASKS)

    for key in sorted(whole, key=order):
        context, question, method = key
        question = "-" if method == "full" else question
        cells = [f"{100 * mean(whole[key], tasks):.0f}" for tasks in COLUMNS.values()]
        cells.append(f"{100 * mean(whole[key], TASKS):.1f}")
        lines.append(
            f"| {context:,} | `{method}` | {question} | " + " | ".join(cells) + " |"
        )
    counts = {(key[2] == "full"): rows["vt"]["n"] for key, rows in whole.items()}
    said = (
        f"{document['model']} over the text that "
        f"{'ships' if document['text'] == 'shipped' else 'RULER took'}, percent; "
        + ", ".join(
            f"{n} examples a task of {'`full`' if is_full else 'other methods'}"
            for is_full, n in sorted(counts.items(), reverse=True)
        )
        + ". Full attention does not depend on when a question comes."
    )
    return "\n".join([*lines, "", textwrap.fill(said, 88)])
