"""Trains the feature maps of `topk_completion` against a frozen model's own attention.

A trace is a document: the rotated keys and values of its prompt and the queries of the
tokens that follow, of every layer. The networks of all heads and layers take their
steps at once; a head's loss and gradient know no other head. arXiv:2604.05438, App. K.

    L  layers    N  prompt tokens    Q  queries of a step, the tokens after the prompt
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kvjax import copies, files
from kvjax.interface import LanguageModel, layer_specs
from kvjax.methods.topk_completion.feature_maps import Learned
from kvjax.methods.topk_completion.map_files import MapFile
from kvjax.text.encoding import added
from kvjax.training import checkpoint, run_folder
from kvjax.training.attention import by_layer, causal_attention
from kvjax.training.feature_maps.networks import (
    TINY,
    Moments,
    Settings,
    head_loss,
    initial,
    moments_of,
    unstandardised,
)
from kvjax.training.progress import Progress


class Trace(NamedTuple):
    """A record of what every layer of the frozen model did with a document."""

    k: Float[Array, "L Hkv S D"]  # rotated; S = N + queries
    v: Float[Array, "L Hkv S D"]
    q: Float[Array, "L Hkv G Q D"]  # rotated, of the tokens after the prompt


class State(NamedTuple):
    """The state that a run saves."""

    weights: Learned  # of standardised inputs
    keys: Moments  # (L, Hkv)
    queries: Moments  # (L, Hkv, G)
    optimizer: Any


class Result(NamedTuple):
    """The result of :func:`train`."""

    weights: Learned  # of rotated inputs as they are; leaves (L, Hkv[, G], ...)
    losses: Float[np.ndarray, "L Hkv"]  # mean over the last steps since a log
    finished: bool


# --- traces


@functools.partial(jax.jit, static_argnames=("decoder", "queries"))
def trace(decoder: Any, params: Any, tokens: Int[Array, "1 S"], queries: int) -> Trace:
    """One document through the frozen model, attention exact."""
    length = tokens.shape[1]
    specs = layer_specs(decoder, 1, length)
    copies.refuse(specs[0].copies, "a feature map")
    attend = by_layer(causal_attention(s.rope, sm_scale=s.sm_scale) for s in specs)
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    total = jnp.full((1,), length, jnp.int32)
    found: list[Any] = [None] * decoder.num_layers

    def attention(layer, q, k, v):
        spec = specs[layer]
        turned = spec.rope(q[:, :, -queries:], positions[:, -queries:], total)
        shape = (spec.num_kv_heads, spec.group, queries, spec.head_dim)
        keys = spec.rope(k, positions, total)[0]
        made = keys, v[0], turned.reshape(shape)
        found[layer] = Trace(*(x.astype(jnp.float32) for x in made))
        return attend(layer, q, k, v)

    decoder.hidden(params, tokens, attention)
    return jax.tree.map(lambda *x: jnp.stack(x), *found)


def document(
    tokens: Int[np.ndarray, "N"],
    settings: Settings,
    index: int,
    before: Sequence[int] = (),
) -> Int[np.ndarray, "1 S"]:
    """Draws document `index` of a run by the seed alone, so that runs resume.

    It begins as every prompt does: with `before`, what the tokenizer puts there (BOS).
    """
    rng = np.random.default_rng([settings.seed, index])
    size = settings.lengths[index % len(settings.lengths)] + settings.queries
    return np.asarray(window(rng, tokens, size, before), np.int32)[None]


def window(
    rng: np.random.Generator,
    tokens: Int[np.ndarray, "N"],
    size: int,
    before: Sequence[int] = (),
) -> list[int]:
    """Draws `size` tokens of a text, the first of them replaced by `before`."""
    start = int(rng.integers(len(tokens) - size + 1))
    return [*before, *tokens[start + len(before) : start + size].tolist()]


# --- the run


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Adam on a cosine to 0; gradients are clipped head by head before."""
    rate = optax.cosine_decay_schedule(settings.lr, settings.steps)
    return optax.flatten(optax.adam(rate))  # one vector: a tenth of the program


def norms(grads: Learned) -> Float[Array, "L Hkv"]:
    """The norm of each KV head's gradient, its query networks' too."""
    leaves = jax.tree.leaves(grads)  # (L, Hkv, ...)
    return jnp.sqrt(sum(jnp.square(x).sum(tuple(range(2, x.ndim))) for x in leaves))


def clipped(grads: Learned, norm: Float[Array, "L Hkv"], most: float) -> Learned:
    """Each KV head's gradient, of these norms, to a norm of at most `most`.

    A head whose gradient is not finite stays where it is.
    """
    factor = jnp.minimum(1.0, most / jnp.maximum(norm, TINY))
    known = jnp.isfinite(norm)

    def scale(x):
        shape = (*norm.shape, *[1] * (x.ndim - 2))
        return jnp.where(known.reshape(shape), x * factor.reshape(shape), 0.0)

    return jax.tree.map(scale, grads)


@functools.partial(jax.jit, static_argnames=("settings", "sm_scale"), donate_argnums=0)
def train_step(
    state: State,
    seen: Trace,
    start: Int[Array, ""],
    retrieved: Int[Array, ""],
    *,
    settings: Settings,
    sm_scale: float,
) -> tuple[State, Float[Array, "L Hkv"]]:
    """One step of every head, on the queries from `start` on; the loss of each.

    NaN is the loss of a head whose gradient is not finite.
    """
    q = jax.lax.dynamic_slice_in_dim(seen.q, start, settings.batch, 3)
    first = seen.k.shape[2] - settings.queries + start

    def losses(weights):
        def one(nets, k, v, q, keys, queries):
            given = first, retrieved, (keys, queries), sm_scale, settings
            return head_loss(nets, k, v, q, *given)

        # Not all at once: the logits of all heads would not fit the caches.
        flat = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]),
            (weights, seen.k, seen.v, q, state.keys, state.queries),
        )
        each = jax.lax.map(lambda x: one(*x), flat)
        each = each.reshape(seen.k.shape[:2])
        return each.sum(), each

    grads, each = jax.grad(losses, has_aux=True)(state.weights)
    norm = norms(grads)
    each = jnp.where(jnp.isfinite(norm), each, jnp.nan)
    grads = clipped(grads, norm, settings.clip)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt = optimizer(settings).update(grads, state.optimizer)
    weights = optax.apply_updates(state.weights, updates)
    return state._replace(weights=weights, optimizer=opt), each


def begin(model: LanguageModel, tokens: np.ndarray, settings: Settings) -> State:
    """The first state: scales of the inputs and of the logits from one document."""
    decoder = model.decoder
    spec = decoder.cache_spec(1, max(settings.lengths))
    longest = int(np.argmax(settings.lengths))
    before = added(model.tokenizer.encode).before
    rows = jnp.asarray(document(tokens, settings, longest, before))
    seen = trace(decoder, model.params, rows, settings.queries)
    return _first(seen, settings, float(spec.sm_scale))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _first(seen: Trace, settings: Settings, sm_scale: float) -> State:
    layers, heads, group, _, head_dim = seen.q.shape
    key = jax.random.key(settings.seed)
    weights = initial(key, settings, layers, heads, group, head_dim)
    keys, queries = moments_of(seen.k), moments_of(seen.q)
    # exp(g + ell) starts at the scale of exp(x . k), so that nothing overflows.
    scale = jnp.einsum("lhgd,lhd->lhg", queries.mean, keys.mean) * sm_scale
    start = scale - np.float32(np.log(settings.features))
    b_out = jnp.broadcast_to(start[..., None], weights.queries.b_out.shape)
    weights = weights._replace(queries=weights.queries._replace(b_out=b_out))
    return State(weights, keys, queries, optimizer(settings).init(weights))


def train(
    model: LanguageModel,
    tokens: Int[np.ndarray, "N"],
    settings: Settings,
    out: pathlib.Path,
    *,
    resume: bool = False,
) -> Result:
    """Trains maps for every head of a model, in a folder that can be resumed.

    Args:
        model: softmax, frozen.
        tokens: text to train on, at least one document long.
        settings: see :class:`Settings`.
        out: folder of the run, as that of `kvjax train`.

    Returns:
        The networks, and whether all steps were taken.

    Raises:
        ValueError: if the text or the model is too short, the model is no softmax
            model, or `out` holds another run; :class:`checkpoint.NotFiniteError`.
    """
    _check(model, tokens, settings)
    run_folder.check(out, resume=resume)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_folder.locked(out))
        saved = checkpoint.open_folder(out, keep=2)
        stack.callback(saved.close)
        state, step = begin(model, tokens, settings), 0
        about = _about(model, tokens, settings)
        if resume:
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                state,
            )
            found = checkpoint.newest(saved, like, _notice)
            if found is not None:
                _check_resume(found.about, about)
                state, step = found.state, found.step
                _notice(f"resuming at step {step} of {settings.steps}.")
        text = json.dumps(about, indent=2) + "\n"
        files.write_text(out / run_folder.CONFIG, text)
        metrics = run_folder.Metrics(out, step, tensorboard=False)
        stack.callback(metrics.close)
        interrupt = stack.enter_context(run_folder.Interrupt())
        progress = stack.enter_context(Progress(settings.steps, step))
        state, step, losses = _go(
            model, tokens, settings, state, step, saved, metrics, progress, interrupt
        )
        saved.wait()
    if step < settings.steps:
        _notice(run_folder.stopped(step, settings.steps, out))
    weights = Learned(
        unstandardised(state.weights.keys, state.keys),
        unstandardised(state.weights.queries, state.queries),
    )
    return Result(jax.device_get(weights), losses, step == settings.steps)


def _go(model, tokens, settings, state, step, saved, metrics, progress, interrupt):
    spec = model.decoder.cache_spec(1, 1)
    before = added(model.tokenizer.encode).before
    about = _about(model, tokens, settings)
    seen, recent, clock = None, [], time.monotonic()
    losses = np.zeros(state.keys.deviation.shape, np.float32)
    shares = np.log(settings.retrieved)
    while step < settings.steps:
        index, part = divmod(step, settings.reuse)
        if seen is None or part == 0:
            rows = jnp.asarray(document(tokens, settings, index, before))
            seen = trace(model.decoder, model.params, rows, settings.queries)
        rng = np.random.default_rng([settings.seed, index, part])
        prompt = seen.k.shape[2] - settings.queries
        share = float(np.exp(rng.uniform(*shares)))
        state, each = train_step(
            state,
            seen,
            np.int32(part * settings.batch),
            np.int32(max(round(share * prompt), 1)),
            settings=settings,
            sm_scale=float(spec.sm_scale),
        )
        step += 1
        recent.append(each)
        progress.step(step)
        is_last = step == settings.steps or interrupt.asked
        is_logged = step % settings.log_every == 0 or is_last
        is_saved = step % settings.save_every == 0 or is_last
        if is_logged or is_saved:
            _check_finite(jax.device_get(recent), step, saved, spec)
        if is_logged:
            losses = np.mean(jax.device_get(recent), axis=0)
            seconds = time.monotonic() - clock
            rate = len(recent) * settings.batch / seconds
            record = {"step": step, "loss": float(losses.mean())}
            record |= {"worst": float(losses.max()), "tokens_per_s": round(rate, 1)}
            metrics.write(record)
            progress.show(record)
            recent, clock = [], time.monotonic()
        if is_saved:
            metrics.flush()
            saved.save(step, state, about)
        if interrupt.asked:
            break
    return state, step, losses


def _check_finite(losses, step, saved, spec) -> None:
    """Raises at the first of the newest steps with a loss that is not finite."""
    finite = np.isfinite(losses)
    bad = np.flatnonzero(~finite.all((1, 2)))
    if not len(bad):
        return
    layer, head = np.argwhere(~finite[bad[0]])[0]
    what = f"loss or gradient of layer {layer}, KV head {head}, is not finite"
    fix = "lower --lengths, or train on another text or a model of a wider dtype"
    first = step - len(losses) + 1 + int(bad[0])
    raise saved.not_finite(first, jnp.dtype(spec.dtype).name, what, fix)


def as_file(
    result: Result, model: LanguageModel, settings: Settings, gain=None
) -> MapFile:
    """The file to save of a run."""
    about = {"model": model.name, **dataclasses.asdict(settings)}
    return MapFile("learned", max(settings.lengths), result.weights, gain, about)


def _check(model, tokens, settings):
    decoder = model.decoder
    spec = decoder.cache_spec(1, 1)
    longest = max(settings.lengths) + settings.queries
    if spec.alpha != 1:
        raise ValueError(
            f"completion estimates softmax attention, and the model's is entmax with "
            f"alpha={spec.alpha}."
        )
    if longest > decoder.context:
        raise ValueError(
            f"documents of {longest} tokens exceed the model's {decoder.context}: "
            "lower --lengths."
        )
    if longest > len(tokens):
        raise ValueError(
            f"the text has {len(tokens)} tokens and a document {longest}: lower "
            "--lengths, or give more text."
        )


def _about(model, tokens, settings) -> dict[str, Any]:
    digest = int(np.asarray(tokens, np.uint64).sum()) + 31 * len(tokens)
    settings = json.loads(json.dumps(dataclasses.asdict(settings)))
    # Found alike from any folder.
    name = files.located(model.name)
    about = {"model": name, "text": digest, "settings": settings}
    before = added(model.tokenizer.encode).before
    # Runs of tokenizers that add nothing say nothing of it: they go on as they were.
    return about | ({"before": list(before)} if before else {})


def _check_resume(old: dict[str, Any], new: dict[str, Any]) -> None:
    flat = [{**about["settings"], **about, "settings": None} for about in (old, new)]
    wrong = [name for name in flat[1] if flat[0].get(name) != flat[1][name]]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{name} was {flat[0].get(name)} in the run to resume and is "
            f"{flat[1][name]} now: give what it began with, or another --out."
        )


def _notice(line: str) -> None:
    print(line, file=sys.stderr)


def split(
    tokens: Int[np.ndarray, "T"], share: float = 0.9
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "M"]]:
    """Tokens to train on, and those that follow, to calibrate by."""
    cut = int(share * len(tokens))
    return tokens[:cut], tokens[cut:]
