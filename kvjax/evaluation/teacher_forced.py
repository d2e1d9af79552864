"""A model fed the right tokens in one pass, as in training: fast, under any attention.

Greedy decoding says the right tokens until its first mistake, so what it would answer
up to there is known without decoding. No method is involved: this measures a model.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from kvjax.decoding import finite
from kvjax.decoding.reader import by_position
from kvjax.evaluation import statistics
from kvjax.evaluation.statistics import Interval
from kvjax.evaluation.tasks import haystack
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.interface import LanguageModel, Tokenizer
from kvjax.text.stream import continuation

# attention(layer, q, k, v) -> out, causal, q and k not yet rotated; head-major
Attention = Callable[[int, Array, Array, Array], Array]

_PAD = 0  # what fills a row up; causal, so nothing before it sees it


class Forced(NamedTuple):
    """Predictions of one row of n tokens, of each of them but the first."""

    log_probs: np.ndarray  # (n - 1,) float32, nats
    likeliest: np.ndarray  # (n - 1,) bool, whether a greedy choice is this token


def run(
    model: LanguageModel,
    attention: Attention,
    rows: Sequence[Sequence[int]],
    *,
    batch: int = 8,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Forced]:
    """Runs the model's training form over rows of tokens of any lengths.

    All rows are padded to the longest, and the last batch to `batch`: one compilation.

    Args:
        model: whose decoder has ``hidden(params, tokens, attention)``.
        attention: causal, made for this model; use one object for many calls.
        rows: at least 2 tokens each.
        batch: rows together.
        progress: called with the fraction that is done.

    Raises:
        ValueError: if there is no row, one is too short or exceeds the context, or its
            logits are not finite.
    """
    lengths = [len(row) for row in rows]
    if not rows or min(lengths) < 2 or max(lengths) > model.decoder.context:
        raise ValueError(
            f"rows of {min(lengths, default=0)} to {max(lengths, default=0)} tokens: "
            f"every row needs 2 to {model.decoder.context}, the model's context."
        )
    padded = np.full((-(-len(rows) // batch) * batch, max(lengths)), _PAD, np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    done: list[Forced] = []
    for start in range(0, len(padded), batch):
        group = padded[start : start + batch]
        found = _forward(model.decoder, attention, model.params, group)
        log_probs, likeliest = map(np.asarray, found)
        for index, length in enumerate(lengths[start : start + batch]):
            ends = slice(length - 1)
            at = f"in row {start + index}"
            finite.check(model.decoder, log_probs[index, ends], at)
            done.append(Forced(log_probs[index, ends], likeliest[index, ends]))
        progress(len(done) / len(rows))
    return done


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(decoder, attention, params, tokens):
    hidden = decoder.hidden(params, tokens, attention)[:, :-1]
    return by_position(decoder, finite.likelihood, params, hidden, tokens[:, 1:])


def answers(
    model: LanguageModel,
    attention: Attention,
    examples: Sequence[Prompted],
    *,
    batch: int = 8,
    progress: Callable[[float], None] = lambda done: None,
) -> list[str]:
    """Answers of greedy decoding to each example, up to its first mistake.

    Its score is greedy decoding's, as long as what follows a mistake scores nothing.

    Raises:
        ValueError: as :func:`run`, and if the tokenizer joins a prompt and its answer.
    """
    tokenizer = model.tokenizer
    rows = [haystack.whole(tokenizer, example) for example in examples]
    found = run(model, attention, rows, batch=batch, progress=progress)
    said = []
    for example, row, forced in zip(examples, rows, found, strict=True):
        asked = len(example.prompt)
        right = forced.likeliest[asked - 1 :]
        count = int(right.cumprod().sum())
        tokens = row[asked : asked + count]
        said.append(continuation(tokenizer.decode, example.prompt, tokens))
    return said


def bits_per_byte(
    model: LanguageModel,
    attention: Attention,
    windows: Sequence[Sequence[int]],
    *,
    batch: int = 8,
    progress: Callable[[float], None] = lambda done: None,
) -> Interval:
    """Bits the model needs for a byte of text, every token but a window's first.

    Models with different tokenizers compare, which perplexities do not.

    Raises:
        ValueError: as :func:`run`, and if a window decodes to no text.
    """
    found = run(model, attention, windows, batch=batch, progress=progress)
    log_probs = [forced.log_probs for forced in found]
    firsts = [1] * len(windows)
    return bits_interval(model.tokenizer, windows, firsts, log_probs)


def bits_interval(
    tokenizer: Tokenizer,
    windows: Sequence[Sequence[int]],
    firsts: Sequence[int],
    log_probs: Sequence[np.ndarray],
) -> Interval:
    """Bits per byte of ``windows[i][firsts[i]:]``, from the log-probabilities in nats.

    Windows are the independent samples. A character cut in two by a border of a window
    counts where it ends.

    Raises:
        ValueError: if the tokens of a window decode to no text.
    """

    def count(tokens: Sequence[int]) -> int:
        text = tokenizer.decode(list(tokens))
        return len(text.rstrip("\N{REPLACEMENT CHARACTER}").encode())

    both = zip(windows, firsts, strict=True)
    num_bytes = [count(window) - count(window[:first]) for window, first in both]
    bits = [-float(np.sum(x, dtype=np.float64)) / math.log(2) for x in log_probs]
    return statistics.ratio_interval(bits, num_bytes)
