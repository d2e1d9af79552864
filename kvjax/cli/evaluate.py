"""`kvjax eval` and `kvjax compare`: what methods read and what they lose."""

import dataclasses
import json
import pathlib
import sys
from typing import Annotated

import typer

import kvjax
from kvjax import registry, report
from kvjax.cli.common import (
    METHOD_HELP,
    BatchOption,
    ContextOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelOption,
    NewTokensOption,
    SeedOption,
    TextOption,
    arguments_given,
    held_out_text,
    load,
    positive,
    read_text,
    with_budget,
)


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
    with report.progress() as progress:
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


def compare(
    model: ModelOption = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=METHOD_HELP + " May be repeated; every method if left out."),
    ] = None,
    context: ContextOption = 512,
    budget: Annotated[
        int, typer.Option(help="Tokens per KV head, where a method does not say.")
    ] = 128,
    n: Annotated[int, typer.Option(help="Examples of each retrieval task.")] = 15,
    windows: Annotated[int, typer.Option(help="Windows of held-out text.")] = 8,
    new_tokens: NewTokensOption = 64,
    batch: BatchOption = 8,
    seed: SeedOption = 0,
    text: TextOption = None,
    out: Annotated[
        pathlib.Path, typer.Option(help="Folder for report.html and results.json.")
    ] = pathlib.Path("kvjax-report"),
    chunk_size: Annotated[int, typer.Option(help="Prompt tokens at once.")] = 1024,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decodes the same inputs under each method: what is read, what is lost."""
    from kvjax.evaluation import compare as comparison

    settings = comparison.Settings(
        context=context,
        new_tokens=new_tokens,
        examples=n,
        windows=windows,
        batch=batch,
        seed=seed,
        chunk_size=chunk_size,
    )
    parsed = _methods(method or [], context, budget)
    report.check_writable(out)
    content = held_out_text() if text is None else read_text(text)
    language_model = load(model, dtype)
    if not method:
        alpha = language_model.decoder.cache_spec(1, 1).alpha
        parsed = _methods(_every(alpha), context, budget)
    inputs = comparison.make_inputs(language_model, content, settings)
    with report.progress() as progress:
        rows = comparison.compare(
            language_model, parsed, inputs, settings, progress=progress
        )
    kept = _kept(language_model, parsed, inputs.windows[0])
    arguments = dataclasses.asdict(settings) | {"budget": budget, "dtype": dtype}
    about = report.manifest(
        version=kvjax.__version__,
        model=language_model.name,
        arguments=arguments_given.get(),
        settings=arguments,
    )
    results = report.results(rows, about, kept)
    page, data = report.write(out, results)
    if as_json:
        print(data.read_text(encoding="utf-8"), end="")
    else:
        report.print_table(results)
    print(f"wrote {page} and {data}", file=sys.stderr)


def _kept(language_model, methods: dict[str, kvjax.Method], tokens: list[int]) -> list:
    """What methods of constant memory hold of a text, for the report's picture."""
    from kvjax import accounting
    from kvjax.evaluation import kept_figure

    every = max(len(tokens) // 16, 1)
    return [
        kept_figure.kept(language_model, method, tokens, every=every, name=name)
        for name, method in methods.items()
        if accounting.is_constant(method, language_model.decoder)
    ]


# More than one way of a method that is worth a line of its own.
VARIANTS = {"entmaxkv": ("selector=gaussian", "certified=true")}


def _every(alpha: float) -> list[str]:
    """Spec strings of what a model of that alpha can be compared under (1: softmax)."""
    specs = []
    for name in registry.names(alpha):
        variants = VARIANTS.get(name, ())
        specs += [name, *(f"{name}:{options}" for options in variants)]
    return specs


def _methods(given: list[str], context: int, budget: int) -> dict[str, kvjax.Method]:
    """Methods by their full spec strings, `full` first."""
    positive(context=context, budget=budget)
    if budget >= context:
        raise ValueError(
            f"{budget=} must be below {context=}: otherwise nothing is left out and "
            "every method is exact."
        )
    parsed = {"full": registry.parse("full")}
    for spec in given:
        spec = with_budget(spec, budget)
        try:
            parsed[spec] = registry.parse(spec)
        except ValueError as error:
            raise ValueError(f"{spec}: {error}") from error
    return parsed
