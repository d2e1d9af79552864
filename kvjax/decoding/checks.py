"""Checks of what a model is given: prompts, tokens, options; one clear error each."""

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from kvjax import accounting, copies, parallel
from kvjax.decoding.sampling import shown
from kvjax.interface import DecoderLM, LanguageModel, Method, Tokenizer
from kvjax.text import encoding

_BYTES = (bytes, bytearray, memoryview)


def check_prompts(
    model: LanguageModel,
    method: Method,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int] | None = None,
    *,
    named: str = "max_new_tokens",
    first: int = 0,
) -> None:
    """Raises ValueError unless the prompts, from :func:`token_rows`, fit the model.

    Args:
        ends: tokens of each prompt that are read before `finish`, which a method may
            read again; what follows is appended. All of them if None.
        named: what `max_new_tokens` is called where it was given.
        first: the number of the first prompt among those that were given.
    """
    decoder = model.decoder
    if not prompts:
        raise ValueError("prompts is empty: give at least one.")
    for row, prompt in enumerate(prompts, first):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} has no tokens: give it at least one.")
        is_long = len(prompt) + max_new_tokens > decoder.context
        if is_long and not accounting.reads_any_length(method, decoder):
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with "
                f"{named}={max_new_tokens} that exceeds the model's context of "
                f"{decoder.context}: shorten either."
            )
        check_reach(method, decoder, len(prompt), max_new_tokens, named=named)
        is_at_once = len(prompt) > decoder.rope.static_until and not method.renumbers
        if is_at_once and method.hooks.asked is not None:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens and rotates all keys at once "
                f"from {decoder.rope.static_until} on, and {method} reads it in parts, "
                "with its question between them: use citrus in all layers."
            )
    check_vocabulary(decoder, prompts, first)
    lengths = map(len, prompts) if ends is None else ends
    check_reread(model, method, lengths, first)


def check_reach(
    method: Method,
    decoder: DecoderLM,
    length: int,
    new_tokens: int,
    *,
    named: str = "max_new_tokens",
) -> None:
    """Raises ValueError unless a long text has its places in the model's context.

    Under a method that re-numbers positions, but goes on counting what is generated.

    Args:
        length: tokens of the text; where they fit with the new ones, so do places.
        new_tokens: most that follow it.
        named: what these are called where they were given.
    """
    asked, needed = method.hooks.asked, length + new_tokens
    if asked is None or not method.renumbers or needed <= decoder.context:
        return
    needed = asked.reach + new_tokens
    if needed > decoder.context:
        raise ValueError(
            f"{method!r} takes {asked.reach} positions for a long text; with "
            f"{named}={new_tokens} that is {needed}, which exceeds the model's "
            f"context of {decoder.context}: lower the budget, or {named}."
        )


def check_reread(
    model: LanguageModel, method: Method, lengths: Iterable[int], first: int = 0
) -> None:
    """Raises ValueError unless a second reading of such prompts fits the model."""
    again, decoder = method.reread, model.decoder
    if again is None or method.renumbers:
        return
    words = len(encoding.inside(model.tokenizer.encode, again.words))
    for row, length in enumerate(lengths, first):
        chunk = min(again.chunk, length)
        needed = length + words + chunk
        for most, what in (
            (decoder.context, "the model's context"),
            (decoder.rope.static_until, "the static length of its rope"),
        ):
            if needed > most:
                raise ValueError(
                    f"prompt {row} has {length} tokens; read again behind {words} of "
                    f"words, {chunk} at once, that is {needed}, which exceeds {what} "
                    f"of {int(most)}: give the method a smaller chunk than "
                    f"{again.chunk}, shorten the prompt, or take a method that reads "
                    "once."
                )


def check_repeats(decoder: DecoderLM, method: Method) -> None:
    """Raises ValueError unless the method takes the copies that the model feeds."""
    fed = copies.of(decoder)
    if fed is not None and not method.repeats:
        raise ValueError(
            f"the model feeds {fed.count} copies of a token: use "
            f"'phd+{method.spec_text()}'."
        )


def check_eos_ids(eos_ids: Collection[int] | None) -> None:
    """Raises ValueError unless they are token ids; None is the model's own."""
    if eos_ids is None:
        return
    is_listed = isinstance(eos_ids, Set) or _is_series(eos_ids)
    if not (is_listed and isinstance(eos_ids, Collection)) or not all(
        _is_whole(token) and 0 <= token < 1 << 31 for token in eos_ids
    ):
        raise ValueError(
            f"eos_ids={shown(eos_ids)} must be token ids, integers from 0 on, such "
            "as (2,); () is none, None the model's own."
        )


def check_stop(stop: Sequence[str]) -> None:
    """Raises ValueError unless they are texts that can end a row."""
    is_listed = isinstance(stop, Sequence) and not isinstance(stop, str)
    if not is_listed or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(
            f"stop={shown(stop)} must be a sequence of non-empty strings, such as "
            "('end',)."
        )


def check_counts(**values: int) -> None:
    """Raises ValueError unless every value is an integer of at least 1."""
    for name, value in values.items():
        if not _is_whole(value):
            raise ValueError(f"{name}={shown(value)} must be an integer of at least 1.")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def check_seed(seed: int) -> None:
    """Raises ValueError unless JAX and NumPy can both be seeded with it."""
    if not _is_whole(seed) or not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={shown(seed)} must be an integer in [0, 2**32).")


def check_model(model: LanguageModel, *, on_one_device: str = "") -> None:
    """Raises ValueError for what is no loaded model, such as its name.

    Args:
        on_one_device: what is done with the model, if that takes no mesh.
    """
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"model={shown(model)} must be a LanguageModel: load it with models.load."
        )
    mesh = parallel.of(model.decoder)
    if on_one_device and mesh is not None:
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"{on_one_device} runs on one device, and the model is on a mesh of "
            f"{sizes}: load it without `mesh`."
        )


def check_text(text: str, name: str) -> None:
    """Raises ValueError unless the text can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {_shown(text)}, not text{_remedy(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has {text[error.start]!r} at character {error.start}, half of a "
            "pair that is not whole: it was cut or read wrongly; remove it."
        ) from error


def token_rows(
    prompts: Iterable[Any], tokenizer: Tokenizer | None = None, first: int = 0
) -> list[list[int]]:
    """Returns token ids of every prompt, as Python integers.

    Args:
        prompts: texts, or rows of integers: lists, or arrays of NumPy or JAX.
        tokenizer: of texts; None if only token ids are taken.
        first: the number of the first row.

    Raises:
        TypeError: if `prompts` is one text.
        ValueError: if it is no series of rows, or a row anything else; names the row.
    """
    rows = []
    if tokenizer is None and isinstance(prompts, str):
        raise TypeError("prompts are lists of token ids here, not a text: encode it.")
    for row, prompt in enumerate(rows_of(prompts), first):
        if tokenizer is not None and isinstance(prompt, str):
            check_text(prompt, f"prompt {row}")
            rows.append(encoding.begin(tokenizer.encode, prompt))
        else:
            rows.append(token_ids(prompt, f"prompt {row}"))
    return rows


def rows_of(prompts: Iterable[Any], name: str = "prompts") -> list[Any]:
    """Returns prompts as a list, whatever each of them is.

    Raises:
        TypeError: if they are one text.
        ValueError: if they are no series.
    """
    if isinstance(prompts, str):
        raise TypeError(f"{name} is one text: put it in a list.")
    if not _is_series(prompts):
        raise ValueError(
            f"{name} is {_shown(prompts)}, not a list of prompts{_remedy(prompts)}."
        )
    return list(prompts)


def token_ids(prompt: Any, name: str) -> list[int]:
    """Returns one row's token ids, as Python integers.

    Raises:
        ValueError: if it is anything else.
    """
    if not _is_series(prompt):
        raise ValueError(
            f"{name} is {_shown(prompt)}, not a list of token ids{_remedy(prompt)}."
        )
    if hasattr(prompt, "__array__"):  # of NumPy, JAX or PyTorch: as a whole, for speed
        array = np.asarray(prompt)
        if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size):
            return [] if not array.size else array.tolist()
        raise ValueError(
            f"{name} is an array of shape {array.shape} and dtype {array.dtype}, "
            "not one of integers along one axis."
        )
    ids = []
    for place, token in enumerate(prompt):
        try:
            ids.append(operator.index(token))
        except TypeError:
            is_whole = False
        else:
            is_whole = not isinstance(token, bool)
        if not is_whole:
            raise ValueError(
                f"{name} holds {shown(token)} at place {place}, which is no "
                "token id: they are integers."
            )
    return ids


def _is_series(given: Any) -> bool:
    if isinstance(given, (str, *_BYTES, Mapping, Set)):
        return False
    # An array of no axis has the method too.
    return isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _shown(given: Any) -> str:
    return f"{shown(given)}, of type {type(given).__name__}"


def _remedy(given: Any) -> str:
    if isinstance(given, _BYTES):
        return ": decode it, as by .decode('utf-8')"
    if isinstance(given, str):
        return ": encode it with the model's tokenizer first"
    if isinstance(given, int | np.integer) or getattr(given, "ndim", 1) == 0:
        return ": put all of its tokens in a list of their own"
    return ""


def check_vocabulary(
    decoder: DecoderLM, rows: Sequence[Sequence[int]], first: int = 0
) -> None:
    """Raises ValueError if a row holds an unknown token id; it names the row."""
    for index, row in enumerate(rows, first):
        low, high = min(row, default=0), max(row, default=0)
        if low < 0 or high >= decoder.vocab_size:
            raise ValueError(
                f"row {index} holds token id {low if low < 0 else high}, outside the "
                f"model's vocabulary of {decoder.vocab_size}: use its own tokenizer."
            )
