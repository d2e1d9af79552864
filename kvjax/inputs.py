"""What a model may be given: prompts, tokens, options; one clear error for the rest."""

from collections.abc import Sequence

import numpy as np

from kvjax import accounting
from kvjax.interface import DecoderLM, Method
from kvjax.sampling import Sampling, validate


def check_prompts(
    decoder: DecoderLM,
    method: Method,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    chunk_size: int,
) -> None:
    """Raises ValueError unless the prompts fit the model."""
    if not prompts:
        raise ValueError("prompts is empty: give at least one.")
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1.")
    if chunk_size < 1:
        raise ValueError(f"{chunk_size=} must be at least 1.")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} has no tokens: give it at least one.")
        is_long = len(prompt) + max_new_tokens > decoder.context
        if is_long and not accounting.is_constant(method, decoder):
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with {max_new_tokens=} that "
                f"exceeds the model's context of {decoder.context}: shorten either."
            )
    check_vocabulary(decoder, prompts)


def check_options(
    sampling: Sampling,
    stop: Sequence[str] = (),
    stream_every: int = 16,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
) -> None:
    """Raises ValueError unless each is in its range."""
    validate(sampling)
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 32:
        raise ValueError(f"{seed=} must be an integer in [0, 2**32).")
    for token in () if eos_ids is None else eos_ids:
        if not isinstance(token, int | np.integer) or not 0 <= token < 1 << 31:
            raise ValueError(f"{eos_ids=} must be token ids, integers from 0 on.")
    if stream_every < 1:
        raise ValueError(f"{stream_every=} must be at least 1.")
    if isinstance(stop, str) or not isinstance(stop, Sequence) or not all(stop):
        raise ValueError(f"{stop=} must be a sequence of non-empty strings.")


def check_vocabulary(decoder: DecoderLM, rows: Sequence[Sequence[int]]) -> None:
    """Raises ValueError if a row, none of them empty, holds an unknown token id."""
    for index, row in enumerate(rows):
        low, high = min(row), max(row)
        if low < 0 or high >= decoder.vocab_size:
            raise ValueError(
                f"row {index} holds token id {low if low < 0 else high}, outside the "
                f"model's vocabulary of {decoder.vocab_size}: use its own tokenizer."
            )
