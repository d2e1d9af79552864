"""The byte-level BPE of the embedded models: 1024 tokens, every digit on its own."""

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

from models.embedded.data import KEY, PASSKEY, SPECIAL_TOKENS


def train(texts: Sequence[str], vocab_size: int = 1024) -> Tokenizer:
    """Trains on `texts`, and on the retrieval templates so that they stay short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Single digits make every pass key the same number of tokens.
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    templates = PASSKEY.format(value="") + KEY.format(name="name", value="")
    tokenizer.train_from_iterator([*texts, templates * 2000], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} $A",
        pair=f"{SPECIAL_TOKENS[0]} $A $B",
        special_tokens=[(SPECIAL_TOKENS[0], 0)],
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: pathlib.Path, context: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
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
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
