"""A matrix with a low-rank one beside it, whose factors are trained."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


class Beside(NamedTuple):
    """A matrix W + A B that is not summed: it stands where W stood in the parameters.

    A gradient of A and B alone needs the products with W, and none of the size of W.
    """

    kernel: Float[Array, "I O"]
    down: Float[Array, "I R"]  # A, scaled
    up: Float[Array, "R O"]  # B

    @property
    def shape(self) -> tuple[int, int]:
        """The sizes of the matrix: inputs, outputs."""
        inputs, outputs = self.kernel.shape
        return inputs, outputs


def times(x: Float[Array, "B I"], matrix: Beside) -> Float32[Array, "B O"]:
    """Multiplies rows by W and by A and B, accumulated in float32."""

    def product(rows, factor):
        return jnp.matmul(rows, factor, preferred_element_type=jnp.float32)

    narrow = product(x, matrix.down).astype(x.dtype)
    return product(x, matrix.kernel) + product(narrow, matrix.up)
