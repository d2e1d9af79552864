"""Options of drafts, for commands that continue a prompt."""

import contextvars
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

from kvjax.cli.options import checked_dtype, model_name
from kvjax.report import table

TOKENS = 6  # of a draft, where nobody says


class Given(NamedTuple):
    """The options as they were given."""

    draft: str | None = None
    tokens: int | None = None
    model: str | None = None

    @property
    def first(self) -> str | None:
        """The first of them that was given, as it is typed."""
        names = {"--draft": self.draft, "--draft-model": self.model}
        names |= {"--draft-tokens": self.tokens}
        return next((name for name, value in names.items() if value is not None), None)


# Of the command that runs.
_given: contextvars.ContextVar[Given] = contextvars.ContextVar("drafts")

_OPTIONS = {
    "draft": Annotated[
        str | None,
        typer.Option(
            help="A method, or lookup, that drafts tokens for --method to check, "
            "several at once: the text is the same, sampled text in distribution."
        ),
    ],
    "draft_tokens": Annotated[
        int | None, typer.Option(help="Most tokens of a draft; 6 if left out.")
    ],
    "draft_model": Annotated[
        str | None,
        typer.Option(
            help="A smaller model of the same vocabulary that drafts, under --draft or "
            "full."
        ),
    ],
}


def with_draft_options(command: Callable) -> Callable:
    """Adds `--draft`, `--draft-tokens` and `--draft-model` to a command."""
    signature = inspect.signature(command)

    @functools.wraps(command)
    def run(**arguments):
        _given.set(Given(*[arguments.pop(name) for name in _OPTIONS]))
        return command(**arguments)

    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option
        )
        for name, option in _OPTIONS.items()
    ]
    # typer reads the options here.
    with_options: Any = run
    with_options.__signature__ = signature.replace(
        parameters=[*signature.parameters.values(), *added]
    )
    return run


def check(goes_on: str | None) -> None:
    """Raises ValueError for drafts that nobody would make.

    Args:
        goes_on: the option by which a prompt is kept, or was read before.
    """
    given = _given.get()
    if given.tokens is not None and given.draft is None and given.model is None:
        raise ValueError(
            f"--draft-tokens {given.tokens} is of a draft: add --draft or "
            "--draft-model."
        )
    if given.first is not None and goes_on is not None:
        raise ValueError(
            f"{given.first} drafts behind a prompt that it has read, and one of "
            f"{goes_on} is kept for the method alone: leave either out."
        )


def wanted(dtype: str | None) -> dict[str, Any]:
    """The options of :func:`kvjax.generate` that were given; the draft model loaded."""
    given = _given.get()
    if given.draft is None and given.model is None:
        return {}
    options: dict[str, Any] = {
        "draft_tokens": TOKENS if given.tokens is None else given.tokens
    }
    if given.draft is not None:
        options["draft"] = given.draft
    if given.model is not None:
        import models

        name = model_name(given.model)
        options["draft_model"] = models.load(name, dtype=checked_dtype(dtype))
    return options


def check_method() -> None:
    """Parses the drafting method, before a model is loaded."""
    from kvjax.decoding import drafting

    drafting.wanted(_given.get().draft, TOKENS, None)


def document(generation) -> dict[str, Any]:
    """The drafts of a generation as the command's document has them."""
    drafts, given = generation.drafts, _given.get()
    if drafts is None:
        return {}
    found = drafts._asdict() | {"accepted_per_pass": drafts.accepted_per_pass}
    return {"draft": given.draft, "draft_model": given.model, "drafts": found}


def line(generation) -> str:
    """The drafts of a generation in words, behind a comma; empty without any."""
    drafts = generation.drafts
    if drafts is None:
        return ""
    return (
        f", {drafts.accepted} of {drafts.drafted} drafted tokens accepted in "
        f"{drafts.passes} passes, {drafts.accepted_per_pass:.1f} a pass, "
        f"{table.format_bytes(drafts.bytes_per_token)} of cache read a token"
    )
