"""`kvjax generate --chat` with `--save` or `--resume`: a conversation, turn by turn."""

import contextlib
import functools
import pathlib
import sys

from kvjax import files, registry
from kvjax.cli.methods import answering, check_room, for_model
from kvjax.cli.options import load, opening
from kvjax.cli.prefix import Options, Turn, library, restored


def begun(
    save: pathlib.Path,
    *,
    model: str | None,
    method: str | None,
    dtype: str | None,
    text: str,
    chunk_size: int,
    options: Options,
    system: str | None,
    room: int | None,
) -> Turn:
    """The first turn of a conversation, which is kept in the folder `save`."""
    library().check_new(save)
    from kvjax.decoding import conversation

    name = registry.canonical("full" if method is None else method)
    parsed = answering(name)
    messages = opening(text, system)
    check_room(room, parsed, model, dtype)
    language_model = load(model, dtype)
    name = for_model(name, language_model.decoder)
    parsed = registry.parse(name)
    chosen = options(language_model)
    read = conversation.read(
        language_model, parsed, messages, room=room, chunk_size=chunk_size
    )
    return _turn(language_model, name, read.prefix, messages, save, chosen, chunk_size)


def gone_on(
    folder: pathlib.Path,
    save: pathlib.Path | None,
    *,
    model: str | None,
    method: str | None,
    dtype: str | None,
    text: str | None,
    chunk_size: int,
    options: Options,
    room: int | None,
) -> Turn:
    """The next turn of the conversation in `folder`, kept in `save` if there is one."""
    prefix = library()
    replace = save is not None and save.resolve() == folder.resolve()
    if save is not None and not replace:
        prefix.check_new(save)
    if replace:
        files.check_place(folder)
    saved = prefix.about(folder)
    messages = _messages(folder, saved.get("messages"), text)
    from kvjax.decoding import conversation

    # How many tokens earlier turns take now, the template says when they are read.
    with contextlib.suppress(FileNotFoundError):  # `restored` says more of it
        check_room(
            room,
            registry.parse(saved["method"]),
            saved["model"] if model is None else model,
            saved["dtype"] if dtype is None else dtype,
        )

    earlier = restored(folder, model, method, dtype)
    chosen = options(earlier.model)
    read = conversation.go_on(
        earlier.model,
        earlier.method,
        earlier.prefix,
        messages,
        room=room,
        chunk_size=chunk_size,
    )
    if read.anew and room is None:
        print(
            "kvjax: note: the chat template writes earlier turns differently now: all "
            f"{read.new_tokens:,} tokens were read again.",
            file=sys.stderr,
        )
    return _turn(
        earlier.model,
        earlier.name,
        read.prefix,
        messages,
        save,
        chosen,
        chunk_size,
        replace=replace,
    )


def _messages(folder, before, text):
    """The messages in a folder, and the user's next turn."""
    if not before:
        raise ValueError(
            f"{folder} holds no conversation: begin one with --chat --save, or give "
            "--chat to kvjax prefill."
        )
    waits = before[-1]["role"] == "user"
    if waits and text is not None:
        raise ValueError(
            f"the conversation in {folder} waits for a reply: leave --prompt out."
        )
    if not waits and text is None:
        raise ValueError(
            f"the conversation in {folder} ends with a reply: give --prompt the next "
            "turn."
        )
    return before if waits else [*before, {"role": "user", "content": text}]


def _turn(
    model, name, read, messages, save, options, chunk_size, *, replace=False
) -> Turn:
    from kvjax.decoding import conversation

    prefix, method = library(), registry.parse(name)
    closing = conversation.closing(model.tokenizer, messages) if save else 0
    left = prefix.tokens_left(model, method, read)
    if options["max_new_tokens"] is None:
        most = prefix.NEW_TOKENS
        if left is not None:
            most = max(min(most, left - closing), 1)
        options["max_new_tokens"] = most
    # The reply is read behind the turn, as the template writes it.
    new_tokens = options["max_new_tokens"] + closing
    conversation.check_room(model, method, read, new_tokens)
    keep = None
    if save is not None:
        keep = functools.partial(
            _keep,
            save,
            model,
            (name, method),
            conversation.copied(read),
            messages,
            chunk_size,
            replace,
        )
    events = prefix.stream(model, method, read, **options)
    return Turn(model, name, len(read.prompts[0]), events, options, keep)


def _keep(save, model, named, kept, messages, chunk_size, replace, generation) -> None:
    """Writes the conversation to the folder `save`, with the reply in it."""
    from kvjax.decoding import conversation

    name, method = named
    replied = conversation.with_reply(messages, generation.text)
    whole = conversation.go_on(
        model,
        method,
        kept,
        replied,
        reply=False,
        chunk_size=chunk_size,
    )
    library().save(
        save,
        model,
        whole.prefix,
        replace=replace,
        method_name=name,
        messages=replied,
    )
