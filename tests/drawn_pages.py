"""Small random pages, lists of them, and the pieces of EntmaxKV compiled for them."""

import functools

import jax
import numpy as np

from kvjax.methods.entmaxkv import attention, page_bounds, threshold
from kvjax.stores import page_statistics

B, HKV, G, D, P, NP = 2, 2, 2, 8, 4, 8
LENGTH = np.array([8 * P, 6 * P + 1], np.int32)  # a full newest page; one of one token
SCALE = D**-0.5
ALPHAS = (1.5, 2.0, 4 / 3)


def draw(seed=0, sharpness=3.0):
    """q (B, Hq, D), pages (B, Hkv, NP, P, 2 D), with clustered keys."""
    rng = np.random.default_rng(seed)
    q = sharpness * rng.standard_normal((B, HKV * G, D))
    pages = rng.standard_normal((B, HKV, NP, P, 2 * D))
    pages[..., :D] += rng.standard_normal((B, HKV, NP, 1, D))
    return q.astype(np.float32), pages.astype(np.float32)


def lists(*pages):
    """The same list for every row and KV head."""
    return np.broadcast_to(np.array(pages, np.int32), (B, HKV, len(pages)))


@functools.partial(jax.jit, static_argnames=("alpha", "tau_mode", "steps"))
def attend(q, pages, ids, length, tau_hat=None, *, alpha, tau_mode="exact", steps=3):
    options = {"sm_scale": SCALE, "tau_mode": tau_mode, "tau_hat": tau_hat}
    return attention.attend_pages(
        q, pages, ids, length, alpha=alpha, steps=steps, **options
    )


@functools.partial(jax.jit, static_argnames="alpha")
def attend_certified(q, pages, bounds, first, length, *, alpha):
    return attention.attend_certified(
        q, pages, bounds, first, length, sm_scale=SCALE, alpha=alpha
    )


@jax.jit
def statistics_of(keys):
    return page_statistics.page_statistics(keys)


@jax.jit
def bounds_of(q, low, high, slopes=None, length=None):
    more = {} if slopes is None else {"slopes": slopes, "length": length}
    return page_bounds.score_bounds(q, low, high, sm_scale=SCALE, page_size=P, **more)


@jax.jit
def moments_of(q, mean, variance, slopes=None, length=None):
    more = {} if slopes is None else {"slopes": slopes, "length": length}
    return page_bounds.score_moments(
        q, mean, variance, sm_scale=SCALE, page_size=P, **more
    )


@functools.partial(jax.jit, static_argnames="alpha")
def estimate(mean, deviation, count, *, alpha):
    return threshold.estimate_threshold(mean, deviation, count, alpha=alpha)


def rows(q, pages, ids):
    """b, h, scores (float64) and values of the listed tokens of every query head."""
    for b, h in np.ndindex(q.shape[:2]):
        kv = h // G
        own = ids[b, h * ids.shape[1] // q.shape[1]]
        kept = [
            (page, i)
            for page in own
            for i in range(P if page >= 0 else 0)
            if page * P + i < LENGTH[b]
        ]
        tokens = np.array([pages[b, kv, page, i] for page, i in kept], np.float64)
        yield b, h, SCALE * tokens[:, :D] @ q[b, h].astype(np.float64), tokens[:, D:]


EVERY = lists(*range(NP))
