"""Conversations: the turns of a chat, kept as a prefix that holds what was said so far.

The tokens of a prefix are at any time those of the model's chat template for the whole
conversation, not of the turns put behind each other: where the template writes earlier
turns differently once there are later ones, they are read anew.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax import prefix
from kvjax.interface import LanguageModel, Method, dynamic_rope

Message = Mapping[str, str]

ROOM = 2048  # tokens behind the first turn, where nobody says and the context has them


class Read(NamedTuple):
    """A conversation in the caches."""

    prefix: prefix.Prefix
    new_tokens: int  # of them, what was read for it just now
    anew: bool  # all of them, though some had been read before


def tokens(tokenizer: Any, messages: Sequence[Message], *, reply: bool) -> list[int]:
    """Token ids of a conversation; with `reply`, up to where the assistant's begins.

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
    method: Method,
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
        room = max(min(ROOM, model.decoder.context - len(ids)), 1)
    found = prefix.read(model, method, [ids], room=room, chunk_size=chunk_size)
    return Read(found, len(ids), False)


def go_on(
    model: LanguageModel,
    method: Method,
    before: prefix.Prefix,
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
    ids = tokens(model.tokenizer, messages, reply=reply)
    (old,) = before.prompts
    fits = tuple(ids[: len(old)]) == old and dynamic_rope(model.decoder) is None
    if fits and room is None:
        more = ids[len(old) :]
        found = prefix.extend(model, method, before, [more], chunk_size=chunk_size)
        return Read(found, len(more), False)
    if room is None:
        left = prefix.tokens_left(model, method, before)
        room = before.room if left is None else left + len(old) - len(ids)
        prefix.check_room(model, method, before, len(ids) + 1 - len(old))
    found = prefix.read(model, method, [ids], room=room, chunk_size=chunk_size)
    return Read(found, len(ids), True)


def copied(found: prefix.Prefix) -> prefix.Prefix:
    """Returns a copy: generating uses a prefix up, and the reply is read behind it."""
    return found._replace(states=jax.tree.map(jnp.copy, found.states))


def with_reply(messages: Sequence[Message], text: str) -> list[Message]:
    """Returns the messages with the assistant's turn behind them."""
    return [*messages, _reply(text)]


def _reply(text: str) -> Message:
    return {"role": "assistant", "content": text}
