"""`kvjax convert`: a GGUF file, or a model with an adapter, as a checkpoint folder."""

import json
import pathlib
from typing import Annotated

import typer

from kvjax.cli.options import AdapterOption, JsonOption, model_name, print_notes
from kvjax.report import table


def convert(
    file: Annotated[
        pathlib.Path, typer.Argument(help="A GGUF file; with --adapter any model.")
    ],
    folder: Annotated[pathlib.Path, typer.Argument(help="Folder to make for it.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the weights; if left out the file's, or float32 if quantized."
        ),
    ] = None,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Writes a GGUF file as a Hugging Face folder, its weights dequantized.

    With --adapter, any model, with the adapter merged into its weights.
    """
    import models

    if adapter is None and not models.gguf.is_gguf(file):
        raise ValueError(
            f"{file}: only a GGUF file is converted, one that ends in .gguf; a folder "
            "in the Hugging Face layout needs no conversion."
        )
    models.check_new(folder)
    name = file if adapter is None else model_name(str(file))
    model = models.load(name, dtype=dtype, adapter=adapter)
    print_notes(model.decoder)
    models.save_pretrained(model, folder)
    document = {
        "folder": str(folder),
        "model": model.name,
        "dtype": str(model.decoder.cache_spec(1, 1).dtype),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*")),
    }
    if as_json:
        print(json.dumps(document, indent=2))
        return
    print(
        f"{folder}: {model.name} in the Hugging Face layout, {document['dtype']}, "
        f"{table.format_bytes(document['bytes'])}"
    )
