"""The byte-level BPE of the embedded models.

Numbers are cut into groups of three digits from the left, as Llama 3's are, and every
group is a token of its own; so is every word that a retrieval task may name. A model of
a million parameters then meets a fact in as few tokens as a large one does.
"""

import json
import pathlib
from collections.abc import Sequence

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from kvjax import files
from kvjax.evaluation.tasks.words import WORDS

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS, EOS, PAD = range(3)
_NUMBERS = (
    *(f"{i:02d}" for i in range(100)),
    *(f"{i:03d}" for i in range(1000)),
)
VOCAB_SIZE = 2816


def train(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Trains on `texts`: special tokens and bytes, merges, then numbers and words.

    Raises:
        ValueError: if `vocab_size` has no room for what is in every vocabulary.
    """
    whole = [*_NUMBERS, *WORDS]
    least = len(SPECIAL_TOKENS) + 256 + len(whole)
    if vocab_size < least:
        raise ValueError(
            f"{vocab_size=} must be at least {least}: special tokens, bytes, "
            f"{len(_NUMBERS)} numbers and {len(WORDS)} words."
        )
    merged = Tokenizer(models.BPE())
    merged.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(whole),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    merged.train_from_iterator(texts, trainer)
    bpe = json.loads(merged.to_str())["model"]
    vocab = bpe["vocab"]
    for token in whole:
        vocab.setdefault(token, len(vocab))
    # A piece that is a token needs no merges to become one.
    tokenizer = Tokenizer(
        models.BPE(vocab, [tuple(pair) for pair in bpe["merges"]], ignore_merges=True)
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} $A",
        pair=f"{SPECIAL_TOKENS[0]} $A $B",
        special_tokens=[(SPECIAL_TOKENS[0], 0)],
    )
    return tokenizer


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}"), behavior="isolated"),
            # Without the blank before it: a word is one token wherever it stands.
            pre_tokenizers.Split(
                Regex(rf"(?<![A-Za-z_]){_any_of(WORDS)}(?![A-Za-z_])"),
                behavior="isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _any_of(words: Sequence[str]) -> str:
    # A regular expression with shared beginnings, which is matched letter by letter;
    # a plain list of hundreds of words is tried word by word.
    rests: dict[str, list[str]] = {}
    for word in words:
        if word:
            rests.setdefault(word[0], []).append(word[1:])
    if not rests:
        return ""
    options = "|".join(first + _any_of(rest) for first, rest in rests.items())
    return f"(?:{options})" + ("?" if "" in words else "")


def save(tokenizer: Tokenizer, folder: pathlib.Path, context: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    files.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    bos, eos, pad = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    text = json.dumps(config, indent=2) + "\n"
    files.write_text(folder / "tokenizer_config.json", text)
