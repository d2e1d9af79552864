"""`kvjax heads`: what every attention head of a model does, as a picture."""

import json
import pathlib
from typing import Annotated

import typer

from kvjax import files
from kvjax.cli.options import (
    ContextOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    TextOption,
    given_text,
    load,
    positive,
)
from kvjax.cli.progress import show_progress

KINDS = (".png", ".svg", ".pdf")


def heads(
    model: ModelOption = None,
    context: ContextOption = 512,
    windows: Annotated[int, typer.Option(help="Windows of the text.")] = 4,
    n: Annotated[int, typer.Option(help="Prompts with a pass key.")] = 10,
    seed: SeedOption = 0,
    text: TextOption = None,
    out: Annotated[
        pathlib.Path, typer.Option(help="File for the figure: png, svg or pdf.")
    ] = pathlib.Path("heads.png"),
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shows what every attention head does: sinks, entropy, support, retrieval."""
    from kvjax.evaluation import heads as seen
    from kvjax.report.figures import heads as figures_heads

    positive(context=context, windows=windows, n=n)
    if out.suffix not in KINDS:
        raise ValueError(f"--out {out} must end in one of {', '.join(KINDS)}.")
    files.check_writable(out.parent)
    content, text_name = given_text(text, model)
    language_model = load(model, dtype)
    with show_progress() as progress:
        result = seen.inspect(
            language_model,
            content,
            context=context,
            windows=windows,
            prompts=n,
            seed=seed,
            text_name=text_name,
            progress=lambda fraction: progress("heads", fraction),
        )
    figures_heads.figure(result, out)
    if as_json:
        document = {"figure": str(out), "seed": seed, **seen.as_dict(result)}
        print(json.dumps(files.json_ready(document), indent=2))
        return
    print("\n".join([*seen.summary(result), f"wrote {out}"]))
