"""One step of training: loss, gradient, update, as one pure compiled function.

The loss of a batch is `sum(weights * cross_entropy) / sum(weights)`, whatever the
number of accumulated parts and of devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kvjax import copies
from kvjax.interface import CacheSpec, Params, layer_specs
from kvjax.training import sharding
from kvjax.training.attention import by_layer, causal_attention
from kvjax.training.batch import Batch
from kvjax.training.config import Config, RefreshKV
from kvjax.training.phd import phd_attention
from kvjax.training.refreshkv import refresh_attention

# Logits held at once, elements per device; beyond that the loss is computed in chunks.
MAX_LOGITS = 2**27


@runtime_checkable
class TrainableLM(Protocol):
    """A model as training needs it: pure functions of `params`, static, hashable."""

    num_layers: int
    vocab_size: int
    context: int  # longest sequence the model was made for, tokens
    alpha: float  # of attention's normaliser: 1 is softmax, more is entmax

    def param_shapes(self) -> Params: ...

    def cache_spec(
        self, batch: int, capacity: int, max_new_tokens: int = 0, layer: int = 0
    ) -> CacheSpec: ...

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention: Callable[[int, Array, Array, Array], Array],
        *,
        remat: bool = False,
    ) -> Float[Array, "B T E"]: ...

    def logits(
        self, params: Params, hidden: Float[Array, "*B E"]
    ) -> Float[Array, "*B V"]: ...


@runtime_checkable
class AdaptedLM(TrainableLM, Protocol):
    """A model of frozen weights, beside which `params` are trained."""

    def frozen_shapes(self) -> Params: ...

    def join(self, frozen: Params, params: Params) -> Params:
        """Returns what `hidden` and `logits` take, from both."""
        ...


class TrainState(NamedTuple):
    """Everything that steps change; all weights float32.

    `average` is the running mean of the weights, None where there is none. `finite`
    turns false at a step whose loss or gradient is not: from then on the state stays as
    it was before that step.
    """

    params: Params
    average: Params | None
    opt_state: optax.OptState
    step: Int[Array, ""]  # steps done
    finite: Bool[Array, ""]

    @property
    def weights(self) -> Params:
        """The weights that are evaluated and exported."""
        return self.params if self.average is None else self.average


def init_state(
    params: Params, tx: optax.GradientTransformation, config: Config
) -> TrainState:
    """The state before the first step, from weights of any float dtype.

    It has buffers of its own: a step donates them.

    Raises:
        ValueError: for integers, as packed weights have.
    """
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"weights of dtype={leaf.dtype} cannot be trained: load the model with "
                "weights=None."
            )
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return TrainState(
        params=params,
        average=jax.tree.map(jnp.copy, params) if config.optimizer.average else None,
        opt_state=tx.init(params),
        step=jnp.zeros((), jnp.int32),
        finite=jnp.ones((), bool),
    )


def state_shapes(
    decoder: TrainableLM,
    tx: optax.GradientTransformation,
    config: Config,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """`jax.ShapeDtypeStruct` of every leaf of the state, with its sharding."""
    shapes = jax.eval_shape(
        lambda params: init_state(params, tx, config), decoder.param_shapes()
    )
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=placed
        ),
        shapes,
        sharding.of_state(shapes, mesh),
    )


def frozen_shapes(
    decoder: TrainableLM, config: Config, mesh: jax.sharding.Mesh
) -> tuple[Params, ...]:
    """`jax.ShapeDtypeStruct`s of the frozen weights, with shardings; () without any.

    They have the dtype that is computed in, as nothing is added to them.
    """
    if not isinstance(decoder, AdaptedLM):
        return ()
    shapes, dtype = decoder.frozen_shapes(), jnp.dtype(config.precision.compute)
    return (
        jax.tree.map(
            lambda leaf, placed: jax.ShapeDtypeStruct(
                leaf.shape, dtype, sharding=placed
            ),
            shapes,
            sharding.of_state(shapes, mesh),
        ),
    )


def _joined(decoder: Any, params: Params, frozen: tuple[Params, ...]) -> Params:
    return decoder.join(*frozen, params) if frozen else params


@jax.custom_vjp
def cross_entropy(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
    """Nats of every target, and whether no token is likelier.

    The gradient is written out so that it passes over the logits once.
    """
    return _cross_entropy(logits, targets)[0]


def _cross_entropy(logits, targets):
    most = logits.max(-1)
    lse = most + jnp.log(jnp.exp(logits - most[..., None]).sum(-1))
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (lse - target, target >= most), (logits, targets, lse)


def _cross_entropy_gradient(kept, outer):
    logits, targets, lse = kept
    tokens = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    is_target = (tokens == targets[..., None]).astype(logits.dtype)
    weights = jnp.exp(logits - lse[..., None])
    return (weights - is_target) * outer[0][..., None], None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradient)


def token_losses(
    decoder: TrainableLM,
    params: Params,
    batch: Batch,
    *,
    compute: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    max_logits: int = MAX_LOGITS,
    setting: RefreshKV | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Cross-entropy in nats of every target, and whether it was the likeliest token.

    Args:
        compute: dtype of activations and products; losses are float32.
        remat: keep one hidden state a layer for the gradient.
        max_logits: elements; a batch with more is computed in chunks of the row, each
            of which the gradient computes again.
        setting: the last tokens of every row attend as RefreshKV decodes; None is full
            attention.

    Raises:
        ValueError: if a setting meets packed rows, or an entmax model.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(compute), params)
    num_rows, length = batch.tokens.shape
    ropes = [spec.rope for spec in layer_specs(decoder, num_rows, length)]
    fed = copies.of(decoder)
    if fed is not None and setting is not None:
        raise ValueError(
            f"refreshkv and {fed.count} copies of a token are each an attention of its "
            "own: leave one of them out."
        )
    if fed is not None:
        make = functools.partial(
            phd_attention,
            copies=fed,
            segments=batch.segments,
            positions=batch.positions,
        )
    elif setting is None:
        make = functools.partial(
            causal_attention,
            alpha=decoder.alpha,
            segments=batch.segments,
            positions=batch.positions,
        )
    else:
        make = _refresh(setting, batch, decoder.alpha)
    attention = by_layer(map(make, ropes))
    hidden = decoder.hidden(params, batch.tokens, attention, remat=remat)

    def losses(hidden, targets):
        return cross_entropy(decoder.logits(params, hidden), targets)

    num_chunks = math.ceil(num_rows * length * decoder.vocab_size / max_logits)
    if num_chunks <= 1:
        return losses(hidden, batch.targets)
    size = math.ceil(length / min(num_chunks, length))
    num_chunks = math.ceil(length / size)

    def chunks(x):  # (B, T, ...) -> (chunks, B, size, ...)
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, num_chunks * size - length)
        x = jnp.pad(x, padding)
        return x.reshape(num_rows, num_chunks, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(num_rows, -1)[:, :length]

    one = jax.checkpoint(losses)
    nats, right = jax.lax.map(
        lambda c: one(*c), (chunks(hidden), chunks(batch.targets))
    )
    return join(nats), join(right)


def _refresh(setting, batch, alpha):
    if batch.segments is not None or alpha != 1:
        raise ValueError(
            "refreshkv needs rows of one sequence and softmax attention; the rows are "
            f"{'packed' if batch.segments is not None else 'single'}, {alpha=}."
        )
    options = setting.model_dump(exclude={"decoded"})
    prompt = batch.tokens.shape[1] - setting.decoded
    return functools.partial(refresh_attention, prompt=prompt, **options)


def sums(
    batch: Batch, nats: Float[Array, "B T"], right: Bool[Array, "B T"], num_sources: int
) -> dict[str, Array]:
    """Sums that metrics are made of, one per source, `(num_sources,)` float32.

    `loss` weighted nats, `weight` their weights; `nats` unweighted over `targets`,
    those with weight; `right` of `answers`, `whole` of `rows` with an answer.
    """
    of_source = jax.nn.one_hot(batch.sources, num_sources, dtype=jnp.float32)

    def total(x):
        return jnp.einsum("bt,bts->s", x.astype(jnp.float32), of_source)

    counted = batch.weights > 0
    answered = batch.answers.any(-1)
    whole = answered & (right | ~batch.answers).all(-1)
    first = of_source[:, 0]
    return {
        "loss": total(nats * batch.weights),
        "weight": total(batch.weights),
        "nats": total(jnp.where(counted, nats, 0.0)),
        "targets": total(counted),
        "right": total(right & batch.answers),
        "answers": total(batch.answers),
        "whole": whole.astype(jnp.float32) @ first,
        "rows": answered.astype(jnp.float32) @ first,
    }


def make_train_step(
    decoder: TrainableLM,
    tx: optax.GradientTransformation,
    config: Config,
    mesh: jax.sharding.Mesh,
    *,
    max_logits: int = MAX_LOGITS,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`step(state, batch) -> (state, metrics)`, compiled once per shape of batch.

    Frozen weights, where there are any, follow the batch: they have no gradient. The
    state is donated. Metrics are :func:`sums` over the sources of the config, and
    `grad_norm` before clipping and `finite`, scalars. A step with a loss or gradient
    that is not finite changes nothing but the state's `finite`. Weights that overflow
    in an update are found by :func:`has_finite_weights`: if each step looked at them,
    all new ones would have to be there before an old one may be given up.
    """
    num_parts = config.optimizer.accumulate
    num_sources = len(config.sources)
    compute = jnp.dtype(config.precision.compute)
    keep = config.optimizer.average

    def weighted_sum(params, part, frozen):
        nats, right = token_losses(
            decoder,
            _joined(decoder, params, frozen),
            part,
            compute=compute,
            remat=config.remat,
            max_logits=max_logits * mesh.size,
            setting=config.refreshkv,
        )
        metrics = sums(part, nats, right, num_sources)
        return jnp.sum(nats * part.weights), metrics

    gradient = jax.grad(weighted_sum, has_aux=True)

    def accumulated(params, batch, frozen):
        if num_parts == 1:
            return gradient(params, batch, frozen)

        def parts(x):
            # Part a has rows a, a + parts, ...: every device keeps its own rows.
            return x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)

        def add(total, part):
            more = gradient(params, part, frozen)
            return jax.tree.map(jnp.add, total, more), None

        split = jax.tree.map(parts, batch)
        first = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(gradient, params, first, frozen)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, split)[0]

    def step(state: TrainState, batch: Batch, *frozen: Params):
        grads, metrics = accumulated(state.params, batch, frozen)
        weight = jnp.sum(batch.weights)
        grads = jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1.0), grads)
        norm = optax.tree.norm(grads)
        finite = state.finite & jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]).all()
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = None
        if state.average is not None:
            # The mean of the first steps forgets faster: it begins at random weights.
            count = state.step.astype(jnp.float32)
            rate = jnp.minimum(keep, (count + 1.0) / (count + 10.0))
            average = jax.tree.map(
                lambda old, new: rate * old + (1.0 - rate) * new, state.average, params
            )
        moved = TrainState(params, average, opt_state, state.step + 1, finite)
        kept = state._replace(finite=finite)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)
        return state, metrics | {"grad_norm": norm, "finite": finite}

    placed = sharding.of_state(state_shapes(decoder, tx, config, mesh), mesh)
    beside = sharding.of_state(frozen_shapes(decoder, config, mesh), mesh)
    return jax.jit(
        step,
        in_shardings=(placed, sharding.of_batch(mesh), *beside),
        out_shardings=(placed, sharding.replicated(mesh)),
        donate_argnums=0,
    )


@jax.jit
def has_finite_weights(state: TrainState) -> Bool[Array, ""]:
    """Returns whether the weights and their average are finite."""
    leaves = jax.tree.leaves((state.params, state.average))
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def make_check(
    decoder: TrainableLM, config: Config, mesh: jax.sharding.Mesh
) -> Callable[..., dict[str, Array]]:
    """`check(weights, batch) -> sums`, as of one source, without a gradient.

    Frozen weights follow the batch.
    """
    compute = jnp.dtype(config.precision.compute)

    def check(weights, batch, *frozen):
        nats, right = token_losses(
            decoder,
            _joined(decoder, weights, frozen),
            batch,
            compute=compute,
            max_logits=MAX_LOGITS * mesh.size,
            setting=config.refreshkv,
        )
        batch = batch._replace(sources=jnp.zeros_like(batch.sources))
        return sums(batch, nats, right, 1)

    placed = sharding.of_state(decoder.param_shapes(), mesh)
    beside = sharding.of_state(frozen_shapes(decoder, config, mesh), mesh)
    return jax.jit(
        check,
        in_shardings=(placed, sharding.of_batch(mesh), *beside),
        out_shardings=sharding.replicated(mesh),
    )


def summary(total: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """Readable metrics of :func:`sums`, over all sources and of each that occurred."""

    def ratio(above, below):
        return float(above.sum() / below.sum())

    record = {"loss": ratio(total["loss"], total["weight"])}
    record["bits"] = ratio(total["nats"], total["targets"]) / math.log(2)
    if total["answers"].sum():
        record["accuracy"] = ratio(total["right"], total["answers"])
    for index, name in enumerate(names):
        one = {key: value[index] for key, value in total.items() if value.ndim}
        if one["weight"]:
            record[f"loss/{name}"] = ratio(one["loss"], one["weight"])
        if one["answers"]:
            record[f"accuracy/{name}"] = ratio(one["right"], one["answers"])
    return record


def check_summary(total: dict[str, Any]) -> dict[str, float]:
    """Readable metrics of a check: bits per target, and of answers where it has any."""
    record = {"bits": float(total["nats"][0] / total["targets"][0]) / math.log(2)}
    if total["answers"][0]:
        record["accuracy"] = float(total["right"][0] / total["answers"][0])
        record["whole"] = float(total["whole"][0] / total["rows"][0])
    return record
