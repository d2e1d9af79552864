"""`kvjax prefill`, and what `kvjax generate --resume` does: a prompt read only once."""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import typer

import kvjax
from kvjax import files, registry
from kvjax.cli.methods import answering, check_room, for_model
from kvjax.cli.options import (
    ChatOption,
    ChunkOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelOption,
    SystemOption,
    checked_dtype,
    first_messages,
    load,
    load_decoder,
    merged,
    packing,
    positive,
    read_prompt,
    tokenize,
)
from kvjax.report import table
from kvjax.text import encoding

ROOM = 128  # tokens behind a prompt, where nobody says

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
        int | None,
        typer.Option(
            help="Tokens that may follow, generated or of a prompt; 128 if left out, "
            "with --chat 2048 or what the model's context leaves."
        ),
    ] = None,
    finish: Annotated[
        bool,
        typer.Option(
            "--finish",
            help="End the prompt, and save what the method keeps of it: a prompt of "
            "generate --resume is then a question that comes afterwards.",
        ),
    ] = False,
    chat: ChatOption = False,
    system: SystemOption = None,
    chunk_size: ChunkOption = 512,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Reads a prompt and keeps the state on disk, for `generate --resume`."""
    prefix = library()
    parsed = answering(method)
    positive(chunk_size=chunk_size, **({} if room is None else {"room": room}))
    if finish and chat:
        raise ValueError(
            "--finish ends what is read, and a conversation goes on: leave --chat out."
        )
    text = read_prompt(prompt, prompt_file)
    messages = first_messages(text, chat, system)
    prefix.check_new(save)
    check_room(room, parsed, model, dtype)
    language_model = load(model, dtype)
    method = for_model(method, language_model.decoder)
    parsed = registry.parse(method)
    start = time.perf_counter()
    if messages is None:
        tokens = tokenize(language_model, text)
        options = {"room": ROOM if room is None else room, "chunk_size": chunk_size}
        read = prefix.read(language_model, parsed, [tokens], **options)
        read = read if finish else prefix.seal(parsed, read)
    else:
        from kvjax.decoding import conversation

        read = conversation.read(
            language_model, parsed, messages, room=room, chunk_size=chunk_size
        ).prefix
    if finish:
        read = prefix.finish(language_model, parsed, read)
    prompt_tokens = len(read.prompts[0])
    name = registry.canonical(method)
    prefix.save(save, language_model, read, method_name=name, messages=messages)
    document = {
        "folder": str(save),
        "model": language_model.name,
        "method": name,
        "prompt_tokens": prompt_tokens,
        "room": read.room,
        "finished": read.is_finished,
        "bytes": sum(f.stat().st_size for f in save.rglob("*") if f.is_file()),
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print(json.dumps(document, indent=2))
        return
    print(
        f"{save}: {prompt_tokens:,} tokens read by {language_model.name} under {name}, "
        f"{table.format_bytes(document['bytes'])}{', finished' * finish}; "
        f"room for {read.room:,} more"
    )


class Restored(NamedTuple):
    """A prefix from a folder, and what it belongs to."""

    model: kvjax.LanguageModel
    name: str  # of the method
    method: kvjax.Method
    prefix: Any


class Turn(NamedTuple):
    """A generation that is about to begin."""

    model: kvjax.LanguageModel
    method: str
    prompt_tokens: int  # in the caches
    events: Iterator[tuple[int, str]]  # of `kvjax.decoding.generate.stream`
    options: dict[str, Any]  # of the generation
    keep: Callable[[Any], None] | None = None  # writes the state with the reply in it


# Gives the options of a generation by a model: `max_new_tokens`, `sampling` and so on.
Options = Callable[[kvjax.LanguageModel], dict[str, Any]]


def restored(
    folder: pathlib.Path, model: str | None, method: str | None, dtype: str | None
) -> Restored:
    """Reads the prefix in `folder`; model, method or dtype of None are as it says."""
    prefix = library()
    saved = prefix.about(folder)
    name = saved["method"]
    _check_same(folder, saved, model, method, dtype)
    parsed = answering(name)
    if len(saved["prompt_tokens"]) != 1:
        raise ValueError(
            f"{folder} holds {len(saved['prompt_tokens'])} prompts and the command "
            "line goes on with one: use kvjax.decoding.saved_prompt.generate."
        )
    dtype = saved["dtype"] if dtype is None else dtype
    language_model = (
        _model_of(folder, saved, dtype) if model is None else load(model, dtype)
    )
    found = prefix.restore(folder, language_model, parsed, method_name=name)
    return Restored(language_model, name, parsed, found)


def _check_same(folder, saved, model, method, dtype) -> None:
    """Raises ValueError for what a prefix cannot go on with, before that is loaded."""
    refusal = functools.partial(library().refusal, folder)
    # Both spelled by this version: an option that it added changes no older prefix.
    if method is not None:
        wanted = registry.canonical(method)
        if wanted != registry.canonical(saved["method"]):
            raise ValueError(refusal("method", saved, "", wanted))
    if dtype is not None and checked_dtype(dtype) != saved["dtype"]:
        raise ValueError(refusal("dtype", saved, "", dtype))
    # Folders of earlier versions do not say how the weights were kept.
    if (kept := saved.get("stored_as")) is not None:
        packed = _packing_of(kept)
        if packing.get() not in (None, packed):
            raise ValueError(
                f"{folder} was saved with {packed or 'float'} weights and cannot go on "
                f"with --weights {packing.get()}: leave it out."
            )
        packing.set(packed)
    if model is not None and files.located(model) != saved["model"]:
        decoder = load_decoder(model, saved["dtype"])
        if repr(decoder) != saved["decoder"]:
            raise ValueError(refusal("decoder", saved, model, ""))


def _packing_of(kept: list[str]) -> str | None:
    """Returns the `--weights` under which a model has matrices of these formats."""
    if any(name.startswith("stored ") for name in kept):
        return "stored"  # some of which may be rounded anew
    return next((name for name in ("int8", "int4") if name in kept), None)


def resumed(
    folder: pathlib.Path,
    *,
    model: str | None,
    method: str | None,
    dtype: str | None,
    text: str | None,
    chunk_size: int,
    options: Options,
) -> Turn:
    """Goes on from the prefix in `folder`, behind `text` if there is one."""
    prefix = library()
    if text is not None and prefix.about(folder).get("messages"):
        raise ValueError(
            f"{folder} holds a conversation, in which a text behind it is a turn: add "
            "--chat."
        )
    language_model, name, parsed, found = restored(folder, model, method, dtype)
    chosen = options(language_model)
    if found.is_finished:
        return _asked(language_model, name, parsed, found, text or "", chosen)
    if text is not None:
        tokens = encoding.following_tokens(
            language_model.tokenizer, text, after=found.prompts[0]
        )
        # Before they are read.
        new_tokens = len(tokens) + (chosen["max_new_tokens"] or 1)
        prefix.check_room(language_model, parsed, found, new_tokens)
        found = prefix.extend(
            language_model, parsed, found, [tokens], chunk_size=chunk_size
        )
    events = prefix.stream(language_model, parsed, found, **chosen)
    return Turn(language_model, name, len(found.prompts[0]), events, chosen)


def _asked(model, name, method, found, question, options) -> Turn:
    """Asks a question of a prompt that has ended, or goes on with it without one."""
    prefix = library()
    tokens = encoding.following_tokens(
        model.tokenizer, question, after=found.prompts[0]
    )
    events = prefix.stream_answers(model, method, found, [tokens], **options)
    return Turn(model, name, len(found.prompts[0]) + len(tokens), events, options)


def _model_of(folder, saved, dtype) -> kvjax.LanguageModel:
    import models

    name = saved["model"]
    # An adapter that is given takes the place of the one it was read with.
    given = name if merged.get() is None else str(models.split_name(name)[0])
    try:
        return load(given, dtype)
    except FileNotFoundError as error:
        if pathlib.Path(name).exists():
            raise  # it lacks something
        raise FileNotFoundError(
            f"{folder} was read by the model {name}, which is not there (any more): "
            "give --model where it is now."
        ) from error


def library():
    """Returns `kvjax.decoding.saved_prompt`.

    Raises:
        ImportError: saying what to install, without orbax.
    """
    try:
        from kvjax.decoding import saved_prompt
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "orbax":
            raise
        raise ImportError(
            "a prefix on disk needs orbax: pip install 'kvjax[train]'."
        ) from error
    return saved_prompt
