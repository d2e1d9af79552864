"""Pages that can hold the support of entmax attention, piece by piece (EntmaxKV).

Entmax gives weight 0 to every key whose score stays below a threshold, so that what is
left out costs nothing as long as it stays below. Bounds on a page's scores, or their
mean and deviation, and an estimate of the threshold say which pages to read; a bound
and the threshold of what was read prove, afterwards, that nothing was missed.

Scores are s = sm_scale * q . k, under ALiBi plus slope * (i - (S - 1)) for token i of
S. With a = alpha - 1, z = a * s and the weight is max(z - tau, 0) ** (1 / a):
thresholds are in units of z, bounds and moments in units of s. A page is historical if
it lies before the page T = (S - 1) // P of the newest token, which is always read.
Thresholds are in :mod:`kvjax.methods.entmaxkv.threshold`.

    K   entries of a list of pages
"""

import statistics

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import selection
from pallas_kernels import page_scores
from pallas_kernels.topk import top_k

SMALLEST_DEVIATION = 1e-6


def newest_page(length: Int[Array, "B"], page_size: int) -> Int[Array, "B"]:
    """The page T of the newest token; -1 in an empty row."""
    return (length - 1) // page_size


def is_historical(
    length: Int[Array, "B"], num_pages: int, page_size: int
) -> Bool[Array, "B NP"]:
    """Says which pages come before the newest token's: only those are chosen."""
    page = jnp.arange(num_pages, dtype=jnp.int32)
    return page < newest_page(length, page_size)[:, None]


def score_bounds(
    q: Float[Array, "B Hq D"],
    page_min: Float[Array, "B Hkv NP D"],
    page_max: Float[Array, "B Hkv NP D"],
    *,
    sm_scale: float,
    slopes: Float[Array, "Hq"] | None = None,
    length: Int[Array, "B"] | None = None,
    page_size: int = 0,
) -> Float[Array, "B Hq NP"]:
    """Bounds U: no score of the page exceeds it, whatever the query's signs.

    Args:
        q: rotated queries; query head h reads KV head h // G.
        page_min, page_max: extremes of each page's rotated keys.
        sm_scale: factor on the products, at least 0.
        slopes: of ALiBi, a query head each; needs `length` and `page_size`.
        length: tokens S of each row, the newest included.
        page_size: tokens of a page.
    """
    bounds = sm_scale * page_scores.page_bounds(q, page_min, page_max)
    if slopes is None:
        return bounds
    # The position of the page where the bias is largest.
    within = jnp.where(slopes >= 0, page_size - 1.0, 0.0)
    return bounds + _bias(slopes, within, length, page_size, bounds.shape[-1])


def score_moments(
    q: Float[Array, "B Hq D"],
    page_mean: Float[Array, "B Hkv NP D"],
    page_variance: Float[Array, "B Hkv NP D"],
    *,
    sm_scale: float,
    slopes: Float[Array, "Hq"] | None = None,
    length: Int[Array, "B"] | None = None,
    page_size: int = 0,
) -> tuple[Float[Array, "B Hq NP"], Float[Array, "B Hq NP"]]:
    """Computes mu and sigma of each page's scores, elements of keys independent.

    Arguments as :func:`score_bounds`; the statistics in float32.
    """
    q = q.astype(page_mean.dtype)
    mean, variance = page_scores.page_moments(q, page_mean, page_variance)
    mean, deviation = sm_scale * mean, sm_scale * jnp.sqrt(jnp.maximum(variance, 0.0))
    if slopes is None:
        return mean, deviation
    middle = jnp.full_like(slopes, (page_size - 1) / 2)
    return mean + _bias(slopes, middle, length, page_size, mean.shape[-1]), deviation


def _bias(
    slopes: Float[Array, "Hq"],
    within: Float[Array, "Hq"],
    length: Int[Array, "B"] | None,
    page_size: int,
    num_pages: int,
) -> Float[Array, "B Hq NP"]:
    if length is None or page_size < 1:
        raise ValueError(f"slopes need {length=} of each row and {page_size=} >= 1.")
    first = page_size * jnp.arange(num_pages, dtype=jnp.float32)
    newest = (length - 1).astype(jnp.float32)[:, None, None]
    return slopes[:, None] * (first + within[:, None] - newest)


def global_moments(
    mean: Float[Array, "B Hq NP"],
    deviation: Float[Array, "B Hq NP"],
    historical: Bool[Array, "B NP"],
) -> tuple[Float[Array, "B Hq"], Float[Array, "B Hq"]]:
    """Computes mu_g and sigma_g of all historical tokens, by total variance.

    sigma_g is at least 1e-6; without a historical page both are that of nothing: 0.
    """
    middle = _mean_of(mean, historical)
    spread = jnp.square(deviation) + jnp.square(mean - middle[..., None])
    deviation = jnp.sqrt(_mean_of(spread, historical))
    return middle, jnp.maximum(deviation, SMALLEST_DEVIATION)


def _mean_of(
    values: Float[Array, "B Hq NP"], historical: Bool[Array, "B NP"]
) -> Float[Array, "B Hq"]:
    number = jnp.maximum(historical.sum(-1), 1).astype(jnp.float32)[:, None]
    return jnp.where(historical[:, None], values, 0.0).sum(-1) / number


# --- the choice


def gaussian_margins(
    mean: Float[Array, "B Hq NP"],
    deviation: Float[Array, "B Hq NP"],
    tau: Float[Array, "B Hq"],
    historical: Bool[Array, "B NP"],
    *,
    alpha: float,
    page_size: int,
    max_quantile: float = 0.995,
    safety_margin_z: float = 0.0,
    excess: float = 0.1,
) -> Float[Array, "B Hq NP"]:
    """Measures how far, in z, a page's likely maximum is above the threshold's floor.

    Positive pages are those that the Gaussian selector reads; -inf for pages that are
    not historical. The likely maximum is the `max_quantile` of that of P normal scores.

    Args:
        mean, deviation: from :func:`score_moments`.
        tau: from :func:`kvjax.methods.entmaxkv.threshold.estimate_threshold`.
        historical: from :func:`is_historical`.
        alpha: of the entmax.
        page_size: tokens of a page, P.
        max_quantile: in (0, 1).
        safety_margin_z: lowers the floor by so many global deviations.
        excess: lowers it by this share of what tau_hat exceeds a typical page by.
    """
    a = alpha - 1
    z_page = statistics.NormalDist().inv_cdf(max_quantile ** (1 / page_size))
    _, spread = global_moments(mean, deviation, historical)
    typical = _mean_of(mean + 1.5 * deviation, historical)
    lowered = jnp.maximum(
        safety_margin_z * spread, excess * jnp.maximum(tau / a - typical, 0.0)
    )
    floor = (tau - a * lowered)[..., None]
    margins = a * (mean + z_page * deviation) - floor
    # Without a historical page tau is -inf, and nothing is chosen.
    return jnp.where(historical[:, None], margins, -jnp.inf)


def list_pages(
    scores: Float[Array, "B H NP"],
    length: Int[Array, "B"],
    *,
    page_size: int,
    size: int,
    order: str = "index",
) -> tuple[Int[Array, "B H K"], Int[Array, "B H"]]:
    """Lists the best historical pages, then the newest token's, then -1.

    Args:
        scores: -inf for pages that must not be chosen; others compete.
        length: tokens of each row.
        page_size: tokens of a page.
        size: most entries of a list, K, that of the newest page included.
        order: of the historical pages: "index", rising, or "score", best first.

    Returns:
        The lists, and how many pages each has.
    """
    num_pages = scores.shape[-1]
    tail = newest_page(length, page_size)[:, None, None]
    scores = jnp.where(
        is_historical(length, num_pages, page_size)[:, None], scores, -jnp.inf
    )
    if size == 1:
        chosen = jnp.full((*scores.shape[:2], 0), -1, jnp.int32)
    elif size >= num_pages and order == "index":
        # Room for all: beside the newest page no more than the others are historical.
        chosen = _pack(scores > -jnp.inf)
    else:
        chosen = top_k(scores, min(size - 1, num_pages), order=order)[1]
    missing = size - chosen.shape[-1]
    chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
    number = (chosen >= 0).sum(-1, dtype=jnp.int32)
    place = jnp.arange(size, dtype=jnp.int32)
    ids = jnp.where(place == number[..., None], tail, chosen)
    return ids, number + (tail[..., 0] >= 0).astype(jnp.int32)


def _pack(chosen: Bool[Array, "B H NP"]) -> Int[Array, "B H NP"]:
    """Lists the indices of what is True, then -1: no sort, a sum and a scatter."""
    num_pages = chosen.shape[-1]
    rank = jnp.where(
        chosen, jnp.cumsum(chosen, axis=-1, dtype=jnp.int32) - 1, num_pages
    )
    page = jnp.arange(num_pages, dtype=jnp.int32)

    def place(rank: Int[Array, "NP"]) -> Int[Array, "NP"]:
        return jnp.full(num_pages, -1, jnp.int32).at[rank].set(page, mode="drop")

    return jax.vmap(jax.vmap(place))(rank)


def certificate(
    bounds: Float[Array, "B Hq NP"],
    page_ids: Int[Array, "B H K"],
    tau: Float[Array, "B Hq"],
    length: Int[Array, "B"],
    *,
    alpha: float,
    page_size: int,
) -> Bool[Array, "B Hq"]:
    """Proves for which heads no page that was left out can have weight.

    The threshold of some keys never exceeds that of more. So a page whose bound stays
    below that of the keys read has no key in the support, and entmax over what was read
    is entmax over everything, to the rounding of the scores. A bound closer to the
    threshold than float32 tells apart proves nothing, nor does one that is not finite.

    Args:
        bounds: from :func:`score_bounds`.
        page_ids: what was read; H is Hkv or Hq. Without the newest token's page, which
            has no bound, nothing is proved.
        tau: threshold over it, in units of z.
        length: tokens of each row.
        alpha: of the entmax.
        page_size: tokens of a page.
    """
    num_pages = bounds.shape[-1]
    historical = is_historical(length, num_pages, page_size)[:, None]
    newest = newest_page(length, page_size)[:, None, None]
    is_newest = jnp.arange(num_pages, dtype=jnp.int32) == newest
    left = ~selection.is_listed(page_ids, num_pages) & (historical | is_newest)
    left = jnp.repeat(left, bounds.shape[1] // left.shape[1], axis=1)
    # Of many equal scores tau lies so close beneath them that it rounds to them.
    slack = 4 * jnp.finfo(jnp.float32).eps * jnp.abs(tau)
    below = (alpha - 1) * bounds <= (tau - slack)[..., None]
    return ~(left & ~(below & historical)).any(-1)
