"""`kvjax prefill`, and what `kvjax generate --resume` does: a prompt read only once."""

import json
import pathlib
import time
from collections.abc import Generator
from typing import Annotated, Any

import typer

import kvjax
from kvjax import registry, report
from kvjax.cli.common import (
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelOption,
    load,
    read_prompt,
    tokenize,
)

SaveOption = Annotated[
    pathlib.Path, typer.Option("--save", help="Folder to make for the prefix.")
]


def prefill(
    save: SaveOption,
    model: ModelOption = None,
    method: MethodOption = "full",
    prompt: Annotated[str | None, typer.Option(help="The text to read.")] = None,
    prompt_file: Annotated[
        pathlib.Path | None, typer.Option(help="UTF-8 file with the text; - is stdin.")
    ] = None,
    room: Annotated[
        int, typer.Option(help="Tokens that may follow, generated or of a prompt.")
    ] = 128,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template.")] = False,
    chunk_size: Annotated[int, typer.Option(help="Prompt tokens at once.")] = 512,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Reads a prompt and keeps the state on disk, for `generate --resume`."""
    prefix = _library()
    parsed = registry.parse(method)
    text = read_prompt(prompt, prompt_file)
    prefix.check_new(save)
    language_model = load(model, dtype)
    tokens = tokenize(language_model, text, chat)
    start = time.perf_counter()
    read = prefix.read(
        language_model, parsed, [tokens], room=room, chunk_size=chunk_size
    )
    name = registry.canonical(method)
    prefix.save(save, language_model, read, method_name=name)
    document = {
        "folder": str(save),
        "model": language_model.name,
        "method": name,
        "prompt_tokens": len(tokens),
        "room": room,
        "bytes": sum(f.stat().st_size for f in save.rglob("*") if f.is_file()),
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print(json.dumps(document, indent=2))
        return
    print(
        f"{save}: {len(tokens):,} tokens read by {language_model.name} under {name}, "
        f"{report.format_bytes(document['bytes'])}; room for {room:,} more"
    )


def resumed(
    folder: pathlib.Path,
    model: str | None,
    method: str | None,
    dtype: str | None,
    more: str | None,
    chunk_size: int,
    options: dict[str, Any],
) -> tuple[kvjax.LanguageModel, str, int, Generator]:
    """What goes on from the prefix in `folder`, after more of the prompt if there is.

    Model, method or dtype of None are as the folder says; `options` are those of
    :func:`kvjax.prefix.stream`, whose generator comes last. Before it the model, the
    method's name and the tokens of the prompt.
    """
    prefix = _library()
    saved = prefix.about(folder)
    name = saved["method"]
    # Both spelled by this version: an option that it added changes no older prefix.
    if method is not None and registry.canonical(method) != registry.canonical(name):
        name = registry.canonical(method)
    parsed = registry.parse(name)
    if len(saved["prompt_tokens"]) != 1:
        raise ValueError(
            f"{folder} holds {len(saved['prompt_tokens'])} prompts and the command "
            "line goes on with one: use kvjax.prefix.generate."
        )
    language_model = load(
        saved["model"] if model is None else model,
        saved["dtype"] if dtype is None else dtype,
    )
    restored = prefix.restore(folder, language_model, parsed, method_name=name)
    if more is not None:
        # A text that goes on has no beginning of its own (BOS).
        begin = len(language_model.tokenizer.encode(""))
        tokens = tokenize(language_model, more)[begin:]
        restored = prefix.extend(
            language_model, parsed, restored, [tokens], chunk_size=chunk_size
        )
    events = prefix.stream(language_model, parsed, restored, **options)
    return language_model, name, len(restored.prompts[0]), events


def _library():
    try:
        from kvjax import prefix
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "orbax":
            raise
        raise ImportError(
            "a prefix on disk needs orbax: pip install 'kvjax[train]'."
        ) from error
    return prefix
