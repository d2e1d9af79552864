"""Sizes of an 8B model, for what is counted and not run."""

from kvjax.evaluation.claims.session import SOFTMAX, Session
from kvjax.interface import CacheSpec, Traffic
from kvjax.rope import Rope

LONG = 131_072  # tokens
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LAYERS, WIDTH, MLP_WIDTH = 32, 4096, 14_336


def spec_of_8b(context: int, layer: int = 0) -> CacheSpec:
    """One layer of an 8B model over a cache of so many tokens, in bfloat16."""
    sizes = 1, HEADS, KV_HEADS, HEAD_DIM, context, "bfloat16", Rope(HEAD_DIM), 64
    return CacheSpec(*sizes, layer=layer, num_layers=LAYERS)


def traffic_of_8b(session: Session, method: str, context: int) -> Traffic:
    """The bytes of a step of one layer of an 8B model.

    Raises:
        NotMeasuredError: if the session's model does not attend by softmax.
    """
    session.model(SOFTMAX)
    return session.method(method).traffic(spec_of_8b(context), context)


def prompt_operations_of_8b(session: Session, method: str, tokens: int) -> int:
    """The operations that an 8B model takes for a prompt, but for its embeddings."""
    keys = KV_HEADS * HEAD_DIM
    matrices = 2 * WIDTH * (HEADS * HEAD_DIM + keys) + 3 * WIDTH * MLP_WIDTH
    work = session.method(method).hooks.work
    pairs = LAYERS * tokens * (tokens + 1) // 2
    if work is not None:
        pairs = sum(work(spec_of_8b(tokens, i), tokens) for i in range(LAYERS))
    # Queries with keys, and weights with values.
    return LAYERS * 2 * matrices * tokens + 4 * HEADS * HEAD_DIM * pairs
