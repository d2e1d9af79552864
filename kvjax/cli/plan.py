"""`kvjax plan`: the memory a model takes at a context, and the rate its bytes allow."""

import dataclasses
import json
from typing import Annotated

import typer

from kvjax import registry
from kvjax.cli.common import (
    METHOD_HELP,
    MODEL_HELP,
    DtypeOption,
    JsonOption,
    model_name,
    positive,
    print_notes,
    whole_numbers,
    with_budget,
)


def plan(
    model: Annotated[
        str | None, typer.Option("--model", help=MODEL_HELP + " Or a config.json.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=METHOD_HELP + " May be repeated; every method if left out."),
    ] = None,
    context: Annotated[
        int, typer.Option("--context", help="Tokens of a row, generated ones too.")
    ] = 131_072,
    budget: Annotated[
        str,
        typer.Option(help="Where a method does not say; several with commas."),
    ] = "1024",
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Generated tokens of the context.")
    ] = 128,
    batch: Annotated[int, typer.Option(help="Rows decoded together.")] = 1,
    chunk_size: Annotated[int, typer.Option(help="Prompt tokens at once.")] = 512,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Accelerator, as v5e-1; may be repeated; all if left out."),
    ] = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Memory of a model at a context, method by method, and which devices it fits."""
    import models
    from kvjax import planning

    positive(context=context, new_tokens=new_tokens, batch=batch, chunk_size=chunk_size)
    budgets = whole_numbers("--budget", budget)
    for value in budgets:
        positive(budget=value)
    for wanted in device or ():
        if wanted not in planning.DEVICES:
            known = ", ".join(planning.DEVICES)
            raise ValueError(f"unknown device={wanted!r}: choose one of {known}.")
    devices = {d: planning.DEVICES[d] for d in device or planning.DEVICES}
    name = model_name(model)
    decoder = models.load_decoder(name, dtype=dtype)
    print_notes(decoder)
    weights, sizes = _weights(decoder), _sizes(decoder)
    given = method or registry.names(decoder.alpha)
    specs = dict.fromkeys(with_budget(spec, b) for spec in given for b in budgets)
    rows = []
    for spec in specs:
        try:
            found = planning.plan(
                decoder,
                registry.parse(spec),
                weights=weights,
                sizes=sizes,
                context=context,
                new_tokens=new_tokens,
                batch=batch,
                chunk_size=chunk_size,
            )
        except ValueError as error:
            raise ValueError(f"{spec}: {error}") from error
        rows.append(_row(spec, found, devices))
    document = {
        "model": name,
        "dtype": str(decoder.config.dtype),
        "context": context,
        "model_context": decoder.context,
        "new_tokens": new_tokens,
        "batch": batch,
        "chunk_size": chunk_size,
        "weights": weights.held,
        "weights_read": weights.read,
        "devices": {name: found._asdict() for name, found in devices.items()},
        "rows": rows,
    }
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        _print(document)


def _weights(decoder):
    from kvjax import planning
    from kvjax.cache import num_bytes
    from models import llama

    # Layers are alike: two models of one and two of them say it all, in a tenth of
    # the time that flax takes to make the shapes of 32.
    one, two = (
        llama.LlamaDecoder(dataclasses.replace(decoder.config, num_layers=layers))
        for layers in (1, 2)
    )
    shapes = one.param_shapes()
    layer = num_bytes(two.param_shapes()) - num_bytes(shapes)
    held = num_bytes(shapes) + (decoder.num_layers - 1) * layer
    # Of an embedding that is not the output matrix too, a step reads a line a row.
    unread = 0 if decoder.config.tied_embeddings else num_bytes(shapes["embedding"])
    return planning.Weights(held, held - unread)


def _sizes(decoder):
    from kvjax import planning

    return planning.Sizes(decoder.config.width, decoder.config.mlp_width)


def _row(spec, found, devices) -> dict:
    from kvjax import planning

    return {
        "method": spec,
        "prompt_state": found.prompt_state,
        "decode_state": found.decode_state,
        "prompt_temporaries_estimate": found.prompt_temporaries,
        "decode_temporaries_estimate": found.decode_temporaries,
        "peak": found.peak,
        "read_per_step": {
            "weights": found.weights.read,
            "kv": found.kv,
            "metadata": found.metadata,
        },
        "devices": {
            name: {
                "fits": planning.fits(found, device),
                "most_tokens_per_second": planning.tokens_per_second(found, device),
            }
            for name, device in devices.items()
        },
    }


def _print(document) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def gb(count):
        return f"{count / 1e9:.2f}"

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    headings = ["prompt", "decode", "temp. ~", "peak", "read"]
    headings = [f"{heading}\nGB" for heading in headings]
    for name, device in document["devices"].items():
        headings.append(f"{name}\n{device['memory'] / 1e9:.1f}")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in document["rows"]:
        temporaries = (
            row["prompt_temporaries_estimate"],
            row["decode_temporaries_estimate"],
        )
        table.add_row(
            row["method"],
            gb(row["prompt_state"]),
            gb(row["decode_state"]),
            gb(max(temporaries)),
            gb(row["peak"]),
            gb(sum(row["read_per_step"].values())),
            *(
                f"{at['most_tokens_per_second']:,.0f}" if at["fits"] else "-"
                for at in row["devices"].values()
            ),
        )
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)
    print("\n".join(_said(document)))


def _said(document) -> list[str]:
    rows = "1 row" if document["batch"] == 1 else f"{document['batch']} rows"
    said = f"{document['new_tokens']:,} of them generated. GB are 1e9 bytes."
    lines = [
        f"Weights {document['weights'] / 1e9:.2f} GB ({document['dtype']}); {rows} "
        f"of {document['context']:,} tokens, {said}",
        "prompt, decode: states while the prompt is read and while tokens are "
        "generated. temp.: an estimate.",
        "peak: with weights and temporaries. read: of all rows, by one step. Devices: "
        "the most tokens a second",
        "that these bytes allow, arithmetic not counted; - where the peak does not "
        "fit.",
    ]
    if document["context"] > document["model_context"]:
        lines.append(
            f"The model was made for {document['model_context']:,} tokens: only "
            "methods of constant memory go beyond."
        )
    for name, device in document["devices"].items():
        fitting = [r for r in document["rows"] if r["devices"][name]["fits"]]
        least = min(document["rows"], key=lambda row: row["peak"])
        if fitting:
            best = max(
                fitting, key=lambda row: row["devices"][name]["most_tokens_per_second"]
            )
            lines.append(
                f"{name}: {len(fitting)} of {len(document['rows'])} fit; the least "
                f"bytes a step has {best['method']}."
            )
        else:
            lines.append(
                f"{name}: none fits; {least['method']} comes nearest, "
                f"{(least['peak'] - device['memory']) / 1e9:.2f} GB too much."
            )
    return lines
