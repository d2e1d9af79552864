"""RULER's thirteen tasks under every method, a task at a time, over hours or days.

    python benchmarks/ruler.py --out FOLDER
    python benchmarks/ruler.py --out FOLDER --known benchmarks/results/DAY-ruler.json
    python benchmarks/ruler.py --out FOLDER --json benchmarks/results/DAY-ruler.json

A row is a task under a method at a context, asked before the method chooses (seen) or
after. Methods of exact prompts read a task's prompts together. Rows are added to
FOLDER/rows.jsonl as they are measured; killed at any moment, the same command goes on.
The first rows tell most: full attention at 2K, then methods at a quarter and an eighth
of the cache asked after, and so on; --dry-run lists them. --known takes rows that were
gathered before; --json gathers what is there, and measures nothing.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time

import jax

import models
from kvjax import accounting, files, registry
from kvjax.cli.compiled import keep_compiled_code
from kvjax.cli.options import share_heaps, with_budget
from kvjax.evaluation import compare as comparison
from kvjax.evaluation import compare_inputs, compare_runs, statistics
from kvjax.evaluation.tasks import ruler
from kvjax.evaluation.tasks.ruler import texts
from models import published

# Of each kind of task one first: what a killed run leaves says something.
FIRST = ("niah_single_1", "niah_multikey_1", "vt", "fwe", "qa_1")
TASKS = (*FIRST, *(task for task in ruler.TASKS if task not in FIRST))
# Those that a table needs most.
METHODS = ("snapkv", "random", "streaming_llm", "keydiff", "expected_attention")

TRANSFORMED = (
    "retro+quest",
    "head_budgets+snapkv",
    "layer_budgets+snapkv",
    "decode_eviction+snapkv",
)
SHARES = 4, 8  # of a method's budget in the context
CHUNK = 512  # prompt tokens at once
LONGEST = 128  # tokens of an answer, of any task; no question is longer


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured: equal rows are measured once."""

    method: str
    context: int
    question: str
    task: str
    n: int

    @property
    def key(self):
        """The row in a few words."""
        return f"{self.context} {self.question} {self.method} {self.task}"


def specs(alpha, budget):
    """Every method that suits the model, those that a table needs most first."""
    names = sorted(
        [name for name in registry.names(alpha) if name != "full"],
        key=lambda name: (name not in METHODS, name),
    )
    if alpha == 1:
        known = registry.transforms()
        names += [name for name in TRANSFORMED if name.split("+")[0] in known]
    return [with_budget(name, budget) for name in names]


def planned(alpha, args):
    """All rows, the most telling first."""
    middle = args.context

    def full(context):
        return [Row("full", context, "seen", task, args.n) for task in TASKS]

    def others(question, names=None):
        # Both budgets at once: methods of exact prompts read them together.
        chosen = [x for share in SHARES for x in specs(alpha, middle // share)]
        if names is not None:
            chosen = [x for x in chosen if (x.split(":")[0] in METHODS) == names]
        few = args.n // 2
        return [
            Row(spec, middle, question, task, few) for spec in chosen for task in TASKS
        ]

    # Of full attention both protocols are one: its tokens and their order are.
    rows = full(middle)
    rows += others("after", True) + full(middle // 2)
    rows += others("after", False) + full(2 * middle)
    return rows + others("seen", True) + others("seen", False)


def known(path):
    """The rows that are there, by key; a line that a kill cut short is dropped."""
    found, is_whole = {}, True
    if not path.exists():
        return found
    text = files.read_text(path)
    for line in text.split("\n"):
        try:
            row = json.loads(line)
            found[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            is_whole &= not line
    if not is_whole or not text.endswith("\n"):
        lines = [json.dumps(row) + "\n" for row in found.values()]
        files.write_text(path, "".join(lines))
    return found


def gathered(path, args):
    """The rows of a document, by key; none without one.

    Raises:
        ValueError: if they are of another model, seed or text, or of no chat.
    """
    if path is None:
        return {}
    document = json.loads(files.read_text(path))
    for name, value in about(args).items():
        if document.get(name) != value:
            raise ValueError(
                f"{path} has rows of {name}={document.get(name)!r}, and these are of "
                f"{name}={value!r}: leave --known out, or ask for the same."
            )
    return {row["key"]: row for row in document["rows"]}


def is_done(row, found):
    """Says whether the row is there, of as many examples."""
    return row.key in found and found[row.key].get("n") == row.n


def append(path, row):
    """Adds a line in one write, which is on the disk when this returns."""
    data = (json.dumps(files.json_ready(row)) + "\n").encode()
    place = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(place, data)
        os.fsync(place)
    finally:
        os.close(place)


def groups(decoder, rows, args):
    """Yields rows of one task and protocol whose methods read their prompts together.

    All tasks of some methods follow each other: they share what is compiled.
    """

    def of_methods(row):
        return row.context, row.question, row.n

    for (context, _, n), part in itertools.groupby(rows, of_methods):
        part = list(part)
        settings = compare_inputs.Settings(
            context=context, new_tokens=LONGEST, batch=min(args.batch, n)
        )
        methods = {row.method: registry.parse(row.method) for row in part}
        full = registry.parse("full")
        room = int(args.room * 1e9)
        for names in comparison.groups(decoder, methods, full, settings, room):
            of_names = [row for row in part if row.method in names]
            for task in TASKS:
                together = [row for row in of_names if row.task == task]
                if together:
                    yield together


def answerable(decoder, rows):
    """The rows whose methods hold these shapes, and a row of the reason for others."""
    errors = {}
    for spec, context in {(row.method, row.context): None for row in rows}:
        try:
            accounting.bytes_held(registry.parse(spec), decoder, context, LONGEST)
        except ValueError as error:
            errors[spec, context] = str(error)
    fit = [row for row in rows if (row.method, row.context) not in errors]
    said = [
        failed(row, error)
        for row in rows
        if (error := errors.get((row.method, row.context)))
    ]
    return fit, said


def measure(model, rows, source, args):
    """The rows of a group, ready for JSON."""
    start = time.perf_counter()
    first = rows[0]
    examples = ruler.examples(
        first.task,
        model.tokenizer,
        context=first.context,
        n=first.n,
        seed=args.seed,
        source=source,
        is_chat=args.chat,
    )
    replies = compare_runs.retrieve(
        model,
        [registry.parse(row.method) for row in rows],
        examples,
        new_tokens=examples[0].answer_tokens,
        batch=min(args.batch, first.n),
        chunk_size=CHUNK,
        # One size for all tasks: they share what is compiled.
        longest=first.context,
        room=2 * LONGEST,
        question=first.question,
    )
    seconds = round((time.perf_counter() - start) / len(rows), 1)
    return [
        {"key": row.key}
        | dataclasses.asdict(row)
        | {
            "string_match": statistics.share_interval(reply.scores)._asdict(),
            "scores": reply.scores,
            "prompt_tokens": [len(x.prompt) for x in examples],
            "seconds": seconds,
            "read_together": len(rows),
        }
        for row, reply in zip(rows, replies, strict=True)
    ]


def outcomes(model, rows, source, args):
    """The rows of a group, ready for JSON; after an error each alone.

    Of a row that fails alone too: the reason, so that nobody tries it again.
    """
    try:
        return measure(model, rows, source, args)
    except ValueError as error:
        if len(rows) == 1:
            return [failed(rows[0], str(error))]
    return [found for row in rows for found in outcomes(model, [row], source, args)]


def failed(row, error):
    """A row that could not be measured, ready for JSON."""
    return {"key": row.key} | dataclasses.asdict(row) | {"error": error}


def about(args):
    """What all rows of a document have in common."""
    return {
        "model": args.model,
        "text": args.ruler_text,
        "seed": args.seed,
        "chat": args.chat,
    }


def gather(found, args):
    """The document of all rows, as it is committed."""
    return about(args) | {
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "rows": [row for _, row in sorted(found.items())],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder")
    parser.add_argument("--json", type=pathlib.Path, help="gather the rows into a file")
    parser.add_argument("--model", default="smollm2", help="name or folder")
    parser.add_argument("--context", type=int, default=2048, help="of the methods")
    parser.add_argument("--n", type=int, default=20, help="of full; others get half")
    parser.add_argument("--batch", type=int, default=5, help="rows together")
    parser.add_argument("--room", type=float, default=3.0, help="GB of states together")
    parser.add_argument("--known", type=pathlib.Path, help="rows gathered before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ruler-text", default="shipped", choices=texts.SOURCES)
    parser.add_argument("--chat", action="store_true", help="in the chat template")
    parser.add_argument("--groups", type=int, help="measure so many and stop")
    parser.add_argument("--dry-run", action="store_true", help="list the rows")
    args = parser.parse_args(argv)
    path = args.out / "rows.jsonl"
    found = gathered(args.known, args) | known(path)
    if args.json is not None:
        text = json.dumps(gather(found, args), indent=1) + "\n"
        files.write_text(args.json, text)
        return
    share_heaps()
    keep_compiled_code()
    decoder = models.load_decoder(args.model, dtype="float32")
    missing = [row for row in planned(decoder.alpha, args) if not is_done(row, found)]
    if args.dry_run:
        print("\n".join(row.key for row in missing))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    model = models.load(args.model, dtype="float32")
    source = texts.shipped()
    if args.ruler_text == "published":
        source = texts.published(published.path("ruler"))
    fit, said = answerable(decoder, missing)
    for row in said:
        append(path, row)
    last, done = None, len(said)
    for rows in itertools.islice(groups(decoder, fit, args), args.groups):
        names = [row.method for row in rows], rows[0].question
        if last not in (None, names):
            compare_runs.drop_programs()
        last = names
        for row in outcomes(model, rows, source, args):
            append(path, row)
            done += 1
            told = row.get("error")
            if told is None:
                told = f"{row['string_match']['mean']} ({row['seconds']} s)"
            line = f"{done}/{len(missing)} {row['key']}: {told}"
            print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
