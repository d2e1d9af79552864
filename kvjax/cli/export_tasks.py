"""`kvjax export-tasks`: RULER's examples in kvpress's columns, for others to run."""

import json
import pathlib
from typing import Annotated

import typer

from kvjax.cli.options import (
    ContextOption,
    JsonOption,
    ModelOption,
    RulerTextOption,
    SeedOption,
    load,
    positive,
    ruler_texts,
)
from kvjax.files import check_writable


def export_tasks(
    out: Annotated[
        pathlib.Path, typer.Option(help="File to write, .jsonl or .parquet.")
    ],
    task: Annotated[
        str, typer.Option(help="ruler for all 13, or one, such as niah_single_1.")
    ] = "ruler",
    model: ModelOption = None,
    context: ContextOption = 2048,
    n: Annotated[int, typer.Option(help="Examples of each task.")] = 20,
    seed: SeedOption = 0,
    ruler_text: RulerTextOption = "shipped",
    as_json: JsonOption = False,
) -> None:
    """Writes examples of RULER's tasks to a file in kvpress's columns.

    They are fitted to the context in tokens of the model. `kvjax eval --task FILE`
    reads such a file, whoever wrote it.
    """
    from kvjax.evaluation.tasks import interchange, ruler

    positive(context=context, n=n)
    interchange.check_name(out)
    names = ruler.TASKS if task == "ruler" else (task,)
    for name in names:
        ruler.check_task(name)
    source = ruler_texts(ruler_text)
    if out.exists():
        raise FileExistsError(f"{out} is there already: remove it, or give another.")
    check_writable(out.parent)
    tokenizer = load(model, None).tokenizer
    made = [
        example
        for name in names
        for example in ruler.examples(
            name, tokenizer, context=context, n=n, seed=seed, source=source
        )
    ]
    interchange.write(out, made)
    if as_json:
        document = {"path": str(out), "rows": len(made), "tasks": list(names)}
        print(json.dumps(document, indent=2))
    else:
        print(f"{out}: {len(made)} rows of {len(names)} tasks, context {context}")
