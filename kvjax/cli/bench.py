"""`kvjax bench`: how fast things are on this machine, each beside its roofline."""

import inspect
import json
from typing import Annotated

import typer

import kvjax
from kvjax import files
from kvjax.cli.options import (
    METHOD_HELP,
    MODEL_HELP,
    DtypeOption,
    JsonOption,
    arguments_given,
    checked_dtype,
    packing,
    positive,
    whole_numbers,
)
from kvjax.cli.progress import show_progress
from kvjax.report import documents, table, terminal

SUBJECTS = ("kernels", "decode")
OF_KERNELS = ("page_size", "kv_heads", "group", "head_dim")
OF_DECODE = ("model", "method", "steps")


def bench(
    subject: Annotated[
        str,
        typer.Argument(
            help="What to time: kernels, one attention layer; decode, a model's steps."
        ),
    ] = "kernels",
    model: Annotated[
        str | None, typer.Option("--model", help="Of decode: " + MODEL_HELP)
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Of decode: " + METHOD_HELP + " May be repeated."),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens in the cache, several with commas; 32768,131072 of kernels, "
            "4096 of decode."
        ),
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Tokens per KV head that sparse attention reads.")
    ] = 2048,
    steps: Annotated[int, typer.Option(help="Of decode: steps of a sample.")] = 16,
    page_size: Annotated[int, typer.Option(help="Of kernels: tokens of a page.")] = 64,
    batch: Annotated[int, typer.Option(help="Rows decoded together.")] = 1,
    kv_heads: Annotated[int, typer.Option(help="Of kernels: KV heads.")] = 8,
    group: Annotated[
        int, typer.Option(help="Of kernels: query heads of a KV head.")
    ] = 4,
    head_dim: Annotated[int, typer.Option(help="Of kernels: size of a head.")] = 128,
    repeats: Annotated[int, typer.Option(help="Samples of each, in turns.")] = 5,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Times one decoding layer, or a whole model, beside what the bytes allow.

    kernels times the operations of one attention layer; decode the steps of a model
    under its methods.
    """
    from kvjax.cost import bench_kernels

    if subject not in SUBJECTS:
        raise ValueError(f"{subject=} must be one of {', '.join(SUBJECTS)}.")
    given = {"model": model, "method": method, "steps": steps}
    given |= {"page_size": page_size, "kv_heads": kv_heads}
    given |= {"group": group, "head_dim": head_dim}
    _check_options(subject, given)
    if subject == "decode":
        from kvjax.cli import bench_decode

        positive(budget=budget, steps=steps, batch=batch, repeats=repeats)
        bench_decode.decode(
            model=model,
            methods=method,
            contexts=None if context is None else whole_numbers("--context", context),
            budget=budget,
            steps=steps,
            repeats=repeats,
            batch=batch,
            dtype=dtype,
            as_json=as_json,
        )
        return
    if packing.get() is not None:
        raise ValueError("--weights is of kvjax bench decode: leave it out.")
    dtype = checked_dtype(dtype) or "bfloat16"
    contexts = whole_numbers("--context", context or "32768,131072")
    positive(budget=budget, page_size=page_size, batch=batch, kv_heads=kv_heads)
    positive(group=group, head_dim=head_dim, repeats=repeats)
    runs = [
        bench_kernels.Sizes(
            tokens, budget, page_size, batch, kv_heads, group, head_dim, dtype
        )
        for tokens in contexts
    ]
    for sizes in runs:
        bench_kernels.operations(sizes, like=True)  # mistakes first
    timings = []
    with show_progress(len(runs)) as progress:
        for sizes in runs:
            timings += bench_kernels.kernels(
                sizes,
                repeats,
                lambda done, sizes=sizes: progress(f"{sizes.context:,} tokens", done),
            )
    settings = runs[0]._asdict() | {"context": contexts, "repeats": repeats}
    manifest = documents.manifest(
        version=kvjax.__version__,
        model="one layer",
        arguments=arguments_given.get(),
        settings=settings,
    )
    rows = [timing._asdict() for timing in timings]
    document = files.json_ready({"manifest": manifest, "rows": rows})
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        _print(document)


def _check_options(subject, given) -> None:
    """Raises ValueError for an option of the other subject."""
    parameters = inspect.signature(bench).parameters
    others = OF_DECODE if subject == "kernels" else OF_KERNELS
    for name in others:
        if given[name] not in (parameters[name].default, []):
            option = "--" + name.replace("_", "-")
            other = "decode" if subject == "kernels" else "kernels"
            raise ValueError(f"{option} is of kvjax bench {other}: leave it out.")


def _print(document) -> None:
    headings = "operation", "context", "bytes", "floor ms", "ms", "quartiles", "GB/s"
    rows = [
        [
            row["name"],
            f"{row['context']:,}",
            table.format_bytes(row["num_bytes"]),
            f"{1e3 * row['floor']:.3f}",
            f"{1e3 * row['median']:.3f}",
            f"{1e3 * row['low']:.3f}-{1e3 * row['high']:.3f}",
            f"{row['num_bytes'] / row['median'] / 1e9:.1f}",
            f"{row['floor'] / row['median']:.0%}",
            f"{row['times_full']:.1f}",
        ]
        for row in document["rows"]
    ]
    terminal.show((*headings, "of floor", "x full"), rows)
    print()
    about = document["manifest"]
    settings = about["settings"]
    terminal.say(
        f"One layer on {about['device']} ({about['backend']}), jax {about['jax']}: "
        f"{settings['num_kv_heads']} KV heads x {settings['group']}, head size "
        f"{settings['head_dim']}, {settings['dtype']}, {settings['batch']} rows, pages "
        f"of {settings['page_size']}, budget {settings['budget']}. Floor: the bytes at "
        "the speed of the copy."
    )
