"""`tokenizer.json`: text to ids and back, incremental decoding, chat templates.

A chat template is a program from the network: it runs in jinja2's immutable sandbox and
sees plain JSON values only.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.llama import git_lfs

# A character is at most four bytes, hence four byte tokens: more that do not decode are
# not the beginning of one.
_MOST_PENDING = 8


@dataclasses.dataclass(frozen=True, eq=False)
class HFTokenizer:
    """A :class:`kvjax.interface.Tokenizer` over a `tokenizers.Tokenizer`.

    Attributes:
        backend: the `tokenizers.Tokenizer`. Its post-processor decides which special
            tokens `encode` adds.
        config: the decoded `tokenizer_config.json`.
        chat_templates: jinja2 sources by name; the usual one is called `default`.
    """

    backend: Any
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Ids, added tokens included; a model's vocabulary may be padded beyond."""
        return self.backend.get_vocab_size()

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens, `bos_token` and so on, as text."""
        named = {}
        for key, value in self.config.items():
            text = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(text, str):
                named[key] = text
        return named

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, if there is one."""
        return self._id_of("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, if there is one."""
        return self._id_of("eos_token")

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens such as BOS as `tokenizer.json` says."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `tokens`."""
        ids = [int(token) for token in tokens]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """Incremental decoding, for text shown while it is generated."""
        return TextStream(
            functools.partial(self.decode, skip_special_tokens=skip_special_tokens)
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tokenize: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> list[int] | str:
        """A conversation as the model was trained to see it.

        Args:
            messages: dicts with `role` and `content`, JSON values only.
            add_generation_prompt: end with the opening of the assistant's turn.
            tokenize: token ids; False gives the text.
            template: name of the template, if the checkpoint has several; None is
                `tool_use` where there is one and `tools` are given, else `default`.
            **variables: further variables of the template, such as `tools`.

        Raises:
            ValueError: if there is no such template, or it refuses the messages.
            ImportError: if jinja2 is not installed.
        """
        if template is None:
            asks = variables.get("tools") is not None
            takes_tools = asks and "tool_use" in self.chat_templates
            template = "tool_use" if takes_tools else "default"
        if template not in self.chat_templates:
            known = ", ".join(self.chat_templates) or "none: this is no chat model"
            raise ValueError(
                f"no chat template {template!r}; the checkpoint has {known}."
            )
        text = _render(
            self.chat_templates[template],
            self.special_tokens
            | {"tools": None, "documents": None}
            | _plain(variables)
            | {
                "messages": _plain(list(messages)),
                "add_generation_prompt": add_generation_prompt,
            },
        )
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False) if tokenize else text


class TextStream:
    """Decodes token by token; all pieces and `finish` are the whole text.

    A piece never ends inside a character: bytes that are not one yet wait for more.
    Decoding looks at a short window, because a tokenizer may drop a leading space and
    a character may span tokens.
    """

    def __init__(self, decode):
        self._decode = decode
        self._tokens: list[int] = []  # window: shown tokens, then pending ones
        self._shown = 0  # tokens of the window already shown

    def step(self, token: int) -> str:
        """Text that became certain with `token`; often a word, sometimes empty."""
        self._tokens.append(int(token))
        before = self._decode(self._tokens[: self._shown])
        text = self._decode(self._tokens)
        pending = len(self._tokens) - self._shown
        unfinished = text.endswith("\ufffd") and pending < _MOST_PENDING
        if unfinished or len(text) <= len(before):
            return ""
        self._tokens = self._tokens[self._shown :]
        self._shown = len(self._tokens)
        return text[len(before) :]

    def finish(self) -> str:
        """What was still waiting, with U+FFFD for bytes that are no character."""
        before = self._decode(self._tokens[: self._shown])
        text = self._decode(self._tokens)
        self._tokens, self._shown = [], 0
        return text[len(before) :]


def load(directory: Path) -> HFTokenizer:
    """Reads `tokenizer.json`, `tokenizer_config.json` and the chat templates.

    Raises:
        FileNotFoundError: if there is no `tokenizer.json`.
        ValueError: if a file is damaged.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no tokenizer.json; save it with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    git_lfs.check_content(path)
    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} is damaged: {error}; download it again.") from error
    backend.no_truncation()
    backend.no_padding()
    config = read_json(directory / "tokenizer_config.json")
    special = read_json(directory / "special_tokens_map.json")
    config = special | config
    tokenizer = HFTokenizer(backend, config, _templates(directory, config))
    if config.get("add_bos_token") is True:
        _begin_with_bos(tokenizer)
    return tokenizer


def _begin_with_bos(tokenizer: HFTokenizer) -> None:
    """Adds BOS to the post-processor, unless it or the text itself already has it.

    Some checkpoints ask for BOS in `tokenizer_config.json` alone (DeepSeek-R1-Distill).
    `add_eos_token` is not looked at, as in transformers: only `tokenizer.json` ends a
    text.
    """
    from tokenizers import processors

    backend, bos = tokenizer.backend, tokenizer.bos_id
    if bos is None or backend.encode("a").ids[:1] == [bos]:
        return
    before = backend.post_processor
    parts = [] if before is None else [json.loads(before.__getstate__())]
    if parts and parts[0]["type"] == "Sequence":
        parts = parts[0]["processors"]
    # Two templates in a row would take the tokens of the first for a second text.
    template = next((p for p in parts if p["type"] == "TemplateProcessing"), None)
    if template is None:
        plain = processors.TemplateProcessing(single="$A", pair="$A $B:1")
        template = json.loads(plain.__getstate__())
        parts.append(template)
    text = tokenizer.special_tokens["bos_token"]
    template["special_tokens"][text] = {"id": text, "ids": [bos], "tokens": [text]}
    for form in ("single", "pair"):
        template[form] = [
            piece for old in template[form] for piece in (*_bos_before(old, text), old)
        ]
    state = {"type": "Sequence", "processors": parts}
    after = processors.Sequence([])
    after.__setstate__(json.dumps(state).encode())
    backend.post_processor = after


def _bos_before(piece: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
    if "Sequence" not in piece:  # a special token
        return []
    return [{"SpecialToken": {"id": text, "type_id": piece["Sequence"]["type_id"]}}]


def save(tokenizer: HFTokenizer, directory: Path) -> None:
    """Writes what :func:`load` reads.

    Raises:
        ValueError: if the name of a chat template is no name of a file.
    """
    for name in tokenizer.chat_templates:
        if Path(name).name != name:
            raise ValueError(
                f"chat template {name!r} cannot be written: its name must be one of a "
                "file."
            )
    config = {
        key: value for key, value in tokenizer.config.items() if key != "chat_template"
    }
    # The class that every transformers release reads a bare tokenizer.json with.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    for name, source in tokenizer.chat_templates.items():
        path = directory / "chat_template.jinja"
        if name != "default":
            path = directory / "additional_chat_templates" / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one where there is no file.

    Raises:
        ValueError: if the file is damaged, or holds something else.
    """
    if not path.is_file():
        return {}
    git_lfs.check_content(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; download it again.")
    return content


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    given = config.get("chat_template") or {}
    if isinstance(given, str):
        given = {"default": given}
    elif isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}
    templates = dict(given)
    files: Iterable[Path] = (directory / "additional_chat_templates").glob("*.jinja")
    for path in sorted(files):
        templates[path.stem] = path.read_text(encoding="utf-8")
    alone = directory / "chat_template.jinja"
    if alone.is_file():
        templates["default"] = alone.read_text(encoding="utf-8")
    return templates


def _plain(value: Any) -> Any:
    """`value` rebuilt from JSON types: nothing with methods reaches a template."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(
            f"chat messages and variables must be JSON values: {error}."
        ) from error


@functools.lru_cache(maxsize=16)
def _compile(source: str):
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text for training; here, nothing."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
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


def _render(source: str, variables: Mapping[str, Any]) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            "chat templates need jinja2; install it with `pip install jinja2`."
        ) from error
    try:
        return _compile(source).render(**variables)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refused: {error}.") from error
