"""Methods that commands are given: what to know of their answers, and their room."""

import contextlib
import sys
from collections.abc import Iterable

import kvjax
from kvjax import copies, registry
from kvjax.cli.options import load_decoder
from kvjax.registry import specs


def answering(spec: str) -> kvjax.Method:
    """Returns the method of a spec that is to answer; prints what to know of that."""
    print_method_notes([spec])
    return registry.parse(spec)


def for_model(spec: str, decoder: kvjax.DecoderLM) -> str:
    """Returns the spec, behind `phd+` if the model feeds copies of a token."""
    if copies.of(decoder) is None or "phd" in specs.names(spec):
        return spec
    return f"phd+{spec}"


def names_for(decoder: kvjax.DecoderLM) -> list[str]:
    """Returns every method that the model can be decoded under."""
    from kvjax import accounting

    names = registry.names(decoder.alpha)
    if copies.of(decoder) is None:
        return list(names)
    found, sizes = [], decoder.cache_spec(1, 64)
    for name in names:
        spec = for_model(name, decoder)
        with contextlib.suppress(ValueError):  # not all go into a transform
            accounting.prompt_bytes(registry.parse(spec), sizes)
            found.append(spec)
    return found


def fitting(spec: str, decoder: kvjax.DecoderLM) -> kvjax.Method:
    """Returns the method of a spec for a model, as :func:`for_model` has it."""
    return registry.parse(for_model(spec, decoder))


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
