"""The grammar of spec strings, as text: what names mean, the registry knows.

A spec is one or more parts with `+` between them, transforms first. A part is
``name``, ``name:option=value,...`` or, for a factory of no package that is known here,
``package.module:factory,option=value,...``.
"""


def parts(spec: str) -> list[str]:
    """Returns the parts of a spec, outermost first."""
    return [part.strip() for part in spec.split("+")]


def split(part: str) -> tuple[str, list[str]]:
    """Returns the name in a part of a spec, and its options as they are written.

    `quest:budget=64` has the name `quest`, and `my.module:mine,budget=64` the name
    `my.module:mine`.
    """
    name, _, text = part.partition(":")
    options = [option.strip() for option in text.split(",") if option.strip()]
    if options and "=" not in options[0]:
        return f"{name.strip()}:{options[0]}", options[1:]
    return name.strip(), options


def join(name: str, options: list[str]) -> str:
    """Returns the part of a spec that :func:`split` takes apart."""
    separator = "," if ":" in name else ":"
    return separator.join([name, ",".join(options)]) if options else name


def names(spec: str) -> list[str]:
    """Returns the name of every part of a spec, outermost first."""
    return [split(part)[0] for part in parts(spec)]
