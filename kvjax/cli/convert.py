"""`kvjax convert`: a GGUF file as a checkpoint folder in the Hugging Face layout."""

import json
import pathlib
from typing import Annotated

import typer

from kvjax.cli.options import JsonOption, print_notes
from kvjax.report import table


def convert(
    file: Annotated[pathlib.Path, typer.Argument(help="A GGUF file.")],
    folder: Annotated[pathlib.Path, typer.Argument(help="Folder to make for it.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the weights; if left out the file's, or float32 if quantized."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Writes a GGUF file as a Hugging Face folder, its weights dequantized."""
    import models

    if not models.gguf.is_gguf(file):
        raise ValueError(
            f"{file}: only a GGUF file is converted, one that ends in .gguf; a folder "
            "in the Hugging Face layout needs no conversion."
        )
    models.check_new(folder)
    model = models.load(file, dtype=dtype)
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
