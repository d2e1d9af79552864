"""`kvjax plan --train`: the memory of training steps, as the compiler has it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.cli import train
from kvjax.cli.options import print_notes
from kvjax.cost import planning
from kvjax.report import terminal


def plan_training(
    source: str,
    changes: Sequence[str],
    *,
    devices: Mapping[str, planning.Device],
    margin: float,
    as_json: bool,
) -> None:
    """Prints the memory of every shape of step that a config has.

    Args:
        source: YAML file or preset.
        changes: `key=value` of the config.
        devices: what it may fit, by name.
        margin: share of a device's memory that must stay free.
    """
    config_files = train.require("config_files")
    memory = train.require("memory")
    settings = config_files.load(source, changes)
    decoder = train.decoder_of(settings)
    print_notes(getattr(decoder, "decoder", decoder))  # without adapters beside it
    shapes = memory.step_memory(decoder, settings)
    document = _document(source, settings, shapes, devices, margin)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        _print(document)


def _document(source, settings, shapes, devices, margin) -> dict[str, Any]:
    import jax

    return {
        "train": source,
        "compute": settings.precision.compute,
        "remat": settings.remat,
        "accumulate": settings.optimizer.accumulate,
        "mesh": settings.mesh.model_dump(),
        "compiled_for": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "margin": margin,
        "devices": {name: device._asdict() for name, device in devices.items()},
        "rows": [
            shape._asdict()
            | {
                "peak": shape.peak,
                "fits": {
                    name: shape.peak <= planning.room(device, margin)
                    for name, device in devices.items()
                },
            }
            for shape in shapes
        ],
    }


def _held(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns what is there before a step."""
    is_beside = any(row["frozen"] for row in document["rows"])
    return ("state", "frozen", "batch") if is_beside else ("state", "batch")


def _print(document: Mapping[str, Any]) -> None:
    headings = ["rows x targets", *(f"{part}\nGB" for part in _held(document))]
    headings += ["temp.\nGB", "peak\nGB"]
    for name, device in document["devices"].items():
        headings.append(f"{name}\n{device['memory'] / 1e9:.1f}")
    cells = [
        [
            f"{row['rows']} x {row['length']:,}{' packed' if row['packed'] else ''}",
            *(planning.gigabytes(row[part]) for part in _held(document)),
            *(planning.gigabytes(row[part]) for part in ("temporaries", "peak")),
            *("yes" if fits else "-" for fits in row["fits"].values()),
        ]
        for row in document["rows"]
    ]
    terminal.show(headings, cells)
    print()
    mesh = document["mesh"]
    frozen = "frozen: those beside them. " * ("frozen" in _held(document))
    terminal.say(
        f"A step of {document['train']} on one of {mesh['data'] * mesh['fsdp']} "
        f"device(s), {document['compute']}, remat {str(document['remat']).lower()}, in "
        f"{document['accumulate']} part(s), as XLA allots it for "
        f"{document['compiled_for']} ({document['backend']}); GB are 1e9 bytes. state: "
        f"weights, their average and the optimizer's. {frozen}temp.: gradients and "
        "what the backward pass keeps. Devices: - where the peak does not leave "
        f"{100 * document['margin']:g}% of the memory free."
    )
    if document["backend"] == "cpu":
        terminal.say(
            "XLA for a CPU keeps bfloat16 in float32 and gives up little of what remat "
            "would: an accelerator's peak is lower where either is on. Run this where "
            "it will train for its own figures."
        )
