"""Prompts read once and gone on with many times: kept on disk, bit for bit.

A prefix is the state of every layer before `finish`, so that more of the prompt may
still come; or behind it, smaller if the method evicts: then questions come, appended
as generated tokens are. On disk it is complete or absent, and says what it belongs to:
another model, method or dtype is refused. Needs orbax: `pip install 'kvjax[train]'`.
"""

import itertools
import json
import math
import pathlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Float

from kvjax import accounting, files
from kvjax.decoding import asking, reader, timing
from kvjax.decoding.checks import (
    check_counts,
    check_model,
    check_prompts,
    check_reach,
    check_reread,
    check_text,
    check_vocabulary,
    rows_of,
    token_ids,
    token_rows,
)
from kvjax.decoding.finite import not_finite
from kvjax.decoding.generate import Generation, go_on
from kvjax.decoding.options import Options
from kvjax.decoding.prefix_file import ABOUT as ABOUT
from kvjax.decoding.prefix_file import about as about
from kvjax.decoding.prefix_file import check_new as check_new
from kvjax.decoding.prefix_file import (
    document,
    identity,
    is_conversation,
    sealed,
)
from kvjax.decoding.prefix_file import is_finished as says_finished
from kvjax.decoding.prefix_file import refusal as refusal
from kvjax.decoding.reader import Reading
from kvjax.decoding.sampling import mentioned
from kvjax.files import arrays as file_arrays
from kvjax.interface import LanguageModel, Method, State
from kvjax.registry import as_method
from kvjax.text import encoding

ARRAYS = "arrays"
NEW_TOKENS = 128  # where nothing else bounds them
# On a file that is missing, cut or not its own, orbax raises what comes.
_READ = Exception


class Prefix(NamedTuple):
    """The prompts that a model has read under a method; made by :func:`read`."""

    states: tuple[State, ...]  # one a layer
    hidden: Float[Array, "B E"]  # of each row's last token
    prompts: tuple[tuple[int, ...], ...]  # token ids, every row's
    longest: int  # tokens of the longest prompt when the buffers were made
    room: int  # tokens that the buffers have room for beside it
    is_finished: bool = False  # `finish` was applied: no more of the prompts is read
    sealed: tuple[int, ...] = ()  # tokens of each prompt when :func:`seal` was applied


def read(
    model: LanguageModel,
    method: Method | str,
    prompts: Sequence[str | Sequence[int]],
    *,
    room: int = 128,
    chunk_size: int = 512,
) -> Prefix:
    """Reads prompts, as :func:`kvjax.decoding.generate.generate` does before its first
    token; under a method that selects by a question, `citrus`, without knowing one.

    Args:
        prompts: texts, or token ids; of any lengths.
        room: tokens that may follow: what :func:`extend` adds and what is generated.
            `generate` goes on bit for bit as it would by itself with
            `max_new_tokens=room`, and without a question.
        chunk_size: most prompt tokens processed at once; a second reading takes the
            method's own `chunk`.

    Raises:
        ValueError: as :func:`kvjax.decoding.generate.generate`.
    """
    method = as_method(method)
    check_model(model, on_one_device="a saved prompt")
    check_counts(room=room)
    options = Options(max_new_tokens=room, chunk_size=chunk_size)
    prompts = token_rows(prompts, model.tokenizer)
    check_prompts(model, method, prompts, options.max_new_tokens, named="room")
    longest = max(map(len, prompts))
    begun = reader.begin(model.decoder, method, len(prompts), longest, room)
    states, hidden = _read(model, method, begun, prompts, options, ())
    return Prefix(states, hidden, tuple(map(tuple, prompts)), longest, int(room))


def _read(model, method, reading, pieces, options: Options, before) -> Reading:
    with timing.stretch("prompt") as part:
        how = {"granule": method.hooks.granule, "begun": [len(row) for row in before]}
        parts = reader.chunks(model.decoder, pieces, options.chunk_size, **how)
        reading = reader.read(model, method, reading, parts)
        part.tokens = sum(map(len, pieces))
    if not bool(jnp.isfinite(reading.hidden).all()):
        raise not_finite(model.decoder, "after the prompt")
    return reading


def finish(model: LanguageModel, method: Method | str, prefix: Prefix) -> Prefix:
    """Ends the prompts: the method chooses what to keep, and nothing else is held.

    As `finish` does before the first token is generated, once for all that is asked
    afterwards; `prefix` is used up. What comes behind is appended: see :func:`ask`.
    """
    if prefix.is_finished:
        return prefix
    check_model(model, on_one_device="a saved prompt")
    reading = Reading(prefix.states, prefix.hidden)
    finished = reader.finish(model, as_method(method), reading, prefix.prompts)
    return prefix._replace(states=finished.states, is_finished=True)


def seal(method: Method | str, prefix: Prefix) -> Prefix:
    """Makes once, for all that follows, what the method can make of these prompts.

    Of `squeezed` the clusters: what :func:`extend` reads, and what is generated, then
    stays outside of them. `prefix` is used up, unless there is nothing to make.
    """
    method = as_method(method)
    if prefix.is_finished or prefix.sealed or method.hooks.seal is None:
        return prefix
    states = reader.seal_layers(method, prefix.states)
    return prefix._replace(states=states, sealed=tuple(map(len, prefix.prompts)))


def extend(
    model: LanguageModel,
    method: Method | str,
    prefix: Prefix,
    more: Sequence[str | Sequence[int]],
    *,
    chunk_size: int = 512,
) -> Prefix:
    """Reads more of each prompt, for example a question about a text read before.

    As if the prompts had been longer; `prefix` is used up. No method is told that it is
    a question: what selects by one, `citrus`, reads it as context.

    Args:
        more: of every row a text, or token ids; of any lengths, a row may have none.
            A text gets the tokens that it has in the whole prompt, unless the
            tokenizer joins it with the last token read: that one stays as it is.

    Raises:
        ValueError: if the number of rows differs, a token is unknown, there is no room,
            or the model's rope is `dynamic`: its keys depend on the whole prompt.
    """
    method = as_method(method)
    check_model(model, on_one_device="a saved prompt")
    options = Options(chunk_size=chunk_size)
    more = rows_of(more, "more")
    if len(more) != len(prefix.prompts):
        raise ValueError(
            f"more has {len(more)} rows and the prefix {len(prefix.prompts)}: give "
            "every row its own, if only an empty one."
        )
    more = [
        _following(model, old, new, f"row {row} of more")
        for row, (old, new) in enumerate(zip(prefix.prompts, more, strict=True))
    ]
    if not any(map(len, more)):
        return prefix
    if prefix.is_finished:
        raise ValueError(
            "the prompts have ended: what was left out is gone, and no more of them is "
            "read. Append it, with saved_prompt.ask."
        )
    if model.decoder.rope.static_until < math.inf:
        raise ValueError(
            "the model's rope is 'dynamic', which rotates all keys of a prompt at "
            "once: read the whole prompt anew."
        )
    check_vocabulary(model.decoder, more)
    prompts = tuple((*old, *new) for old, new in zip(prefix.prompts, more, strict=True))
    check_reread(model, method, map(len, prompts))
    before, after = (max(map(len, rows)) for rows in (prefix.prompts, prompts))
    longer = 0 if accounting.reads_any_length(method, model.decoder) else after - before
    if prefix.sealed:  # each row has room of its own
        longer = max(map(len, more))
    check_room(model, method, prefix, longer + 1)
    check_reach(method, model.decoder, after, prefix.room, named="room")
    begun = Reading(prefix.states, prefix.hidden)
    states, hidden = _read(model, method, begun, more, options, prefix.prompts)
    return prefix._replace(states=states, hidden=hidden, prompts=prompts)


def _following(model, old, new, name) -> list[int]:
    if not isinstance(new, str):
        return token_ids(new, name)
    check_text(new, name)
    return encoding.following_tokens(model.tokenizer, new, after=old)


def tokens_left(
    model: LanguageModel, method: Method | str, prefix: Prefix
) -> int | None:
    """Returns how many tokens may follow; None for a method of constant memory."""
    method, decoder = as_method(method), model.decoder
    if accounting.is_endless(method, decoder):
        return None  # what does not grow has room for everything
    if accounting.reads_any_length(method, decoder):
        return prefix.room  # taken by what is generated, whatever was read
    left = prefix.longest + prefix.room - max(map(len, prefix.prompts))
    pairs = zip(prefix.prompts, prefix.sealed, strict=False)
    return min([left, *(prefix.room - (len(row) - old) for row, old in pairs)])


def check_room(
    model: LanguageModel, method: Method | str, prefix: Prefix, new_tokens: int
) -> None:
    """Raises ValueError unless so many tokens may follow the longest prompt."""
    left = tokens_left(model, method, prefix)
    if left is not None and new_tokens > left:
        total = prefix.room + new_tokens - left
        raise ValueError(
            f"the prefix has room for {left} tokens more, of {prefix.room} beside the "
            f"{prefix.longest} of its longest prompt, and {new_tokens} are wanted: "
            f"read the prompt anew with room={total} or more (kvjax prefill --room)."
        )


def stream(
    model: LanguageModel,
    method: Method | str,
    prefix: Prefix,
    *,
    max_new_tokens: int | None = None,
    **options: Any,
) -> Generator[tuple[int, str], None, list[Generation]]:
    """Goes on from a prefix: yields `(row, new text)`.

    The prefix is used up, but for one that has ended (:func:`finish`): that is copied.

    The generator returns what :func:`generate` does; arguments are those of
    :func:`kvjax.decoding.generate.generate`, but for `max_new_tokens=None`: all there
    is room for, and 128 under a method of constant memory, which has room for any
    number.

    Raises:
        ValueError: if there is no room for `max_new_tokens`, or an option is out of its
            range.
    """
    if prefix.is_finished:
        nothing = [()] * len(prefix.prompts)
        options["max_new_tokens"] = max_new_tokens
        return stream_answers(model, method, prefix, nothing, **options)
    method = as_method(method)
    check_model(model, on_one_device="a saved prompt")
    if max_new_tokens is None:
        left = tokens_left(model, method, prefix)
        max_new_tokens = NEW_TOKENS if left is None else max(left, 1)
    wanted = Options(max_new_tokens=max_new_tokens, **options)
    check_room(model, method, prefix, wanted.max_new_tokens)
    with timing.stretch("prompt"):
        reading = Reading(prefix.states, prefix.hidden)
        prefilled = reader.ended(model, method, reading, prefix.prompts)
    seen = mentioned(prefix.prompts, model.decoder.vocab_size)
    return go_on(model, method, prefilled, wanted, seen)


def generate(
    model: LanguageModel, method: Method | str, prefix: Prefix, **options: Any
) -> list[Generation]:
    """Runs :func:`stream` to its end and returns a `Generation` a row."""
    return _drained(stream(model, method, prefix, **options))


def ask(
    model: LanguageModel,
    method: Method | str,
    prefix: Prefix,
    questions: Sequence[str | Sequence[int]],
    **options: Any,
) -> list[Generation]:
    """Asks questions of prompts that have ended, as often as wanted.

    The tokens of a question are appended as generated ones are, so that the method
    keeps or evicts them by the same rule; nothing of the prompts is read again.

    Args:
        prefix: from :func:`finish`; not used up, its rows are copied.
        questions: texts, or token ids, as `more` of :func:`extend`.
        **options: `rows`, of each question the prompt that it is asked of, without
            which question i is asked of prompt i; others of :func:`stream`.

    Returns:
        One `Generation` a question: what comes behind it.

    Raises:
        ValueError: if the prompts have not ended, there is no room for the longest
            question and `max_new_tokens`, or as
            :func:`kvjax.decoding.asking.stream`.
    """
    return _drained(stream_answers(model, method, prefix, questions, **options))


def stream_answers(
    model: LanguageModel,
    method: Method | str,
    prefix: Prefix,
    questions: Sequence[str | Sequence[int]],
    *,
    rows: Sequence[int] | None = None,
    max_new_tokens: int | None = None,
    **options: Any,
) -> Generator[tuple[int, str], None, list[Generation]]:
    """Yields `(question, new text)` while :func:`ask` decodes; returns what it does."""
    method = as_method(method)
    check_model(model, on_one_device="a saved prompt")
    if not prefix.is_finished:
        raise ValueError(
            "the prefix has not ended, and more of a prompt is read, not appended: use "
            "extend, or end it first with finish (kvjax prefill --finish)."
        )
    questions = rows_of(questions, "questions")
    rows = asking.chosen_rows(len(prefix.prompts), len(questions), rows)
    asked = [
        _following(model, prefix.prompts[row], question, f"question {index}")
        for index, (row, question) in enumerate(zip(rows, questions, strict=True))
    ]
    longest = max(map(len, asked))
    left = tokens_left(model, method, prefix)
    if max_new_tokens is None:
        max_new_tokens = NEW_TOKENS if left is None else max(left - longest, 1)
    check_counts(max_new_tokens=max_new_tokens)
    check_room(model, method, prefix, longest + max_new_tokens)
    prompts = [(*prefix.prompts[r], *new) for r, new in zip(rows, asked, strict=True)]
    sizes = len(prefix.prompts), prefix.longest, prefix.room
    specs = reader.layer_specs(model.decoder, *sizes)
    reading = Reading(prefix.states, prefix.hidden)
    return asking.stream(
        model,
        method,
        reader.ready(method, reading, prefix.prompts, specs),
        asked,
        rows=rows,
        max_new_tokens=max_new_tokens,
        seen=mentioned(prompts, model.decoder.vocab_size),
        **options,
    )


def _drained(events: Generator[Any, None, list[Generation]]) -> list[Generation]:
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def save(
    folder: str | pathlib.Path,
    model: LanguageModel,
    prefix: Prefix,
    *,
    method_name: str,
    messages: Sequence[Mapping[str, str]] | None = None,
    replace: bool = False,
) -> None:
    """Writes a prefix beside `folder` first and renames it when it is complete.

    Args:
        method_name: of the method it was read under, with all of its options, as
            :func:`kvjax.registry.canonical` spells them.
        messages: the conversation that the prompt is, if it is one; of one row.
        replace: a folder that is there is replaced once the new one is complete.

    Raises:
        FileExistsError: if `folder` exists and is not empty, unless it is replaced.
        OSError: if it cannot be written; nothing is left of it then.
        ValueError: if a message lacks the texts `role` and `content`.
    """
    folder = pathlib.Path(folder).resolve()
    if messages is not None and not is_conversation(messages):
        raise ValueError(f"{messages=} must be objects with texts role and content.")
    if not replace:
        check_new(folder)
    arrays = file_arrays.dense(_named(prefix))
    about = document(model, prefix, arrays, method_name, messages)
    file_arrays.quiet_orbax()
    try:
        with files.replacing(folder, full=replace) as partial:
            partial.mkdir()
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(partial / ARRAYS, arrays)
            files.write_text(partial / ABOUT, json.dumps(about, indent=2) + "\n")
    except file_arrays.WRITE as error:
        raise OSError(
            f"the prefix could not be written to {folder} ({files.reason(error)}), and "
            "nothing is left of it: make room, or give another folder."
        ) from error


def restore(
    folder: str | pathlib.Path,
    model: LanguageModel,
    method: Method | str,
    *,
    method_name: str,
) -> Prefix:
    """Restores the prefix in a folder, onto JAX's default device.

    Raises:
        FileNotFoundError: if there is none.
        checkpoint.DamagedError: if it is not bit for bit what was saved.
        ValueError: if it belongs to another model, method or dtype; names both.
    """
    method = as_method(method)
    folder = pathlib.Path(folder).resolve()
    found = about(folder)
    lengths, longest, room = found["prompt_tokens"], found["longest"], found["room"]
    for key, value in identity(model, method_name).items():
        if key != "model" and found[key] != value:
            raise ValueError(refusal(folder, key, found, model.name, value))
    is_finished, was_sealed = says_finished(found), sealed(found)

    sizes = len(lengths), longest, room
    shapes = reader.shapes_held(
        model.decoder, method, *sizes, is_finished, bool(was_sealed)
    )
    tokens = jax.ShapeDtypeStruct((sum(lengths),), jnp.int32)
    hidden = jax.eval_shape(lambda: reader.no_hidden(model.decoder, len(lengths)))
    like = _flat(shapes, hidden, tokens)
    if file_arrays.describe(like) != found["leaves"]:
        raise ValueError(
            f"{folder} was written by a kvjax whose {method_name} held other arrays: "
            "read the prompt anew."
        )
    sharding = jax.sharding.SingleDeviceSharding(jnp.zeros(()).devices().pop())
    like = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding or sharding
        )
        for name, leaf in like.items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(folder / ARRAYS, like)
    except _READ as error:
        reason = " ".join(str(error).split())[:200]
        raise file_arrays.DamagedError(
            f"{folder} is damaged ({type(error).__name__}: {reason})."
        ) from error
    read_back = [int(f) for f in file_arrays.fingerprints(arrays)]
    if read_back != found["fingerprints"]:
        raise file_arrays.DamagedError(
            f"{folder} is damaged: its arrays are not what was saved."
        )
    structure = jax.tree.structure(shapes)
    states = [arrays[name] for name in like if name.startswith("state")]
    ends = np.cumsum([0, *lengths])
    rows = np.asarray(arrays["tokens"]).tolist()
    prompts = tuple(tuple(rows[a:b]) for a, b in itertools.pairwise(ends))
    return Prefix(
        jax.tree.unflatten(structure, states),
        arrays["hidden"],
        prompts,
        longest,
        room,
        is_finished,
        was_sealed,
    )


def _named(prefix: Prefix) -> dict[str, jax.Array]:
    tokens = [token for prompt in prefix.prompts for token in prompt]
    return _flat(prefix.states, prefix.hidden, jnp.asarray(tokens, jnp.int32))


def _flat(states, hidden, tokens):
    # By number: a state's own tree has static parts that no file format knows.
    leaves = jax.tree.leaves(states)
    named = {f"state{index:05}": leaf for index, leaf in enumerate(leaves)}
    return {**named, "hidden": hidden, "tokens": tokens}
