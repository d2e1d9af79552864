"""`kvjax compare`: what methods read and what they lose, side by side."""

import dataclasses
import hashlib
import pathlib
import sys
from typing import Annotated

import typer

import kvjax
from kvjax import registry, report
from kvjax.cli.common import (
    METHOD_HELP,
    ContextOption,
    DtypeOption,
    JsonOption,
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
from kvjax.progress import show_progress


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
    batch: Annotated[
        int | None,
        typer.Option(help="Rows decoded together; as many as fit, at most 8."),
    ] = None,
    seed: SeedOption = 0,
    text: TextOption = None,
    out: Annotated[
        pathlib.Path,
        typer.Option(help="Folder for report.html, results.json and the figure."),
    ] = pathlib.Path("kvjax-report"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a report that is there.")
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Keep the rows of a report, add others.")
    ] = False,
    chunk_size: Annotated[int, typer.Option(help="Prompt tokens at once.")] = 1024,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decodes the same inputs under each method: what is read, what is lost."""
    from kvjax.evaluation import compare as comparison
    from kvjax.evaluation import compare_inputs

    settings = compare_inputs.Settings(
        context=context,
        new_tokens=new_tokens,
        examples=n,
        windows=windows,
        batch=1 if batch is None else batch,
        seed=seed,
        chunk_size=chunk_size,
    )
    parsed = _methods(method or [], context, budget)
    report.check_writable(out)
    report.check_free(out, overwrite=overwrite, go_on=go_on)
    content = held_out_text() if text is None else read_text(text)
    language_model = load(model, dtype)
    decoder = language_model.decoder
    if not method:
        alpha = decoder.cache_spec(1, 1).alpha
        parsed = _methods(_every(alpha), context, budget)
    room = _room()
    if batch is None and go_on:
        batch = report.earlier_batch(out)
    if batch is None:
        batch = comparison.batch_that_fits(language_model, parsed, settings, room)
    settings = dataclasses.replace(settings, batch=batch)
    about = report.manifest(
        version=kvjax.__version__,
        model=language_model.name,
        arguments=arguments_given.get(),
        settings=dataclasses.asdict(settings)
        | {
            "budget": budget,
            "dtype": str(decoder.cache_spec(1, 1).dtype),
            "weights": _fingerprint(language_model.params),
            "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
        },
    )
    rows = report.earlier_rows(out, about) if go_on else {}
    known = tuple(name for name in rows if name in parsed)
    inputs = compare_inputs.make_inputs(language_model, content, settings)
    print(
        f"kvjax: {len(parsed) - len(known)} methods on {language_model.name}, "
        f"{context:,} tokens, {settings.batch} rows together",
        file=sys.stderr,
    )

    def in_order():
        names = dict.fromkeys([*parsed, *rows])
        return [rows[name] for name in names if name in rows]

    report.begin(out, report.results(in_order(), about, complete=False))
    with show_progress(len(parsed) - len(known)) as progress:

        def keep(row):
            rows[row.method] = row
            report.write_data(out, report.results(in_order(), about, complete=False))

        comparison.compare(
            language_model,
            parsed,
            inputs,
            settings,
            known=known,
            room=room,
            on_row=keep,
            progress=progress,
        )
    methods = {name: registry.parse(name) for name in rows}
    kept = _kept(language_model, methods, inputs.windows[0])
    results = report.results(in_order(), about, kept)
    page, data = report.write(out, results)
    if as_json:
        print(data.read_text(encoding="utf-8"), end="")
    else:
        report.print_table(results)
    print(f"wrote {page} and {data}", file=sys.stderr)


def _fingerprint(params) -> str:
    """A digest of the sums of all weights: other weights have another one."""
    import jax
    import jax.numpy as jnp

    sums = [float(jnp.sum(x, dtype=jnp.float32)) for x in jax.tree.leaves(params)]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def _room() -> int:
    """Bytes for the states of methods that read together: half of what is free."""
    import jax

    from kvjax.evaluation import compare as comparison

    stats = jax.devices()[0].memory_stats() or {}  # of a CPU there are none
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    return max(free // 2, comparison.ROOM)


def _kept(language_model, methods: dict[str, kvjax.Method], tokens: list[int]) -> list:
    """Returns what methods of constant memory hold of a text, for the picture."""
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
