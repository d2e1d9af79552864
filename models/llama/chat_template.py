"""Chat templates: a conversation as the text that a model was trained on.

A chat template is a program from the network: it runs in jinja2's immutable sandbox and
sees plain JSON values only.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

# Options of transformers' method that would otherwise be variables of the template.
_REFUSED = {
    "conversation": "the messages come first",
    "return_dict": "the result is a list of ids, or with tokenize=False the text",
    "return_tensors": "make an array of the ids",
    "return_assistant_tokens_mask": "it is not made here",
    "padding": "prompts of any lengths go together as they are",
    "truncation": "cut the ids, or give fewer messages",
    "max_length": "cut the ids, or give fewer messages",
    "sanitize_control_tokens": "take special tokens out of the messages yourself",
    "tokenizer_kwargs": "tokenize=False gives the text to encode as you like",
    "processor_kwargs": "tokenize=False gives the text to encode as you like",
}
_DATA = ("arguments", "parameters")  # a null in these is a value, not a key left out
_HERE = "\x02kvjax-continues-here\x03"  # marks a place, in no text of anybody


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool | None,
    *,
    continue_final_message: bool = False,
    variables: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> str:
    """Returns the text of a conversation.

    Args:
        source: the template, in jinja2.
        messages: dicts of JSON values; a key that is null is left out.
        add_generation_prompt: end with the opening of the assistant's turn; None does,
            unless the final message is gone on with.
        continue_final_message: end inside the final message, to go on with it.
        variables: of the template, beside these; options are not taken for some.
        defaults: of the variables, for what is not given.

    Raises:
        ValueError: if an argument is not what it must be, or the template fails.
        ImportError: if jinja2 is not installed.
    """
    _check(messages, variables)
    if not isinstance(continue_final_message, bool):
        raise ValueError(
            f"{continue_final_message=} must be True or False: what goes on is the "
            "content."
        )
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    given = {
        **defaults,
        **_plain(variables),
        "messages": [_without_null(message) for message in _plain(list(messages))],
        "add_generation_prompt": bool(add_generation_prompt),
    }
    if not continue_final_message:
        return _render(source, given)
    if add_generation_prompt:
        raise ValueError(
            "add_generation_prompt=True begins a turn and continue_final_message=True "
            "goes on with one: give only one of them."
        )
    return _render_open(source, given)


def _check(messages: Any, variables: Mapping[str, Any]) -> None:
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not is_list or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f"messages={_short(messages)} must be a list of dicts with role and "
            "content, one conversation."
        )
    for name, value in variables.items():
        if name in _REFUSED and value is not None and value is not False:
            raise ValueError(
                f"{name}={_short(value)} is no option of apply_chat_template here: "
                f"{_REFUSED[name]}."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}..."


def _plain(value: Any) -> Any:
    """`value` rebuilt from JSON types: nothing with methods reaches a template."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"chat messages and variables must be JSON values: {error}."
        ) from error


def _without_null(value: Any) -> Any:
    """The value without keys that are null: templates write None, or fail, on these."""
    if isinstance(value, list):
        return [_without_null(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        key: part if key in _DATA else _without_null(part)
        for key, part in value.items()
        if part is not None
    }


def _render_open(source: str, given: dict[str, Any]) -> str:
    """The text up to the end of the final message's own."""
    *before, final = given["messages"] or [{}]
    marked = given | {"messages": [*before, _marked(final)]}
    whole = _render(source, given)
    text, mark, _ = _render(source, marked).rpartition(_HERE)
    if mark and not whole.startswith(text):
        text = text.rstrip()  # a template that strips what a message ends with
    if not mark or not whole.startswith(text):
        raise ValueError(
            "continue_final_message=True: the chat template does not write the final "
            "message as it is, so that its end cannot be told."
        )
    return text


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": content + _HERE}
    parts = list(content) if isinstance(content, list) else []
    for index in reversed(range(len(parts))):
        part = parts[index]
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            parts[index] = part | {"text": part["text"] + _HERE}
            return message | {"content": parts}
    raise ValueError("continue_final_message=True: the final message has no text.")


def _render(source: str, variables: Mapping[str, Any]) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            "chat templates need jinja2; install it with `pip install jinja2`."
        ) from error
    del jinja2
    try:
        return _compile(source).render(**variables)
    except Exception as error:  # a program of somebody else's fails as it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template refused: {reason}.") from error


@functools.lru_cache(maxsize=16)
def _compile(source: str):
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text for training; here, nothing."""

        tags = {"generation"}  # noqa: RUF012  # as the class above declares it

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(
        value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ):
        # Jinja's own filter escapes for HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
