"""Tiny tokenizers in the two forms the Llama family uses, made in a moment."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}\n"
    "    {{- '<|im_end|>' + '\\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _finished(model, pre_tokenizer, decoder):
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    return backend


def byte_level():
    """As Llama 3 and Qwen: every byte is a token, and two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        text: index for index, text in enumerate([*SPECIAL, *alphabet, "he", "ll"])
    }
    return _finished(
        BPE(vocab, [("h", "e"), ("l", "l")]),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )


def byte_fallback():
    """As Llama 2: words begin with U+2581, unknown characters become byte tokens."""
    texts = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    texts += [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = {text: index for index, text in enumerate(texts)}
    return _finished(
        BPE(vocab, [], byte_fallback=True, unk_token="<unk>"),
        pre_tokenizers.Metaspace(),
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    )


CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
    "add_bos_token": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def write_byte_level(directory: Path, template=CHATML):
    byte_level().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory
