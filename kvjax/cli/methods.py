"""Methods that commands are given: what to know of their answers, and their room."""

import sys
from collections.abc import Iterable

import kvjax
from kvjax import registry
from kvjax.cli.options import load_decoder


def answering(spec: str) -> kvjax.Method:
    """Returns the method of a spec that is to answer; prints what to know of that."""
    print_method_notes([spec])
    return registry.parse(spec)


def print_method_notes(methods: Iterable[str]) -> None:
    """Prints what a user must know of answers under methods to stderr, once."""
    notes = [note for spec in methods for note in registry.notes(spec)]
    for note in dict.fromkeys(notes):
        print(f"kvjax: note: {note}", file=sys.stderr)


def check_room(
    room: int | None,
    method: kvjax.Method,
    model: str | None,
    dtype: str | None,
) -> None:
    """Raises ValueError for a room that no model of this size has, before it loads."""
    from kvjax import accounting

    if room is None:
        return
    decoder = load_decoder(model, dtype)
    is_bound = not accounting.reads_any_length(method, decoder)
    if 1 + room > decoder.context and is_bound:
        raise ValueError(
            f"--room {room} exceeds what the model's context of {decoder.context} "
            "leaves behind 1 token: lower it."
        )
