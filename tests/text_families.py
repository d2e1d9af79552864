"""Tiny tokenizers of every family: how each takes text apart and puts it together."""

import string

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import models as kinds
from tokenizers_made import CONFIG, byte_fallback, byte_level

from models import embedded
from models.llama import tokenizer as tokenizers_of_llama
from models.llama.tokenizer import HFTokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = string.ascii_letters + string.digits + string.punctuation
BOS, EOS = "<s>", "</s>"


def _finished(backend: Tokenizer, *, bos: bool = True) -> HFTokenizer:
    special = [AddedToken(x, special=True, normalized=False) for x in (BOS, EOS)]
    backend.add_special_tokens(special)
    if bos:
        surround(backend, f"{BOS} $A")
    return HFTokenizer(backend, CONFIG)


def surround(backend: Tokenizer, single: str) -> None:
    """Makes a tokenizer add what the template says, such as `<s> $A </s>`."""
    ids = [(text, backend.token_to_id(text)) for text in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=ids
    )


def _bpe(texts, merges, **options) -> kinds.BPE:
    vocab = dict.fromkeys([BOS, EOS, "<unk>", *texts])
    vocab |= dict.fromkeys(a + b for a, b in merges)
    return kinds.BPE(
        {text: i for i, text in enumerate(vocab)}, merges, unk_token="<unk>", **options
    )


def sentencepiece() -> HFTokenizer:
    """As Llama 2's: a blank before every text, byte fallback, the first blank goes."""
    merges = [("▁", "w"), ("o", "r"), ("▁w", "or"), ("▁", "1"), ("▁", "▁")]
    texts = [*BYTES, "▁", *LETTERS.replace("~", "")]
    backend = Tokenizer(_bpe(texts, merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _finished(backend)


def metaspace(scheme: str) -> HFTokenizer:
    """As Mistral's and Gemma's newer files: words begin with U+2581."""
    merges = [("▁", "w"), ("o", "r"), ("▁w", "or")]
    backend = Tokenizer(_bpe(["▁", *LETTERS, "\n", "é"], merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _finished(backend)


def spaced_bytes() -> HFTokenizer:
    """As RoBERTa's: bytes, and a blank before a text that has none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(_bpe(alphabet, [("Ġ", "w"), ("o", "r")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend)


def joining_bytes() -> HFTokenizer:
    """As GPT-2's: a blank is one token with the digit or the letter behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", x) for x in string.digits + string.ascii_lowercase]
    backend = Tokenizer(_bpe(alphabet, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, bos=False)


def word_piece() -> HFTokenizer:
    """As BERT's: blanks are not tokens, and none is put before a full stop."""
    texts = [BOS, EOS, "[UNK]", *LETTERS, *(f"##{x}" for x in LETTERS), "world"]
    vocab = {text: index for index, text in enumerate(texts)}
    backend = Tokenizer(kinds.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return _finished(backend)


def ctc() -> HFTokenizer:
    """As Wav2Vec2's: neighbours that are equal are one, unless a pad parts them."""
    vocab = [BOS, EOS, "<unk>", "<pad>", "|", *string.ascii_lowercase]
    backend = Tokenizer(_bpe(vocab, []))
    backend.normalizer = normalizers.Replace(" ", "|")
    backend.decoder = decoders.CTC(cleanup=True)
    return _finished(backend)


def suffixed() -> HFTokenizer:
    """As GPT-1's and CLIP's: a word's last token says that it ends."""
    texts = [*LETTERS, *(f"{x}</w>" for x in LETTERS)]
    backend = Tokenizer(_bpe(texts, [("o", "r</w>")], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder("</w>")
    return _finished(backend)


def _made(backend) -> HFTokenizer:
    return HFTokenizer(backend, CONFIG)


def of_embedded() -> HFTokenizer:
    """The tokenizer of the embedded models."""
    return tokenizers_of_llama.load(embedded.path())


# What decodes to the text that was encoded, if it has no blank at its beginning.
EXACT = {
    "bytes": lambda: _made(byte_level()),
    "spaced_bytes": spaced_bytes,
    "joining_bytes": joining_bytes,
    "fallback": lambda: _made(byte_fallback()),
    "sentencepiece": sentencepiece,
    "embedded": of_embedded,
}
FAMILIES = EXACT | {
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_never": lambda: metaspace("never"),
    "word_piece": word_piece,
    "ctc": ctc,
    "suffixed": suffixed,
}
