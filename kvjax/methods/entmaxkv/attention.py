"""Entmax attention over listed pages in plain XLA, as many as there are; safe mode.

Keys first, in blocks of pages, up to the longest list; the threshold over the scores;
then the values, without the blocks that got no weight. The kernels of
:mod:`pallas_kernels.page_entmax` are faster where they run; here the threshold comes
out too, lists cost what they hold and not what they could, and pages can be added until
it is proved that no other page matters.

    L   query heads of a list, Hq // H        K   entries of a list of pages
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import selection
from kvjax.attention.choices import check_choice
from kvjax.methods.entmaxkv import page_bounds, threshold
from pallas_kernels.entmax import equations
from pallas_kernels.page_entmax import page_entmax
from pallas_kernels.shared import quantized
from pallas_kernels.shared.quantized import Quantized, Rows, floats
from pallas_kernels.topk import top_k

TauMode = Literal["exact", "fixed", "corrected"]

BLOCK = 2048  # tokens of a list that are read at once


class PageAttention(NamedTuple):
    """Entmax attention of one query row a head."""

    out: Float[Array, "B Hq D"]  # float32
    value: Float[Array, "B Hq"]  # as `pallas_kernels.entmax.entmax_attention`'s
    tau: Float[Array, "B Hq"]  # threshold, in units of z = (alpha - 1) * scores
    mass: Float[Array, "B Hq"]  # sum of the weights: 1 unless tau was only estimated


def fastest(
    attended: PageAttention,
    q: Float[Array, "B Hq 1 D"],
    pages: Float[Rows, "B Hkv NP P D2"],
    page_ids: Int[Array, "B H K"],
    positions: Int[Array, "B 1"],
    *,
    sm_scale: float,
    alpha: float,
) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
    """Returns output and value of :func:`attend_pages`, by a kernel where one runs.

    A CPU has no faster way than `attended`, which must be of the same arguments. XLA
    does not compute what is then unused of it.
    """

    def kernel(
        q: Array, pages: Array, page_ids: Array, positions: Array, *_: Array
    ) -> tuple[Array, Array]:
        out, value = page_entmax(
            q, pages, page_ids, positions, sm_scale=sm_scale, alpha=alpha
        )
        return out[:, :, 0], value[:, :, 0]

    arrays = q, pages, page_ids, positions, attended.out, attended.value
    return lax.platform_dependent(*arrays, cpu=lambda *x: x[4:], default=kernel)


Carry = TypeVar("Carry")
Index = int | Int[Array, ""]


class _Scored(NamedTuple):
    """Lists of pages in blocks of n, and the scores of the blocks read so far."""

    ids: Int[Array, "C B H n"]  # -1 = none
    held: Int[Array, "B H 1"]  # any listed page, read where there is none
    scores: Float[Array, "C B H L nP"]
    top: Float[Array, "B H L 1"]
    blocks: Int[Array, ""]


# What was read, which pages that are, tau of it, and by how much others are above it.
_Progress = tuple[
    _Scored,
    Bool[Array, "B H NP"],
    Float[Array, "B H L 1"],
    Float[Array, "B H NP"],
]


def attend_pages(
    q: Float[Array, "B Hq D"],
    pages: Float[Rows, "B Hkv NP P D2"],
    page_ids: Int[Array, "B H K"],
    length: Int[Array, "B"],
    *,
    sm_scale: float,
    alpha: float,
    tau_mode: TauMode = "exact",
    tau_hat: Float[Array, "B Hq"] | None = None,
    steps: int = 3,
) -> PageAttention:
    """Attends to the listed pages, all of whose tokens below `length` are seen.

    Args:
        q: rotated queries of the newest tokens.
        pages: keys and values fused, D2 = 2 D; page p holds positions p * P onwards.
        page_ids: distinct, -1 = none, anywhere; H is Hkv or Hq. The time goes with the
            last one that is not -1.
        length: tokens of each row.
        sm_scale: factor on the products.
        alpha: above 1.
        tau_mode: `exact` solves for the threshold; `fixed` takes `tau_hat` for it, and
            `corrected` moves that by `steps` of
            :func:`kvjax.methods.entmaxkv.threshold.correct_threshold`. Both may leave a
            mass other than 1, by which nothing is divided.
        tau_hat: from :func:`kvjax.methods.entmaxkv.threshold.estimate_threshold`. Where
            it is -inf, there was nothing to estimate it from, and the exact one is
            taken.
        steps: of the correction.

    Raises:
        ValueError: if alpha is not above 1, or a mode is not known or needs a `tau_hat`
            that is not given.
    """
    if not alpha > 1:
        raise ValueError(f"{alpha=} must be above 1: entmax of 1 is softmax.")
    check_choice("tau_mode", tau_mode, TauMode)
    if tau_mode != "exact" and tau_hat is None:
        raise ValueError(f"{tau_mode=} needs tau_hat.")
    page_size = pages.shape[3]
    listed = page_ids.shape[2]
    size = min(max(BLOCK // page_size, 1), listed)
    padded = jnp.pad(
        page_ids, ((0, 0), (0, 0), (0, -listed % size)), constant_values=-1
    )
    ids = jnp.moveaxis(padded.reshape(*page_ids.shape[:2], -1, size), 2, 0)
    last = jnp.where(
        ids >= 0, jnp.arange(len(ids), dtype=jnp.int32)[:, None, None, None], -1
    )
    grouped = q.reshape(q.shape[0], page_ids.shape[1], -1, q.shape[2])
    empty = _Scored(
        ids,
        page_ids.max(-1, keepdims=True),
        jnp.zeros((len(ids), *grouped.shape[:3], size * page_size), jnp.float32),
        jnp.full((*grouped.shape[:3], 1), -jnp.inf, jnp.float32),
        last.max() + 1,
    )

    def read(block: Index, scored: _Scored) -> _Scored:
        return _add_scores(scored, block, grouped, pages, length, sm_scale)

    scored = _over_blocks(empty, read, empty)
    if tau_mode == "exact" or tau_hat is None:
        tau = _threshold(scored, alpha)
        return _attend(scored, tau, pages, alpha, q.shape)
    whole = jnp.moveaxis(scored.scores, 0, 3)
    seen = jnp.arange(len(ids), dtype=jnp.int32) < scored.blocks
    whole = jnp.where(seen[:, None], whole, -jnp.inf).reshape(*grouped.shape[:3], -1)
    tau = tau_hat.reshape(grouped.shape[:3])
    if tau_mode == "corrected":
        tau = threshold.correct_threshold(whole, tau, alpha=alpha, steps=steps)
    relative = tau[..., None] - (alpha - 1) * _finite(scored.top)
    is_known = tau_hat.reshape(relative.shape) > -jnp.inf
    relative = lax.cond(
        is_known.all(),
        lambda: relative,
        lambda: jnp.where(is_known, relative, _threshold(scored, alpha)),
    )
    return _attend(scored, relative, pages, alpha, q.shape, normalise=False)


def attend_certified(
    q: Float[Array, "B Hq D"],
    pages: Float[Rows, "B Hkv NP P D2"],
    bounds: Float[Array, "B Hq NP"],
    first: Int[Array, "B H K"],
    length: Int[Array, "B"],
    *,
    sm_scale: float,
    alpha: float,
) -> tuple[PageAttention, Int[Array, "B H M"], Bool[Array, "B Hq"]]:
    """Computes exact entmax attention over every page, reading those that may matter.

    Reads the `first` K pages of each list, then K at a time, those next whose bound is
    furthest above the threshold so far, until every other page is at or below it. The
    threshold only rises, so no page is read in vain that could have been ruled out
    before. A list that is done reads nothing more while others go on.

    Args:
        q, pages, length, sm_scale, alpha: as :func:`attend_pages`.
        bounds: from :func:`kvjax.methods.entmaxkv.page_bounds.score_bounds`.
        first: the newest token's page among them; H is Hkv or Hq.

    Returns:
        The attention, the pages read (-1 = none, anywhere; M is NP or a bit more), and
        for which heads it is proved exact: all, unless numbers are not finite.
    """
    batch, lists, size = first.shape
    num_pages, page_size = pages.shape[2:4]
    blocks = -(-num_pages // size)
    grouped = q.reshape(batch, lists, -1, q.shape[2])
    of_list = bounds.reshape(batch, lists, -1, num_pages)
    heads = grouped.shape[:3]
    historical = page_bounds.is_historical(length, num_pages, page_size)[:, None]

    def read(
        block: Int[Array, ""],
        ids: Int[Array, "B H K"],
        scored: _Scored,
        is_read: Bool[Array, "B H NP"],
    ) -> _Progress:
        all_ids = lax.dynamic_update_index_in_dim(scored.ids, ids, block, 0)
        scored = scored._replace(ids=all_ids, blocks=block + 1)
        scored = _add_scores(scored, block, grouped, pages, length, sm_scale)
        tau = _threshold(scored, alpha)
        is_read |= selection.is_listed(ids, num_pages)
        above = equations.shifted(of_list, scored.top, alpha) - tau
        margins = jnp.where(historical & ~is_read, above.max(2), -jnp.inf)
        return scored, is_read, tau, margins

    def is_due(carry: _Progress) -> Bool[Array, ""]:
        scored, *_, margins = carry
        return (scored.blocks < blocks) & (margins > 0).any()

    def advance(carry: _Progress) -> _Progress:
        scored, is_read, _, margins = carry
        ids = top_k(margins, size, where=margins > 0, order="index")[1]
        return read(scored.blocks, ids, scored, is_read)

    nothing = _Scored(
        jnp.full((blocks, batch, lists, size), -1, jnp.int32),
        first.max(-1, keepdims=True),
        jnp.full((blocks, *heads, size * page_size), -jnp.inf, jnp.float32),
        jnp.full((*heads, 1), -jnp.inf, jnp.float32),
        jnp.int32(0),
    )
    unread = jnp.zeros((batch, lists, num_pages), bool)
    carry = lax.while_loop(is_due, advance, read(jnp.int32(0), first, nothing, unread))
    scored, is_read, tau, _ = carry
    above = equations.shifted(of_list, scored.top, alpha) - tau
    left = (historical & ~is_read)[:, :, None]
    exact = ~(left & ~(above <= 0)).any(-1).reshape(q.shape[:2])
    ids = jnp.moveaxis(scored.ids, 0, 2).reshape(batch, lists, -1)
    return _attend(scored, tau, pages, alpha, q.shape), ids, exact


def _over_blocks(
    scored: _Scored, body: Callable[[Index, Carry], Carry], init: Carry
) -> Carry:
    """Runs `body(block, carry)` for the blocks read so far; without a loop if one."""
    if len(scored.ids) == 1:
        return body(0, init)
    return lax.fori_loop(0, scored.blocks, body, init)


def _add_scores(
    scored: _Scored,
    block: Index,
    grouped: Float[Array, "B H L D"],
    pages: Float[Rows, "B Hkv NP P D2"],
    length: Int[Array, "B"],
    sm_scale: float,
) -> _Scored:
    """Adds the scores of one block of pages, -inf where there is no token."""
    page_size, width = pages.shape[3:]
    ids = scored.ids[block]

    def scores_of(q: Array, keys: Array) -> Array:
        return jnp.einsum(
            "bhld,bhsd->bhls", q, keys, preferred_element_type=jnp.float32
        )

    listed = jnp.where(ids < 0, scored.held, ids)
    scores = sm_scale * _per_list(scores_of, pages, listed, 0, width // 2, grouped)
    position = ids[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
    seen = (ids[..., None] >= 0) & (position < length[:, None, None, None])
    seen = seen.reshape(*ids.shape[:2], 1, -1)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.maximum(scored.top, scores.max(-1, keepdims=True))
    buffer = lax.dynamic_update_index_in_dim(scored.scores, scores, block, 0)
    return scored._replace(scores=buffer, top=top)


def _per_list(
    function: Callable[[Array, Array], Array],
    pages: Float[Rows, "B Hkv NP P D2"],
    ids: Int[Array, "B H n"],
    start: int,
    width: int,
    rows: Float[Array, "B H L X"],
) -> Float[Array, "B H L Y"]:
    """Calls `function(rows, part (B, H, n * P, width))` on the listed pages."""
    batch, num_kv_heads, num_pages, page_size, _ = pages.shape
    lists, listed = ids.shape[1:]
    flat = jax.tree.map(lambda x: x.reshape(-1, page_size, x.shape[-1]), pages)
    head = jnp.arange(batch * lists, dtype=jnp.int32) // (lists // num_kv_heads)
    index = head.reshape(batch, lists, 1) * num_pages + jnp.maximum(ids, 0)

    # A slice of each page: keys without values, or the reverse.
    def read(page: Int[Array, ""]) -> Float[Array, "P width"]:
        if isinstance(flat, Quantized):
            whole = jax.tree.map(lambda x: x[page], flat)
            return floats(quantized.split(whole)[0 if start == 0 else 1])
        where = page, jnp.int32(0), jnp.int32(start)
        return lax.dynamic_slice(flat, where, (1, page_size, width))[0]

    def at_once(
        rows: Float[Array, "b h L X"], index: Int[Array, "b h n"]
    ) -> Float[Array, "b h L Y"]:
        taken = jax.vmap(jax.vmap(jax.vmap(read)))(index)
        taken = taken.reshape(*index.shape[:2], listed * page_size, width)
        return function(rows, taken)

    def one_by_one(
        rows: Float[Array, "B H L X"], index: Int[Array, "B H n"]
    ) -> Float[Array, "B H L Y"]:
        # All at once, the CPU would gather anew in each of the product's loops.
        flattened = (
            rows.reshape(-1, 1, 1, *rows.shape[2:]),
            index.reshape(-1, 1, 1, listed),
        )
        results = lax.map(lambda x: at_once(*x), flattened)
        return results.reshape(batch, lists, *results.shape[3:])

    return lax.platform_dependent(rows, index, cpu=one_by_one, default=at_once)


def _finite(top: Float[Array, "B H L 1"]) -> Float[Array, "B H L 1"]:
    """Puts 0 for the largest score where nothing is seen: -inf makes all equal."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def _threshold(scored: _Scored, alpha: float) -> Float[Array, "B H L 1"]:
    """Solves for tau, relative to the largest score, over the blocks read so far."""
    number = scored.scores.shape[0] * scored.scores.shape[-1]
    top = _finite(scored.top)

    def sums(tau: Float[Array, "B H L 1"]) -> tuple[Array, Array]:
        def add(block: Index, totals: tuple[Array, Array]) -> tuple[Array, Array]:
            z = equations.shifted(scored.scores[block], top, alpha)
            first, second = (
                total + part.sum(-1, keepdims=True)
                for total, part in zip(
                    totals,
                    equations.powers(jnp.maximum(z - tau, 0.0), alpha),
                    strict=True,
                )
            )
            return first, second

        nothing = jnp.zeros_like(tau)
        return _over_blocks(scored, add, (nothing, nothing))

    start = jnp.full_like(scored.top, -1.0)
    return equations.find_tau(sums, start, number, alpha)


def _attend(
    scored: _Scored,
    tau: Float[Array, "B H L 1"],
    pages: Float[Rows, "B Hkv NP P D2"],
    alpha: float,
    shape: tuple[int, ...],
    normalise: bool = True,
) -> PageAttention:
    """Sums the weighted values; blocks without weight are not read."""
    width = pages.shape[4] // 2
    top = _finite(scored.top)

    def add(
        block: Index, totals: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        out, mass, moment = totals
        z = equations.shifted(scored.scores[block], top, alpha)
        excess = jnp.maximum(z - tau, 0.0)
        p = equations.powers(excess, alpha)[0]

        def weigh(p: Array, values: Array) -> Array:
            return jnp.einsum(
                "bhls,bhsd->bhld",
                p.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )

        def add_values(out: Array) -> Array:
            ids = scored.ids[block]
            listed = jnp.where(ids < 0, scored.held, ids)
            return out + _per_list(weigh, pages, listed, width, width, p)

        out = lax.cond((p > 0).any(), add_values, lambda out: out, out)
        mass = mass + p.sum(-1, keepdims=True)
        return out, mass, moment + (p * excess).sum(-1, keepdims=True)

    nothing = jnp.zeros_like(tau)
    out = jnp.zeros((*tau.shape[:3], width), jnp.float32)
    totals = (out, nothing, nothing)
    out, mass, moment = _over_blocks(scored, add, totals)
    if normalise:
        out = out / equations.positive(mass)
    value = equations.value(top, tau, mass, moment, alpha)
    absolute = (alpha - 1) * top + tau
    flat = (x.reshape(shape[:2]) for x in (value, absolute, mass))
    return PageAttention(out.reshape(shape), *flat)
