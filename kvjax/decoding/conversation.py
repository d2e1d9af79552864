"""Conversations: the turns of a chat, kept as a prefix that holds what was said so far.

The tokens of a prefix are at any time those of the model's chat template for the whole
conversation, not of the turns put behind each other: where the template writes earlier
turns differently once there are later ones, they are read anew.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax import accounting
from kvjax.decoding import saved_prompt
from kvjax.interface import LanguageModel, Method
from kvjax.registry import as_method

Message = Mapping[str, str]

ROOM = 2048  # tokens behind the first turn, where nobody says and the context has them


class Read(NamedTuple):
    """A conversation in the caches."""

    prefix: saved_prompt.Prefix
    new_tokens: int  # of them, what was read for it just now
    anew: bool  # all of them, though some had been read before


def tokens(tokenizer: Any, messages: Sequence[Message], *, reply: bool) -> list[int]:
    """Returns token ids of a conversation; with `reply`, up to where that begins.

    Raises:
        ValueError: if the tokenizer has no chat template, or it refuses the messages.
    """
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=reply))


def closing(tokenizer: Any, messages: Sequence[Message]) -> int:
    """Returns how many tokens the template puts around a reply, about."""
    whole = tokens(tokenizer, [*messages, _reply("x")], reply=False)
    return max(len(whole) - len(tokens(tokenizer, messages, reply=True)), 0)


def read(
    model: LanguageModel,
    method: Method | str,
    messages: Sequence[Message],
    *,
    room: int | None = None,
    chunk_size: int = 512,
) -> Read:
    """Reads a conversation whose last turn is the user's, up to the reply.

    Args:
        room: tokens of what follows, replies and later turns; `ROOM` if the model's
            context has them, where nobody says.
    """
    ids = tokens(model.tokenizer, messages, reply=True)
    if room is None:
        room = _room(model, len(ids))
    found = saved_prompt.read(model, method, [ids], room=room, chunk_size=chunk_size)
    return Read(found, len(ids), False)


def go_on(
    model: LanguageModel,
    method: Method | str,
    before: saved_prompt.Prefix,
    messages: Sequence[Message],
    *,
    reply: bool = True,
    room: int | None = None,
    chunk_size: int = 512,
) -> Read:
    """Returns a prefix with the tokens of a longer conversation; `before` is used up.

    Args:
        before: what the conversation was, earlier.
        reply: up to where the assistant's next turn begins.
        room: read all of it anew, with room for so many more.

    Raises:
        ValueError: if there is no room; the message says how to get more.
    """
    method = as_method(method)
    ids = tokens(model.tokenizer, messages, reply=reply)
    (old,) = before.prompts
    is_static = model.decoder.rope.static_until == math.inf
    fits = tuple(ids[: len(old)]) == old and is_static
    if room is None and not (fits and len(ids) == len(old)):
        check_room(model, method, before, 1, behind=len(ids))
    if fits and room is None:
        more = ids[len(old) :]
        found = saved_prompt.extend(
            model, method, before, [more], chunk_size=chunk_size
        )
        return Read(found, len(more), False)
    if room is None:
        left = saved_prompt.tokens_left(model, method, before)
        longer = _longer(model, method, len(ids) - len(old))
        room = before.room if left is None else left - longer
    found = saved_prompt.read(model, method, [ids], room=room, chunk_size=chunk_size)
    return Read(found, len(ids), True)


def check_room(
    model: LanguageModel,
    method: Method | str,
    found: saved_prompt.Prefix,
    new_tokens: int,
    *,
    behind: int | None = None,
) -> None:
    """Raises ValueError unless so many tokens may follow; it says how to get more.

    Args:
        behind: tokens of the conversation that they follow; all that `found` holds, if
            left out.
    """
    held = len(found.prompts[0])
    behind = held if behind is None else behind
    left = saved_prompt.tokens_left(model, method, found)
    wanted = _longer(model, method, behind - held) + new_tokens
    if left is None or wanted <= left:
        return
    # What is read anew has its room behind the conversation as it is then.
    room, context = max(_room(model, behind), new_tokens), model.decoder.context
    remedy = (
        f"give --room {room}, with --resume and --save to read it anew and keep it so "
        f"(room={room} in Python)."
    )
    if behind + room > context:
        remedy = (
            f"the model's context of {context} ends there: ask for fewer tokens, or "
            "begin another one."
        )
    raise ValueError(
        f"the conversation has room for {left} tokens more and {wanted} are wanted: "
        + remedy
    )


def _longer(model: LanguageModel, method: Method | str, tokens: int) -> int:
    """Returns what reading so many tokens takes of the room behind a conversation."""
    takes_none = accounting.reads_any_length(as_method(method), model.decoder)
    return 0 if takes_none else tokens


def _room(model: LanguageModel, held: int) -> int:
    """Returns the room behind so many tokens, where nobody says."""
    return max(min(ROOM, model.decoder.context - held), 1)


def copied(found: saved_prompt.Prefix) -> saved_prompt.Prefix:
    """Returns a copy: generating uses a prefix up, and the reply is read behind it."""
    return found._replace(states=jax.tree.map(jnp.copy, found.states))


def with_reply(messages: Sequence[Message], text: str) -> list[Message]:
    """Returns the messages with the assistant's turn behind them."""
    return [*messages, _reply(text)]


def _reply(text: str) -> Message:
    return {"role": "assistant", "content": text}
