"""`kvjax plan`: the memory a model takes at a context, and the rate its bytes allow."""

import inspect
import json
import math
from collections.abc import Mapping
from typing import Annotated

import typer

from kvjax import parallel, registry
from kvjax.cli.methods import for_model, names_for
from kvjax.cli.options import (
    METHOD_HELP,
    MODEL_HELP,
    ChunkOption,
    DtypeOption,
    JsonOption,
    merged,
    model_name,
    packing,
    positive,
    print_notes,
    whole_numbers,
    with_budget,
)
from kvjax.cli.plan_training import plan_training
from kvjax.cost import planning
from kvjax.report import terminal


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
    chunk_size: ChunkOption = 512,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Accelerator, as v5e-1, or name:GB:GB/s. May be repeated; all that "
            "are known if left out."
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Share of a device's memory that must stay free.")
    ] = planning.MARGIN,
    link_gbps: Annotated[
        float,
        typer.Option("--link-gbps", help="GB/s from the host's memory to a device."),
    ] = planning.LINK / 1e9,
    dtype: DtypeOption = None,
    training: Annotated[
        str | None,
        typer.Option(
            "--train", help="A config of `kvjax train` instead: memory of its steps."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of that config; may be repeated."),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            "--mesh",
            help="Devices that share weights and caches, as data=2,tensor=4; they need "
            "not be there. Bytes are then those of each.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Memory of a model at a context, method by method, and which devices it fits.

    With --train, the memory of a training step instead: compiled, and not run.
    """
    import models

    if training is not None:
        of_decoding = {"method": method, "context": context, "budget": budget}
        of_decoding |= {"new_tokens": new_tokens, "batch": batch}
        of_decoding |= {"chunk_size": chunk_size, "dtype": dtype}
        of_decoding |= {"link_gbps": link_gbps, "mesh": mesh}
        _refuse(of_decoding, "--train")
        if packing.get() is not None:
            raise ValueError("--weights has no meaning beside --train: leave it out.")
        if merged.get() is not None:
            raise ValueError("--adapter has no meaning beside --train: leave it out.")
        if model is not None:
            changes = [f"model.checkpoint={model_name(model)}", *(changes or ())]
        devices = planning.devices(device or planning.DEVICES)
        for one in devices.values():
            planning.room(one, margin)
        plan_training(
            training, changes or (), devices=devices, margin=margin, as_json=as_json
        )
        return
    if changes is not None:
        raise ValueError("--set is of a config: give --train CONFIG with it.")
    if not 0 < link_gbps < math.inf:
        raise ValueError(f"--link-gbps {link_gbps:g} must be above 0.")
    positive(context=context, new_tokens=new_tokens, batch=batch, chunk_size=chunk_size)
    budgets = whole_numbers("--budget", budget)
    for value in budgets:
        positive(budget=value)
    devices = planning.devices(device or planning.DEVICES)
    for one in devices.values():
        planning.room(one, margin)  # mistakes first
    over = None if mesh is None else parallel.imagined(mesh)
    name = model_name(model)
    decoder = models.load_decoder(name, dtype=dtype, adapter=merged.get(), mesh=over)
    print_notes(decoder)
    held, read, mlp_width = models.footprint(decoder, packing.get(), name)
    weights = planning.Weights(held, read)
    given = [for_model(spec, decoder) for spec in method or names_for(decoder)]
    specs = [with_budget(spec, b) for spec in given for b in budgets]
    parsed = {spec: registry.parse(spec) for spec in specs}
    rows = []
    for spec, one in parsed.items():
        try:
            found = planning.plan(
                decoder,
                one,
                weights=weights,
                mlp_width=mlp_width,
                context=context,
                new_tokens=new_tokens,
                batch=batch,
                chunk_size=chunk_size,
            )
        except ValueError as error:
            raise ValueError(f"{spec}: {error}") from error
        rows.append(_row(spec, found, devices, margin, 1e9 * link_gbps))
    document = {
        "model": name,
        "dtype": str(decoder.cache_spec(1, 1).dtype),
        "weights_dtype": packing.get(),
        "context": context,
        "model_context": decoder.context,
        "new_tokens": new_tokens,
        "batch": batch,
        "mesh": mesh,
        "chunk_size": chunk_size,
        "weights": weights.held,
        "weights_read": weights.read,
        "margin": margin,
        "link_gbps": link_gbps,
        "devices": {name: found._asdict() for name, found in devices.items()},
        "rows": rows,
    }
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        _print(document)


def _refuse(given: Mapping[str, object], beside: str) -> None:
    """Raises if an option has another value than it has when it is left out."""
    usual = inspect.signature(plan).parameters
    for name, value in given.items():
        if value != usual[name].default:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} has no meaning beside {beside}: leave it out.")


def _row(spec, found, devices, margin, link) -> dict:
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
        "prompt_pairs_share": found.prompt_share,
        "host_memory": found.host,
        "link_per_step_at_most": found.link,
        "sent_per_step": found.sent,
        "devices": {
            name: {
                "fits": planning.fits(found, device, margin),
                "most_tokens_per_second": planning.tokens_per_second(
                    found, device, link
                ),
            }
            for name, device in devices.items()
        },
    }


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _print(document) -> None:
    headings = ["method", *(f"{h}\nGB" for h in ("prompt", "decode", "temp.~"))]
    headings += ["peak\nGB", "read\nGB"]
    is_sparse = any(row["prompt_pairs_share"] < 1 for row in document["rows"])
    headings += ["pairs\n%"] * is_sparse
    is_offloaded = any(row["host_memory"] for row in document["rows"])
    if is_offloaded:
        headings += ["host\nGB", "link\nGB"]
    headings += ["sent\nGB"] * (document["mesh"] is not None)
    for name, device in document["devices"].items():
        headings.append(f"{name}\n{device['memory'] / 1e9:.1f}")
    specs, shared = terminal.shared_options([row["method"] for row in document["rows"]])
    cells = []
    for spec, row in zip(specs, document["rows"], strict=True):
        temporaries = (
            row["prompt_temporaries_estimate"],
            row["decode_temporaries_estimate"],
        )
        cells.append(
            [
                spec,
                planning.gigabytes(row["prompt_state"]),
                planning.gigabytes(row["decode_state"]),
                planning.gigabytes(max(temporaries)),
                planning.gigabytes(row["peak"]),
                planning.gigabytes(sum(row["read_per_step"].values())),
                *[f"{100 * row['prompt_pairs_share']:.0f}"] * is_sparse,
                *(
                    planning.gigabytes(row[key])
                    for key in ("host_memory", "link_per_step_at_most")
                    if is_offloaded
                ),
                *(
                    planning.gigabytes(row["sent_per_step"])
                    for _ in [document["mesh"]]
                    if document["mesh"] is not None
                ),
                *(
                    _rate(at["most_tokens_per_second"]) if at["fits"] else "-"
                    for at in row["devices"].values()
                ),
            ]
        )
    if shared:
        terminal.say(shared)
        print()
    terminal.show(headings, cells)
    print()
    for line in _notes(document):
        terminal.say(line)


def _notes(document) -> list[str]:
    rows = "1 row" if document["batch"] == 1 else f"{document['batch']} rows"
    generated = f"{document['new_tokens']:,} of them generated. GB are 1e9 bytes."
    packed, dtype = document["weights_dtype"], document["dtype"]
    kept = f"{packed}, the rest {dtype}" if packed else dtype
    lines = [
        f"Weights {planning.gigabytes(document['weights'])} GB ({kept}); "
        f"{rows} of {document['context']:,} tokens, {generated}",
        "prompt, decode: states while the prompt is read and while tokens are "
        "generated. temp.: an estimate. peak: with weights and temporaries. read: of "
        "all rows, by one step. Devices: the most tokens a second that these bytes "
        "allow, arithmetic not counted; - where the peak does not leave "
        f"{100 * document['margin']:g}% of the memory free, for fragments and what no "
        "estimate has.",
    ]
    if any(row["prompt_pairs_share"] < 1 for row in document["rows"]):
        lines.append(
            "pairs: of the query-key pairs of a prompt, those that are attended to."
        )
    if any(row["host_memory"] for row in document["rows"]):
        lines.append(
            "host: states in the host's memory. link: read from there by one step "
            f"at most, at {document['link_gbps']:g} GB/s (--link-gbps) before the "
            "step goes on: the rates are those of steps that find nothing on the "
            "device."
        )
    if document["mesh"] is not None:
        lines.append(
            f"Each device of {document['mesh']}: bytes are its own, rates those of all "
            "together. sent: by it to the others in a step, whose time is not counted."
        )
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
            over = least["peak"] - planning.room(
                planning.Device(**device), document["margin"]
            )
            lines.append(
                f"{name}: none fits; {least['method']} comes nearest, "
                f"{planning.gigabytes(over)} GB too much."
            )
    return lines
