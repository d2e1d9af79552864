"""The search of InfiniteHiP: stages of ever smaller chunks, one list for a layer.

Each stage keeps the best chunks of those that the last one kept, and runs again after
steps of its own. In place of the tree over all pages.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import heads
from kvjax.interface import CacheSpec, Diagnostics
from kvjax.methods.hip import page_lists
from kvjax.methods.hip.options import Options, Stage
from kvjax.stores import buffers, contiguous, paged, step
from pallas_kernels import topk
from pallas_kernels.page_attention import page_attention


class StagesState(NamedTuple):
    """State of :func:`kvjax.hip` with search="stages", one layer."""

    store: paged.Paged
    # First tokens of the chunks that each stage kept, -1 = none. In order of position,
    # but for the last stage, whose best are first.
    kept: tuple[Int[Array, "B 1 C"], ...]
    begun: Int[Array, "B"]  # the oldest page of the window when the first stage ran
    steps: Int[Array, "B"]

    KEEPS_NEWEST = True


def init(options: Options, spec: CacheSpec) -> StagesState:
    """Makes an empty store, and stages that have kept nothing."""
    return StagesState(
        paged.paged(spec, options.page_size, extremes=False),
        tuple(
            buffers.allocate((spec.batch, 1, chunks), jnp.int32, fill=-1.0)
            for chunks in sizes(options, spec)
        ),
        begun=buffers.lengths(spec),
        steps=buffers.lengths(spec),
    )


def sizes(options: Options, spec: CacheSpec) -> list[int]:
    """Counts the chunks that each stage keeps, no more than it can have to score."""
    first, *_ = options.stages
    found, scored = [], -(-max(spec.capacity - options.num_sinks, 1) // first.chunk)
    for stage, after in zip(options.stages, [*options.stages[1:], None], strict=True):
        found.append(min(stage.kept, scored))
        if after is not None:
            scored = found[-1] * (stage.chunk // after.chunk)
    return found


def prefill(
    state: StagesState,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B Hkv T D"],
    v: Float[Array, "B Hkv T D"],
    lengths: Int[Array, "B"],
) -> tuple[StagesState, Float[Array, "B Hq T D"]]:
    """Attends from the prompt in full."""
    store, out = step.prefill(state.store, q, k, v, lengths)
    return state._replace(store=store), out


def append(
    state: StagesState, k: Float[Array, "B Hkv 1 D"], v: Float[Array, "B Hkv 1 D"]
) -> StagesState:
    """Writes the next token."""
    return state._replace(store=paged.extend(state.store, k, v))


def inspect_step(
    options: Options, state: StagesState, q: Float[Array, "B Hq 1 D"]
) -> tuple[StagesState, Float[Array, "B Hq 1 D"], Diagnostics]:
    """Attends to sinks, window, and the pages that the stages came to."""
    store, spec = state.store, state.store.spec
    rotated, positions = contiguous.rotate_queries(spec, q, store.length)
    state = refreshed(options, state, rotated, positions[:, 0])
    listed = list_pages(options, state, positions[:, 0])
    listed = jnp.broadcast_to(listed, (spec.batch, spec.num_kv_heads, listed.shape[-1]))
    out, lse = page_attention(
        rotated, store.pages, listed, positions, sm_scale=spec.sm_scale
    )
    attended = paged.tokens_of(listed, options.page_size, store.length)
    diagnostics = step.diagnose(attended, lse, store.length)
    state = state._replace(steps=state.steps + 1)
    return state, out.astype(q.dtype), diagnostics


def refreshed(
    options: Options,
    state: StagesState,
    q: Float[Array, "B Hq 1 D"],
    position: Int[Array, "B"],
) -> StagesState:
    """Runs the stages that are due in a row; all that follow one that is, are too."""
    oldest = page_lists.first_of_window(options, position)
    begun = jnp.where(is_due(state, options.stages[0]), oldest, state.begun)
    # Tokens that the window leaves later are not lost: it keeps its oldest page.
    end = begun * options.page_size
    kept, chunks = [], first_chunks(options, state.store.spec)
    for stage, held in zip(options.stages, state.kept, strict=True):
        due = is_due(state, stage)

        def search(
            stage: Stage = stage,
            held: Int[Array, "B 1 C"] = held,
            due: Bool[Array, "B"] = due,
            chunks: Int[Array, "B 1 N"] = chunks,
        ) -> Int[Array, "B 1 C"]:
            best = best_chunks(options, state.store, q, stage, chunks, end, held)
            return jnp.where(due[:, None, None], best, held)

        kept.append(lax.cond(due.any(), search, lambda held=held: held))
        after = options.stages[len(kept) :]
        if after:
            chunks = parts_of(kept[-1], stage.chunk, after[0].chunk)
    return state._replace(kept=tuple(kept), begun=begun)


def is_due(state: StagesState, stage: Stage) -> Bool[Array, "B"]:
    """Says in which rows a stage runs in this step."""
    return state.steps % stage.stride == 0


def first_chunks(options: Options, spec: CacheSpec) -> Int[Array, "B 1 C"]:
    """Cuts the text behind the sinks into the chunks of the first stage."""
    chunk, sinks = options.stages[0].chunk, options.num_sinks
    number = -(-max(spec.capacity - sinks, 1) // chunk)
    starts = sinks + chunk * jnp.arange(number, dtype=jnp.int32)
    return jnp.broadcast_to(starts, (spec.batch, 1, number))


def parts_of(chunks: Int[Array, "B 1 C"], size: int, part: int) -> Int[Array, "B 1 N"]:
    """Cuts chunks of `size` tokens into parts, -1 those of none."""
    within = part * jnp.arange(size // part, dtype=jnp.int32)
    starts = jnp.where(chunks[..., None] < 0, -1, chunks[..., None] + within)
    return starts.reshape(*chunks.shape[:2], -1)


def best_chunks(
    options: Options,
    store: paged.Paged,
    q: Float[Array, "B Hq 1 D"],
    stage: Stage,
    starts: Int[Array, "B 1 N"],
    end: Int[Array, "B"],
    held: Int[Array, "B 1 C"],
) -> Int[Array, "B 1 C"]:
    """Returns the chunks of the highest scores, as many as are `held`.

    Args:
        options: of the method.
        store: of the layer.
        q: rotated.
        stage: that runs.
        starts: first tokens of the chunks to choose from, -1 = none.
        end: of the tokens to choose from: chunks before it may be cut short.
        held: by the stage so far.
    """
    size = jnp.clip(end[:, None, None] - starts, 0, stage.chunk)
    size = jnp.where(starts < 0, 0, size)
    scores = chunk_scores(store, q, jnp.maximum(starts, 0), size, stage.chunk)
    is_last = stage == options.stages[-1]
    _, chosen = topk.top_k(
        scores,
        held.shape[-1],
        where=size > 0,
        order="score" if is_last else "index",
    )
    best = jnp.take_along_axis(starts, jnp.maximum(chosen, 0), axis=-1)
    return jnp.where(chosen < 0, -1, best)


def chunk_scores(
    store: paged.Paged,
    q: Float[Array, "B Hq 1 D"],
    starts: Int[Array, "B 1 N"],
    size: Int[Array, "B 1 N"],
    most: int,
) -> Float[Array, "B 1 N"]:
    """Scores chunks by the best token that any query head of the layer comes to.

    Alg. 3: a head halves a chunk, goes on with the half whose first token's product
    with the query is higher, the left one of equals, and ends with a token.

    Args:
        store: of the layer.
        q: rotated.
        starts, size: of the chunks, which may be empty.
        most: the largest size.
    """
    spec = store.spec
    shape = spec.batch, spec.num_q_heads, starts.shape[-1]
    starts, size = (jnp.broadcast_to(x, shape) for x in (starts, size))

    def products(tokens: Int[Array, "B Hq N"]) -> Float[Array, "B Hq N"]:
        keys = paged.keys_from(store, tokens)[:, :, :, 0]
        return jnp.einsum(
            "bhd,bhnd->bhn", q[:, :, 0], keys, preferred_element_type=jnp.float32
        )

    def halve(
        _: Int[Array, ""], found: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        token, size, best = found
        left = size // 2
        other = products(token + left)
        goes_right = (other > best) & (size > 1)
        size = jnp.where(goes_right, size - left, jnp.where(size > 1, left, size))
        token = jnp.where(goes_right, token + left, token)
        return token, size, jnp.where(goes_right, other, best)

    rounds = (most - 1).bit_length()
    found = starts, size, products(starts)
    *_, best = lax.fori_loop(0, rounds, halve, found)
    return heads.largest(spec, best)[:, None]


def list_pages(
    options: Options, state: StagesState, position: Int[Array, "B"]
) -> Int[Array, "B 1 K"]:
    """Lists window, sinks, and the best pages that the last stage kept.

    Pages that have begun since the first stage ran join the window, each in the place
    of the lowest score: the budget holds.
    """
    parts, page_size = options.parts(state.store.spec), options.page_size
    current = (position // page_size)[:, None]
    begun = state.begun[:, None]
    newest = current - jnp.arange(parts.newest + options.pages_begun, dtype=jnp.int32)
    newest = jnp.where(newest >= begun, newest, -1)
    sinks = jnp.arange(parts.sinks, dtype=jnp.int32)
    sinks = jnp.where(sinks < begun, sinks, -1)
    found = state.kept[-1][:, 0]
    more = jnp.maximum(current + 1 - begun - options.window_pages, 0)
    rank = jnp.arange(found.shape[-1], dtype=jnp.int32)
    # The last stage's chunks are pages.
    pages = jnp.where((found >= 0) & (rank < parts.chosen - more), found, -page_size)
    return jnp.concatenate([newest, sinks, pages // page_size], axis=-1)[:, None]
