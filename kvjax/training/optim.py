"""Learning rates and optimizers from a config, all of them optax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from kvjax.interface import Params
from kvjax.training.config import Config

# Muon's updates have this root mean square, which is about that of adamw's.
_MUON_RMS = 0.2


def schedule(config: Config) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """`rate(step)`, step counted from 0, elementwise: float32."""
    optimizer, total = config.optimizer, config.steps
    warmup, final = optimizer.warmup, optimizer.final

    def rate(step):
        step = jnp.asarray(step).astype(jnp.float32)
        rising = jnp.minimum(1.0, (step + 1.0) / max(warmup, 1))
        if optimizer.schedule == "constant":
            # The first decay step is a part below the rate, the last is at `final`.
            left = (total - 1.0 - step) / max(optimizer.decay_steps, 1)
            if not optimizer.decay_steps:
                left = jnp.ones_like(step)
            falling = final + (1.0 - final) * jnp.clip(left, 0.0, 1.0)
        else:
            # 0 when warm-up ends, 1 at the last step.
            done = (step + 1.0 - warmup) / max(total - warmup, 1)
            done = jnp.clip(done, 0.0, 1.0)
            if optimizer.schedule == "cosine":
                done = 0.5 - 0.5 * jnp.cos(jnp.pi * done)
            falling = 1.0 - (1.0 - final) * done
        return optimizer.lr * rising * falling

    return rate


def optimizer(config: Config, vocab_size: int) -> optax.GradientTransformation:
    """Clipping, then adamw or muon, with weight decay on matrices only.

    Args:
        vocab_size: muon leaves matrices with an axis of this size, embedding and
            output, to adamw.
    """
    settings = config.optimizer
    rate = schedule(config)

    def is_matrix(params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    update = optax.adamw(
        rate,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=is_matrix,
    )
    if settings.name == "muon":

        def labels(params: Params) -> Params:
            def label(leaf):
                is_inner = leaf.ndim == 2 and vocab_size not in leaf.shape
                return "muon" if is_inner else "adamw"

            return jax.tree.map(label, params)

        muon = optax.contrib.muon(
            rate,
            beta=settings.b1,
            weight_decay=settings.weight_decay,
            consistent_rms=_MUON_RMS,
        )
        update = optax.partition({"muon": muon, "adamw": update}, labels)
    if settings.clip:
        update = optax.chain(optax.clip_by_global_norm(settings.clip), update)
    return _promoting(update)


def _promoting(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    # optax relies on the promotion that JAX's strict mode forbids.
    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return tx.init(params)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(init, update)
