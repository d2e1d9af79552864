"""`kvjax eval`: one task under one method, with its interval."""

import json
from typing import Annotated

import typer

from kvjax import registry, report
from kvjax.cli.common import (
    BatchOption,
    ContextOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelOption,
    NewTokensOption,
    SeedOption,
    TextOption,
    held_out_text,
    load,
    positive,
    read_text,
)
from kvjax.progress import show_progress


def evaluate(
    task: Annotated[
        str,
        typer.Option(
            help="passkey, multikey, variables, chain, extraction, perplexity or "
            "fidelity."
        ),
    ],
    method: MethodOption = "full",
    model: ModelOption = None,
    context: ContextOption = 512,
    n: Annotated[int, typer.Option(help="Examples, or windows of text.")] = 20,
    seed: SeedOption = 0,
    new_tokens: NewTokensOption = 64,
    batch: BatchOption = 8,
    text: TextOption = None,
    chunk_size: Annotated[int, typer.Option(help="Prompt tokens at once.")] = 1024,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """One task under one method, with its interval."""
    from kvjax.evaluation import single

    single.check_task(task)
    positive(n=n, context=context, batch=batch)
    parsed, full = registry.parse(method), registry.parse("full")
    content = held_out_text() if text is None else read_text(text)
    language_model = load(model, dtype)
    with show_progress() as progress:
        result = single.run(
            task,
            language_model,
            parsed,
            full,
            content,
            context=context,
            n=n,
            seed=seed,
            new_tokens=new_tokens,
            batch=batch,
            chunk_size=chunk_size,
            progress=lambda fraction: progress(method, fraction),
        )
    arguments = {"context": context, "n": n, "seed": seed, "model": language_model.name}
    document = {"task": task, "method": method, **arguments, **result}
    if as_json:
        print(json.dumps(report.json_ready(document), indent=2))
    else:
        report.print_task(document)
