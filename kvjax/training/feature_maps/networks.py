"""Networks of feature maps before they are trained, and the losses of a head.

A head's inputs are standardised; :func:`unstandardised` gives the same function of
rotated vectors as they are. arXiv:2604.05438, App. J and K.

    Q  queries of a step    S  tokens of a document, its prompt first
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.methods.topk_completion.feature_maps import Learned, Mlp, mlp_features

TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run of :func:`train`.

    Attributes:
        steps: gradient steps.
        lengths: prompt lengths in tokens, in turns; a map is good for what it has seen.
        features: F. Paper: the head dim.
        width, hidden: of the networks; not given by the paper.
        loss: `output`, the error of the merged output, or `paper`: KL, top band, false
            positives and mass. Only `output` needs values.
        queries: tokens after the prompt whose queries a document gives.
        batch: queries a head sees in a step.
        retrieved: of `output`: the share of the prompt that is retrieved is drawn
            evenly between these, on a log scale.
        mass_weight: of `output`: of the squared error of the log mass.
        kl_weight, top_weight, false_weight, over_weight: lambda_KL, lambda_top,
            lambda_fp, lambda_Z. Paper: 0.99, 1, 2, 4.
        band, huber, temperature: Delta, delta, tau. Paper: 8, 1, not given.
        num_sinks, tail: exact tokens around the middle.
        lr, clip: of Adam, falling to 0 as a cosine; norm of a head's gradient.
        save_every, log_every: steps.
    """

    steps: int = 1500
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    features: int = 16
    width: int = 32
    hidden: int = 32
    loss: Literal["output", "paper"] = "output"
    queries: int = 64
    batch: int = 16
    retrieved: tuple[float, float] = (0.002, 0.05)
    mass_weight: float = 0.1
    kl_weight: float = 0.99
    top_weight: float = 1.0
    false_weight: float = 2.0
    over_weight: float = 4.0
    band: float = 8.0
    huber: float = 1.0
    temperature: float = 1.0
    num_sinks: int = 4
    tail: int = 16
    lr: float = 2e-3
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self):
        names = ("steps", "features", "width", "hidden", "queries", "batch")
        for name in (*names, "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.loss not in ("output", "paper"):
            raise ValueError(f"loss={self.loss!r} must be output or paper.")
        if self.queries % self.batch:
            raise ValueError(
                f"queries={self.queries} must be a multiple of batch={self.batch}."
            )
        exact = self.num_sinks + self.tail
        if not self.lengths or min(self.lengths) <= exact:
            raise ValueError(
                f"lengths={self.lengths} must each exceed {exact}, num_sinks + tail."
            )
        low, high = self.retrieved
        if not 0 < low <= high < 1:
            raise ValueError(f"retrieved={self.retrieved} must rise within (0, 1).")

    @property
    def reuse(self) -> int:
        """Steps that share a document."""
        return self.queries // self.batch


class Moments(NamedTuple):
    """Moments of a head's inputs, to standardise them: folded in at the end."""

    mean: Float[Array, "*H D"]
    deviation: Float[Array, "*H"]


# --- networks


def initial(
    key: Array, settings: Settings, layers: int, heads: int, group: int, head_dim: int
) -> Learned:
    """Random networks with the gate shut (ReZero), one a head."""
    width, hidden, features = settings.width, settings.hidden, settings.features

    def networks(key, shape):
        keys = jax.random.split(key, 4)

        def matrix(key, rows, columns, gain=1.0):
            normal = jax.random.normal(key, (*shape, rows, columns), jnp.float32)
            return normal * (gain * rows**-0.5)

        def zeros(*size):
            return jnp.zeros((*shape, *size), jnp.float32)

        return Mlp(
            matrix(keys[0], head_dim, width),
            zeros(width),
            matrix(keys[1], width, hidden),
            zeros(hidden),
            matrix(keys[2], hidden, width),
            zeros(width),
            zeros(),
            matrix(keys[3], width, features, 0.5),
            zeros(features),
        )

    first, second = jax.random.split(key)
    return Learned(
        networks(first, (layers, heads)), networks(second, (layers, heads, group))
    )


def moments_of(x: Float[Array, "*H N D"]) -> Moments:
    """Mean by element, and one deviation for all elements."""
    mean = x.mean(-2)
    deviation = jnp.sqrt(jnp.square(x - mean[..., None, :]).mean((-2, -1)))
    return Moments(mean, jnp.maximum(deviation, 1e-6))


def unstandardised(net: Mlp, moments: Moments) -> Mlp:
    """The same function of inputs as they are."""
    w_in = net.w_in / moments.deviation[..., None, None]
    b_in = net.b_in - jnp.einsum("...d,...de->...e", moments.mean, w_in)
    return net._replace(w_in=w_in, b_in=b_in)


# --- losses of one KV head: q (G, Q, D), k and v (S, D)


def log_weights(
    nets: Learned, q: Float[Array, "G Q D"], k: Float[Array, "S D"]
) -> Float[Array, "G Q S"]:
    """shat = log sum_f exp(g_f + ell_f): P = exp(ell - c), Q = exp(g + c - m)."""
    ell = mlp_features(nets.keys, k)  # (S, F)
    g = mlp_features(nets.queries, q)  # (G, Q, F)
    highest = jax.lax.stop_gradient(ell.max(0))
    top = jax.lax.stop_gradient((g + highest).max(-1, keepdims=True))
    inner = jnp.einsum(
        "gqf,sf->gqs", jnp.exp(g + highest - top), jnp.exp(ell - highest)
    )
    return jnp.log(inner + TINY) + top


def _huber(x, delta):
    small = jnp.minimum(jnp.abs(x), delta)
    return small * (jnp.abs(x) - small / 2)


def paper_loss(
    student: Float[Array, "*B S"],
    teacher: Float[Array, "*B S"],
    middle: Bool[Array, "S"],
    settings: Settings,
) -> Float[Array, "*B"]:
    """lambda_KL L_KL + (1 - lambda_KL) (L_top + L_fp + L_Z, each by its lambda)."""
    best = jnp.where(middle, teacher, -jnp.inf).max(-1, keepdims=True)
    r = jnp.where(middle, teacher - best, -jnp.inf)
    safe = jnp.where(middle, r, 0.0)
    rhat = jnp.where(middle, student - best, 0.0)

    def log_softmax(x):
        return jax.nn.log_softmax(jnp.where(middle, x / settings.temperature, -jnp.inf))

    log_p, log_q = log_softmax(safe), log_softmax(rhat)
    gap = jnp.where(middle, log_p - log_q, 0.0)
    kl = settings.temperature**2 * (jnp.exp(log_p) * gap).sum(-1)

    def mean(x, where):
        count = jnp.maximum(where.sum(-1), 1).astype(jnp.float32)
        return jnp.where(where, x, 0.0).sum(-1) / count

    in_band = middle & (safe >= -settings.band)
    top = mean(_huber(rhat - safe, settings.huber), in_band)
    false = jnp.maximum(rhat + settings.band, 0.0)
    false = mean(_huber(false, settings.huber), middle & ~in_band)
    over = jax.nn.logsumexp(jnp.where(middle, rhat, -jnp.inf), axis=-1)
    over = over - jax.nn.logsumexp(r, axis=-1)
    over = _huber(jnp.maximum(over, 0.0), settings.huber)
    others = settings.top_weight * top + settings.false_weight * false
    others = others + settings.over_weight * over
    return settings.kl_weight * kl + (1 - settings.kl_weight) * others


def output_loss(
    student: Float[Array, "*B S"],
    teacher: Float[Array, "*B S"],
    v: Float[Array, "S D"],
    middle: Bool[Array, "S"],
    visible: Bool[Array, "*B S"],
    retrieved: Int[Array, ""],
    settings: Settings,
) -> Float[Array, "*B"]:
    """|yhat - y|^2 / |y|^2 + 0.1 (log Z error)^2 of the merged output, K retrieved."""
    logits = jnp.where(visible, teacher, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    truth = jnp.einsum("...s,sd->...d", jnp.exp(logits - lse), v)
    # The K best of the middle, by rank: K is drawn anew every step.
    ranked = jnp.sort(jnp.where(middle, teacher, -jnp.inf), axis=-1)[..., ::-1]
    least = jnp.take(ranked, retrieved - 1, axis=-1)[..., None]
    estimated = middle & (teacher < least)
    merged = jnp.where(estimated, student, logits)
    # An exploding map must still have a gradient.
    merged = jnp.where(estimated, jnp.minimum(merged, lse + 20.0), merged)
    total = jax.nn.logsumexp(merged, axis=-1, keepdims=True)
    found = jnp.einsum("...s,sd->...d", jnp.exp(merged - total), v)
    error = jnp.square(found - truth).sum(-1) / (jnp.square(truth).sum(-1) + TINY)
    return error + settings.mass_weight * jnp.square(total - lse)[..., 0]


def head_loss(
    nets: Learned,
    k: Float[Array, "S D"],
    v: Float[Array, "S D"],
    q: Float[Array, "G Q D"],
    first: Int[Array, ""],
    retrieved: Int[Array, ""],
    moments: tuple[Moments, Moments],
    sm_scale: float,
    settings: Settings,
) -> Float[Array, ""]:
    """The mean loss of the heads of a group on the queries of one step.

    Args:
        nets: of standardised inputs.
        q: queries of the tokens at `first`, `first + 1`, ...
        retrieved: K, of loss="output".
        moments: of keys and queries.
    """
    slots = jnp.arange(k.shape[0], dtype=jnp.int32)
    prompt = k.shape[0] - settings.queries
    middle = (slots >= settings.num_sinks) & (slots < prompt - settings.tail)
    positions = first + jnp.arange(q.shape[1], dtype=jnp.int32)
    visible = slots <= positions[:, None]
    plain = Learned(
        unstandardised(nets.keys, moments[0]), unstandardised(nets.queries, moments[1])
    )
    student = log_weights(plain, q, k)
    teacher = jnp.einsum("gqd,sd->gqs", q, k) * sm_scale
    if settings.loss == "paper":
        return paper_loss(student, teacher, middle, settings).mean()
    visible = jnp.broadcast_to(visible, teacher.shape)
    found = output_loss(student, teacher, v, middle, visible, retrieved, settings)
    return found.mean()
