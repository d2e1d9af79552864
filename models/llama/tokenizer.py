"""`tokenizer.json`: text to ids and back, incremental decoding, chat templates."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax import files
from kvjax.text import encoding
from kvjax.text.stream import TextStream, taking_back
from models.llama import chat_template as chat_template_of_llama
from models.llama import git_lfs


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
        """Token ids of `text`, which begins as `tokenizer.json` says, with BOS or not.

        What ends it there (EOS) is left out: what is read here is gone on with.
        """
        if add_special_tokens and self._ends_texts():
            return encoding.begin(self._whole, text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _whole(self, text: str) -> list[int]:
        return self.backend.encode(text).ids

    def _ends_texts(self) -> bool:
        return self.backend.encode("a").special_tokens_mask[-1:] == [1]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `tokens`."""
        ids = [int(token) for token in tokens]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(
        self, skip_special_tokens: bool = True, before: Sequence[int] = ()
    ) -> TextStream:
        """Incremental decoding, for text shown while it is generated.

        Args:
            skip_special_tokens: as for :meth:`decode`.
            before: tokens that the text goes on behind, such as the prompt's.
        """
        decode = functools.partial(self.decode, skip_special_tokens=skip_special_tokens)
        return TextStream(decode, before, taking_back(self.encode, self.decode))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        *,
        tokenize: bool = True,
        template: str | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int] | str:
        """A conversation as the model was trained to see it.

        Args:
            messages: dicts with `role` and `content`, JSON values only; a key that is
                null is left out.
            add_generation_prompt: end with the opening of the assistant's turn; None
                does, unless the final message is continued.
            tokenize: token ids; False gives the text.
            template: name of the template, if the checkpoint has several; None is
                `tool_use` where there is one and `tools` are given, else `default`.
            chat_template: a name, or a template itself instead of the checkpoint's.
            continue_final_message: end inside the final message, which the model goes
                on with.
            **variables: further variables of the template, such as `tools`. Other
                options of transformers' method are refused, not taken for variables.

        Raises:
            ValueError: if there is no such template, it fails, or an option is refused.
            ImportError: if jinja2 is not installed.
        """
        text = chat_template_of_llama.render(
            self._template(template, chat_template, variables),
            messages,
            add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
            defaults=self.special_tokens | {"tools": None, "documents": None},
        )
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _template(
        self, name: str | None, source: str | None, variables: Mapping[str, Any]
    ) -> str:
        if name is not None and source is not None:
            raise ValueError(
                f"template={name!r} and chat_template=... both say which template: "
                "give only one of them."
            )
        if source is not None and source not in self.chat_templates:
            return source
        if name is None:
            asks = variables.get("tools") is not None
            takes_tools = asks and "tool_use" in self.chat_templates
            name = source or ("tool_use" if takes_tools else "default")
        if name not in self.chat_templates:
            if not self.chat_templates:
                raise ValueError(
                    "the checkpoint has no chat template, this is no chat model: leave "
                    "--chat out, or take another, as --model smollm2."
                )
            known = ", ".join(self.chat_templates)
            raise ValueError(f"no chat template {name!r}; the checkpoint has {known}.")
        return self.chat_templates[name]


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
        backend = Tokenizer.from_str(files.read_text(path))
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
    # By its own `save`, a full disk would be an `Exception`.
    backend = tokenizer.backend.to_str(pretty=True)
    files.write_text(directory / "tokenizer.json", backend)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    files.write_text(directory / "tokenizer_config.json", text + "\n")
    for name, source in tokenizer.chat_templates.items():
        path = directory / "chat_template.jinja"
        if name != "default":
            path = directory / "additional_chat_templates" / f"{name}.jinja"
        files.write_text(path, source)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one where there is no file.

    Raises:
        ValueError: if the file is damaged, or holds something else.
    """
    if not path.is_file():
        return {}
    git_lfs.check_content(path)
    try:
        content = json.loads(files.read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; download it again.")
    return content


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    given = config.get("chat_template") or {}
    if isinstance(given, str):
        given = {"default": given}
    elif isinstance(given, list) and all(isinstance(x, dict) for x in given):
        given = {entry.get("name"): entry.get("template") for entry in given}
    is_named = isinstance(given, dict) and all(
        isinstance(x, str) for pair in given.items() for x in pair
    )
    if not is_named:
        raise ValueError(
            f"{directory}: chat_template must be a text, or a list of name and "
            "template; download tokenizer_config.json again."
        )
    templates = dict(given)
    found: Iterable[Path] = (directory / "additional_chat_templates").glob("*.jinja")
    for path in sorted(found):
        templates[path.stem] = files.read_text(path)
    alone = directory / "chat_template.jinja"
    if alone.is_file():
        templates["default"] = files.read_text(alone)
    return templates
