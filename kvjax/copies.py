"""The copies of a token that a model feeds beside it, and the rows they are read in.

The PHD-Transformer (arXiv:2504.14992) repeats every token K times and predicts from the
last copy. The first copy, the original, sees originals alone; the others, the hidden
tokens, see each other in a window too.

    K  copies     W  window     C  chunk     A  tokens of a call that are repeated
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Copies:
    """The copies that a model was trained with: a part of its architecture.

    Attributes:
        count: K, of every token, the original among them.
        window: W, hidden tokens before its own token's that a hidden token sees.
        chunk: C, tokens; hidden tokens of another chunk are not seen. 0 is no limit.
    """

    count: int
    window: int = 0
    chunk: int = 0

    def __post_init__(self) -> None:
        check(self.count, self.window, self.chunk)
        if self.count == 1:
            raise ValueError("count=1 is a model without copies: use None.")

    @property
    def hidden(self) -> int:
        """Hidden tokens of a token, K - 1."""
        return self.count - 1

    @property
    def reach(self) -> int:
        """Tokens whose hidden tokens one may see, its own included: R."""
        before = -(-self.window // self.hidden)
        return 1 + (min(before, self.chunk - 1) if self.chunk else before)

    def tail(self, tokens: int) -> int:
        """Tokens at the end of a call of so many whose copies are needed: A."""
        if self.window == 0:
            return 1
        return min(self.chunk, tokens) if self.chunk else tokens

    def rows(self, tokens: int) -> int:
        """Rows of a call of so many tokens."""
        return tokens + self.hidden * self.tail(tokens)

    def tokens(self, rows: int) -> int:
        """Tokens of a call of so many rows, as :meth:`rows` counts them."""
        if self.window == 0:
            return rows - self.hidden
        if self.chunk and rows >= self.count * self.chunk:
            return rows - self.hidden * self.chunk
        return rows // self.count

    def sees(self, n: Array, j: Array, m: Array, i: Array) -> Bool[Array, "..."]:
        """Says whether copy j of token n sees copy i of token m, all but originals.

        Args:
            n, m: positions in the sequence; a negative m is no token.
            j, i: numbers of the copies; their difference is what counts.
        """
        is_own = (m == n) & (i <= j)
        gap = self.hidden * (n - m) + (j - i)
        is_near = (m < n) & (gap <= self.window)
        if self.chunk:
            is_near &= m // self.chunk == n // self.chunk
        return (is_own | is_near) & (m >= 0)


def check(count: Any, window: Any, chunk: Any) -> None:
    """Raises ValueError for copies that no model has, by the names of a config.

    Whatever a file holds is no copy, but whole numbers.
    """
    given = {"copies": count, "copy_window": window, "copy_chunk": chunk}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}={value!r} must be an integer.")
    if count < 1:
        raise ValueError(f"copies={count} must be at least 1; 1 is none beside it.")
    if window < 0:
        raise ValueError(f"copy_window={window} must be at least 0 hidden tokens.")
    if chunk < 0 or chunk == 1:
        raise ValueError(
            f"copy_chunk={chunk} must be at least 2 tokens, or 0 for no chunks."
        )
    for name in ("copy_window", "copy_chunk"):
        if given[name] and count == 1:
            raise ValueError(f"{name}={given[name]} needs copies > 1.")


def of(decoder: Any) -> Copies | None:
    """Returns the copies that a decoder feeds; None if it feeds tokens alone."""
    return decoder.cache_spec(1, 1).copies


def refuse(fed: Copies | None, what: str) -> None:
    """Raises ValueError for what is not made for models that feed copies of a token."""
    if fed is not None:
        raise ValueError(
            f"{what}: not for models that repeat tokens yet, and this one feeds "
            f"{fed.count} copies of each; use the training form."
        )


def tiled(
    copies: Copies | None, tokens: Int[Array | np.ndarray, "B T"]
) -> Int[Array | np.ndarray, "B N"]:
    """Returns tokens and all of their copies, copy-major: N = K * T."""
    return tokens if copies is None else jnp.tile(tokens, (1, copies.count))


def last(copies: Copies | None, hidden: Float[Array, "B N E"]) -> Array:
    """Returns the last copy of every token, of rows as :func:`tiled` makes them."""
    if copies is None:
        return hidden
    return hidden[:, -(hidden.shape[1] // copies.count) :]


def called(
    copies: Copies | None, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Int[Array, "B N"]:
    """Returns the rows in which a chunk of a prompt is read.

    The tokens, then copy by copy the last A of each row, the newest of them last. Where
    a row has fewer, another token fills the place: see :func:`tail_index`.
    """
    if copies is None:
        return tokens
    index = tail_index(copies, tokens.shape[1], lengths)
    tail = jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1)
    return jnp.concatenate([tokens, jnp.tile(tail, (1, copies.hidden))], axis=1)


def tail_index(
    copies: Copies, tokens: int, lengths: Int[Array, "B"]
) -> Int[Array, "B A"]:
    """Returns the places in a call of the tokens that are repeated; negative: none.

    The last A of a row hold all of its last chunk of C that the call brings. What they
    hold of the chunk before is seen by nobody.
    """
    size = copies.tail(tokens)
    return lengths[:, None] - size + jnp.arange(size, dtype=jnp.int32)


def of_tokens(
    copies: Copies | None, hidden: Float[Array, "B N E"], lengths: Int[Array, "B"]
) -> Float[Array, "B T E"]:
    """Returns a hidden state a token of a call: of a row's newest, its last copy's.

    The others' are those of originals, which predict nothing.
    """
    if copies is None:
        return hidden
    originals = hidden[:, : copies.tokens(hidden.shape[1])]
    place = jnp.arange(originals.shape[1], dtype=jnp.int32)
    is_newest = place == lengths[:, None] - 1
    return jnp.where(is_newest[..., None], hidden[:, -1:], originals)
