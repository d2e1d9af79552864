"""Options that are one of a few words, and the one message for any other."""

import typing
from typing import Any


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises ValueError unless `value` is one of the `Literal` type `choices`."""
    known = typing.get_args(choices)
    if not any(type(value) is type(word) and value == word for word in known):
        words = ", ".join(str(word) for word in known)
        raise ValueError(f"{name}={value!r} must be one of {words}.")


def check_choices(options: object) -> None:
    """Checks every field of a dataclass whose type is a `Literal`.

    Raises:
        ValueError: naming the first field that holds none of its words.
    """
    for name, kind in typing.get_type_hints(type(options)).items():
        if typing.get_origin(kind) is typing.Literal:
            check_choice(name, getattr(options, name), kind)
