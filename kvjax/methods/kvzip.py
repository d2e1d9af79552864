"""KVzip: the tokens that the model looks at when it repeats the prompt stay."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.attention import selection
from kvjax.attention.partials import softmax_only
from kvjax.attention.typed import typed
from kvjax.interface import CacheSpec, Method, Rereading, Traffic
from kvjax.stores import buffers, contiguous, kept_prompt, step
from pallas_kernels.decode_attention import decode_logits

WORDS = "Repeat the previous context:"
# Of each head: weights that exist at once.
TILE = 256  # queries
BLOCK = 512  # keys


class KVzipPrompt(NamedTuple):
    """State of :func:`kvzip` until the prompt ends, one layer."""

    store: contiguous.Contiguous
    scores: Float[Array, "B Hkv S"]  # the largest weight so far, of what is read again


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`kvzip`."""

    budget: int
    chunk: int

    def __post_init__(self) -> None:
        budget, chunk = self.budget, self.chunk
        if budget < 1:
            raise ValueError(f"{budget=} must be at least 1 token.")
        if chunk < 1:
            raise ValueError(f"{chunk=} must be at least 1 token.")


@typed
@softmax_only
def kvzip(*, budget: int = 1024, chunk: int = 2048) -> Method:
    """Keeps the prompt tokens that the model needs to repeat it, and all later tokens.

    Once the prompt is read, the model reads it again behind the words "Repeat the
    previous context:", chunk by chunk, each behind the whole prompt. A token's
    importance is the largest attention weight that any token of the second reading
    gives it, in any query head of the group. It depends on no question: one cache
    serves all. The prompt is repeated at positions behind it, which the context must
    have room for. The second reading costs what the first does where the time goes with
    the tokens; of attention, which long prompts are mostly of, about three times that:
    every token attends to the whole prompt, not to what is before it, and its logits
    are taken once more for the scores.

    Args:
        budget: prompt tokens kept per KV head. Generated tokens come on top.
        chunk: prompt tokens that are repeated at once. Paper: 2048.

    Returns:
        A :class:`kvjax.Method`; its state is :class:`kvjax.stores.kept_slots.Kept`
        after `finish`.

    State: k, v `(B, Hkv, budget + max_new_tokens, D)` cache dtype; positions int32.
        What is appended is kept, on top of the budget.
        While the prompt runs: the whole cache, and a score of each token and KV head,
        float32.
    Reads per step and layer: 2*(budget + generated)*D*Hkv elements of KV, and as many
        positions, per row.
    Exact when: budget >= prompt length.

    Raises:
        ValueError: unless budget >= 1 and chunk >= 1.

    Source:
        Kim, Kim, Kwon, Lee, Yun, Song, "KVzip: Query-Agnostic KV Cache Compression with
        Context Reconstruction", NeurIPS 2025, arXiv:2505.23416.
    Deviations:
        A weight is one of the softmax over the whole cache and the chunk so far. The
        paper's chunked scoring takes the softmax anew over the keys of the repeated
        chunk alone, which is cheaper; here every chunk scores all keys. Each KV head
        has the budget; `head_budgets+kvzip` shares it out within a layer. The same
        words come before every chunk. The official code could not be consulted.

    Example:
        >>> method = kvjax.kvzip(budget=256)
        >>> state = method.init(spec)
    """
    options = Options(budget, chunk)
    return Method(
        init=init,
        prefill=prefill,
        finish=functools.partial(kept_prompt.finish, importance, budget),
        append=kept_prompt.append,
        inspect_step=kept_prompt.inspect_step,
        traffic=functools.partial(traffic, options),
        importance=importance,
        exact_prompt=True,
        reread=Rereading(read_again, options.chunk, WORDS),
    )


def init(spec: CacheSpec, weights: Any = None) -> KVzipPrompt:
    """Makes a store of the whole prompt; nothing was read again."""
    del weights
    shape = (spec.batch, spec.num_kv_heads, spec.capacity)
    scores = buffers.allocate(shape, jnp.float32, fill=0.0)
    return KVzipPrompt(contiguous.contiguous(spec), scores)


def prefill(
    state: KVzipPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[KVzipPrompt, Float[Array, "B Hq T D"]]:
    """Attends to everything."""
    store, out = step.prefill(state.store, q, k, v, lengths)
    return state._replace(store=store), out


def read_again(
    state: KVzipPrompt,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[KVzipPrompt, Float[Array, "B Hq T D"]]:
    """Attends to the prompt and the chunk, and notes the largest weights."""
    chunk = step.read_again(state.store, q, k, v, lengths)
    return state._replace(scores=raised(state, chunk)), chunk.out


def raised(state: KVzipPrompt, chunk: step.Chunk) -> Float[Array, "B Hkv S"]:
    """Returns the scores, raised to the largest weights that the chunk's tokens give.

    Tiles of queries over blocks of keys: no temporary grows with either.
    """
    store, spec = state.store, state.store.spec
    rows, slots = chunk.rotated.shape[2], spec.capacity
    tile, block = min(TILE, rows), min(BLOCK, slots)
    blocks = -(-slots // block)
    needed = jnp.clip((store.length.max() - 1) // block + 1, 0, blocks)

    def weigh(start: Int[Array, ""], first: Int[Array, ""]) -> Float[Array, "B Hkv s"]:
        """The largest weights that a tile's queries give a block's keys."""
        keys = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, start, block, 2), store.k
        )
        queries, lse = (
            lax.dynamic_slice_in_dim(x, first, tile, 2)
            for x in (chunk.rotated, chunk.lse)
        )
        seen = lax.dynamic_slice_in_dim(chunk.positions, first, tile, 1)
        held = (start + jnp.arange(block, dtype=jnp.int32))[None, None]
        logits = decode_logits(queries, keys, seen, held, sm_scale=spec.sm_scale)
        # A padded row sees nothing: its logits and its log-sum-exp are -inf.
        lse = jnp.where(lse == -jnp.inf, 0.0, lse)
        weights = jnp.exp(logits - lse[..., None]).max(2)
        return selection.reduce_group(weights, spec.num_kv_heads, "max")

    def raise_block(index: Int[Array, ""], scores: Array) -> Array:
        # The last ones are moved back: what is weighed twice has the same maximum.
        start = jnp.minimum(index.astype(jnp.int32) * block, slots - block)

        def raise_by(index: Int[Array, ""], best: Array) -> Array:
            first = jnp.minimum(index.astype(jnp.int32) * tile, rows - tile)
            return jnp.maximum(best, weigh(start, first))

        best = lax.dynamic_slice_in_dim(scores, start, block, 2)
        best = lax.fori_loop(0, -(-rows // tile), raise_by, best)
        return lax.dynamic_update_slice_in_dim(scores, best, start, 2)

    return lax.fori_loop(0, needed, raise_block, state.scores)


def importance(state: KVzipPrompt) -> Float[Array, "B Hkv S"]:
    """Returns what the second reading found."""
    return kept_prompt.with_certain(state.scores, state.store.length)


def traffic(options: Options, spec: CacheSpec, length: int) -> Traffic:
    """Counts the bytes at the end of the run, when every generated token is there."""
    return kept_prompt.traffic(options.budget, spec, length)
