"""The tokenizer that the metadata of a GGUF file describe, as a `tokenizer.json` would.

Two kinds exist in the Llama family: byte-level BPE (`gpt2`), where `tokenizer.ggml.pre`
names the pattern that splits text before, and sentencepiece's BPE (`llama`).
"""

from typing import Any, NamedTuple

from models.gguf.header import Header
from models.llama.tokenizer import HFTokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
# Words that know capitals: what may begin a word, and what may end it.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LOWER_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_UPPER_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_WITH_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_LOWER_WORD}|{_UPPER_WORD}|\p{{N}}|{_WITH_PATHS}|{_SPACES}"
_GPT_4O = (
    rf"{_LOWER_WORD}{_CONTRACTIONS}?|{_UPPER_WORD}{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_WITH_PATHS}|{_SPACES}"
)


class _Split(NamedTuple):
    """A way to split text before byte-level BPE, and what goes with it."""

    pattern: str | None = None  # None is GPT-2's
    single_digits: bool = False  # each is split off before
    nfc: bool = False
    whole_words: bool = False  # words of the vocabulary are taken without merges
    adds_bos: bool = False  # where the file does not say


_GPT_2 = _Split()
_DIGITS = _Split(single_digits=True)
_LLAMA = _Split(_LLAMA3, whole_words=True, adds_bos=True)
_QWEN = _Split(_QWEN2, nfc=True)
_CASED = _Split(_GPT_4O)
# By the names of llama.cpp (src/llama-vocab.cpp).
_SPLITS = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS),
    **dict.fromkeys(("codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), _GPT_2),
    **dict.fromkeys(("granite-docling", "gigachat", "a.x-4.0", "mellum"), _GPT_2),
    "exaone4": _GPT_2,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA),
    **dict.fromkeys(("falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN),
    "qwen35": _Split(_QWEN35, nfc=True),
    "tekken": _Split(_TEKKEN, whole_words=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _CASED),
}
_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# What a sentencepiece vocabulary means if it does not say.
_SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
_NONE = -1  # id of no token
_ENDINGS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TEMPLATE = "tokenizer.chat_template"


def load(header: Header) -> HFTokenizer:
    """The tokenizer of a file, with its special tokens and chat templates.

    Raises:
        ValueError: if the file has no tokenizer, or one of an unknown kind, or its
            parts do not fit together.
    """
    kind = header.text(_key("model"))
    tokens = header.array(_key("tokens"), str)
    if not kind or not tokens:
        raise ValueError(
            f"{header.path} has no tokenizer; convert the model again, with its "
            "tokenizer beside it."
        )
    if len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{header.path}: {len(tokens) - len(set(tokens))} tokens stand in the "
            "vocabulary twice; convert the model again."
        )
    if kind == "gpt2":
        split = _split(header)
        backend, adds_bos = _byte_level(header, tokens, split), split.adds_bos
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(header, tokens), True
    else:
        raise ValueError(
            f"{header.path}: tokenizer model {kind!r} is not supported; supported: "
            "gpt2 (byte-level BPE), llama (sentencepiece BPE)."
        )
    _add_tokens(header, backend, tokens)
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for name, key in _IDS.items():
        index = _token_id(header, key)
        if index != _NONE:
            config[name] = tokens[index]
    # What a file of this kind does by default it cannot do without such a token.
    adds_bos = adds_bos and "bos_token" in config
    config["add_bos_token"] = header.flag(_key("add_bos_token"), adds_bos)
    if config["add_bos_token"]:
        _begin_with(header, backend, config.get("bos_token"))
    return HFTokenizer(backend, config, _templates(header))


def eos_ids(header: Header) -> tuple[int, ...]:
    """The ids of the tokens that end a text, a turn or a message; the first is EOS."""
    ids = [_token_id(header, key) for key in _ENDINGS]
    return tuple(dict.fromkeys(index for index in ids if index != _NONE))


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def _token_id(header: Header, key: str) -> int:
    is_byte_level = header.text(_key("model")) != "llama"
    default = _NONE if is_byte_level else _SENTENCEPIECE_IDS.get(key, _NONE)
    index = header.integer(_key(key), default)
    count = header.length(_key("tokens"))
    if index >= count:
        raise ValueError(
            f"{header.path}: {_key(key)}={index} is beyond the {count} tokens of "
            "the vocabulary; convert the model again."
        )
    return index


def _split(header: Header) -> _Split:
    name = header.text(_key("pre"))
    if name not in _SPLITS:
        raise ValueError(
            f"{header.path}: {_key('pre')}={name!r} does not say how text is split "
            f"before BPE; known: {', '.join(_SPLITS)}. Use the model's Hugging Face "
            "folder, or convert it again if one of these is meant."
        )
    return _SPLITS[name]


def _byte_level(header: Header, tokens: list[str], split: _Split):
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    if _key("merges") not in header.fields:
        raise ValueError(f"{header.path}: a gpt2 tokenizer needs {_key('merges')}.")
    backend = _bpe(header, tokens, _merges(header), ignore_merges=split.whole_words)
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    steps = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    as_bytes = pre_tokenizers.ByteLevel(False, use_regex=split.pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, as_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(header: Header, tokens: list[str]):
    from tokenizers import decoders, normalizers

    backend = _bpe(
        header,
        tokens,
        _merges(header) or _merges_by_score(header, tokens),
        unk_token=tokens[_token_id(header, "unknown_token_id")],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = header.flag(_key("add_space_prefix"), True)
    before = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    decode = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
    backend.decoder = decoders.Sequence([*decode, *after])
    return backend


def _bpe(header: Header, tokens: list[str], merges: list[tuple[str, str]], **options):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        return Tokenizer(BPE(vocab, merges, **options))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"{header.path}: merges and tokens do not fit together: {error}."
        ) from error


def _merges(header: Header) -> list[tuple[str, str]]:
    pairs = [merge.partition(" ") for merge in header.array(_key("merges"), str)]
    return [(left, right) for left, _, right in pairs]


def _merges_by_score(header: Header, tokens: list[str]) -> list[tuple[str, str]]:
    """Lists every way to make a token of two others, the best token first.

    Among the ways to make one token, and among tokens of one score, the longer left
    part comes first, then the longer right: as in the `tokenizer.json` of these models.
    """
    scores = header.array(_key("scores"), float)
    if len(scores) != len(tokens):
        raise ValueError(
            f"{header.path}: a llama tokenizer needs {_key('scores')}, one per token; "
            f"got {len(scores)} for {len(tokens)}."
        )
    vocab = set(tokens)
    ranked = [
        (score, cut, len(token) - cut, token)
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    ranked.sort(key=lambda entry: entry[:3], reverse=True)
    return [(token[:cut], token[cut:]) for _, cut, _, token in ranked]


def _add_tokens(header: Header, backend, tokens: list[str]) -> None:
    """Adds the tokens that are matched whole, wherever they stand in a text.

    In a byte-level vocabulary such a token is spelled as in the text, not in the
    alphabet of the bytes: it keeps its id because the vocabulary has it so.
    """
    from tokenizers import AddedToken

    kinds = header.array(_key("token_type"), int)
    if kinds and len(kinds) != len(tokens):
        raise ValueError(
            f"{header.path}: {_key('token_type')} has {len(kinds)} entries for "
            f"{len(tokens)} tokens; convert the model again."
        )
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
            for token, kind in zip(tokens, kinds, strict=False)  # or none at all
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )


def _begin_with(header: Header, backend, bos: str | None) -> None:
    from tokenizers.processors import TemplateProcessing

    if bos is None:
        raise ValueError(
            f"{header.path}: {_key('add_bos_token')} asks for a token that begins a "
            f"text, but there is no {_key('bos_token_id')}."
        )
    backend.post_processor = TemplateProcessing(
        single=[bos, "$A"],
        pair=[bos, "$A", bos, "$B:1"],
        special_tokens=[(bos, backend.token_to_id(bos))],
    )


def _templates(header: Header) -> dict[str, str]:
    templates = {}
    for key in header.fields:
        if key == _TEMPLATE:
            templates["default"] = header.text(key)
        elif key.startswith(f"{_TEMPLATE}."):
            templates[key.removeprefix(f"{_TEMPLATE}.")] = header.text(key)
    return templates
