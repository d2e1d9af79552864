"""A model's attention heads, one by one: sinks, spread, what each copies from where.

Seen in the model's training form over a text and over pass keys: no method, no
cache. :mod:`kvjax.report.figures.heads` draws it.

    L   layers    A   tokens asked for    R   queries looked at
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import copies
from kvjax.decoding.finite import not_finite
from kvjax.evaluation import compare_inputs
from kvjax.evaluation.tasks import haystack, needles
from kvjax.interface import LanguageModel
from pallas_kernels.entmax import entmax

QUERIES = 128  # of a window, evenly from its later half
BLOCK = 128  # queries whose weights exist at once
MASS = 0.99  # of attention, which the effective support holds
MAP_TOKENS = 128  # of the prompt whose attention is drawn


class Map(NamedTuple):
    """The attention of one head over a short prompt, and why it is shown."""

    label: str
    score: float  # by which it is the most
    layer: int
    head: int
    weights: Float[np.ndarray, "T T"]


class Heads(NamedTuple):
    """Means over queries: one number for each query head of each layer."""

    sink: Float[np.ndarray, "L Hq"]  # mass on the first token
    previous: Float[np.ndarray, "L Hq"]  # mass on the token before the query
    entropy: Float[np.ndarray, "L Hq"]  # bits
    support: Float[np.ndarray, "L Hq"]  # keys of non-zero weight
    effective_support: Float[np.ndarray, "L Hq"]  # fewest keys that hold MASS
    retrieval: Float[np.ndarray, "L Hq"]  # how often the source has the most weight
    needle_mass: Float[np.ndarray, "L Hq"]  # mass on the needle, from its value on
    maps: tuple[Map, ...]
    model: str
    alpha: float  # 1 = softmax
    context: int
    windows: int  # of the text
    text: str  # what it is called
    answers: int  # tokens that were asked for, A


class _Seen(NamedTuple):
    """Measures of one layer and one row; see :class:`Heads`."""

    sink: Float[Array, "Hq"]
    previous: Float[Array, "Hq"]
    entropy: Float[Array, "Hq"]
    support: Float[Array, "Hq"]
    effective_support: Float[Array, "Hq"]
    retrieval: Float[Array, "Hq A"]
    needle_mass: Float[Array, "Hq A"]


class _Asked(NamedTuple):
    """A prompt with its answer, and where the answer comes from."""

    tokens: list[int]
    queries: Int[np.ndarray, "A"]  # the token before each of the answer's
    sources: Int[np.ndarray, "A"]  # each of the answer's in the needle
    needle: tuple[int, int]  # the needle's tokens from its value to its line's end


def inspect(
    model: LanguageModel,
    text: str,
    *,
    context: int = 512,
    windows: int = 4,
    prompts: int = 10,
    seed: int = 0,
    text_name: str = "text",
    progress: Callable[[float], None] = lambda done: None,
) -> Heads:
    """Measures every head on text and on pass keys hidden in it.

    Sink, previous-token mass, entropy and support are means over queries of the later
    half of each window of text, where there is much to choose from. Retrieval is of
    pass keys: the answer's tokens are fed, and when the next one is to be said, a head
    scores if of all tokens it weighs that very one in the needle most. Small models
    often move a value to the tokens after it and read it there: `needle_mass`, on the
    rest of the needle too, shows the heads that read so.

    Args:
        model: its decoder has ``hidden(params, tokens, attention)``.
        text: what windows and prompts are made of.
        context: tokens of a window, and at most of a prompt.
        windows: of text.
        prompts: with a pass key each, at all depths.
        seed: of windows and prompts.
        text_name: for the figure and the summary.
        progress: called with the fraction that is done.

    Raises:
        ValueError: if the sizes do not fit model or text, the tokenizer writes the
            answers and the needles in different tokens, or logits are not finite.

    Source:
        Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality",
        arXiv:2404.15574, section 2.
    Deviations:
        The right answer is fed, where the paper lets the model answer, so heads of a
        model that fails have a score too. The head's favourite must be the token's
        place in the needle, where the paper also takes other needle tokens that are
        the same. The paper's score is a share of the needle's tokens, ours of the
        answer's. `needle_mass` has no counterpart there.
    """
    compare_inputs.check_context(model, context)
    rows = needles.windows(
        model.tokenizer, text, context=context, n=windows, seed=seed, named="windows"
    )
    asked = _asked(model, text, context, prompts, seed)
    counts = [len(one.queries) for one in asked]
    nothing = np.zeros(0, np.int32)
    decoder, params, done = model.decoder, model.params, []
    for one in [*(_Asked(row, nothing, nothing, (0, 0)) for row in rows), *asked]:
        # Of one shape, so that all compile once.
        tokens = np.zeros((1, context), np.int32)
        tokens[0, : len(one.tokens)] = one.tokens
        where = np.zeros((2, max(counts)), np.int32)
        where[:, : len(one.queries)] = one.queries, one.sources
        needle = np.array(one.needle, np.int32)
        found = _look(decoder, params, *map(jnp.asarray, (tokens, *where, needle)))
        done.append(jax.tree.map(np.asarray, found))
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(done[-1])):
            raise not_finite(decoder, f"in row {len(done) - 1}")
        progress(len(done) / (len(rows) + len(asked)))
    plain = jax.tree.map(lambda *x: np.stack(x).mean(0, np.float64), *done[:windows])

    def over_answers(name: str) -> np.ndarray:
        both = zip(done[windows:], counts, strict=True)
        parts = [getattr(seen, name)[..., :count] for seen, count in both]
        return np.concatenate(parts, -1).mean(-1, np.float64)

    scores = {
        name: getattr(plain, name)
        for name in ("sink", "previous", "entropy", "support", "effective_support")
    }
    scores |= {name: over_answers(name) for name in ("retrieval", "needle_mass")}
    return Heads(
        **scores,
        maps=_maps(model, text, scores, min(context, MAP_TOKENS), seed),
        model=model.name,
        alpha=decoder.alpha,
        context=context,
        windows=windows,
        text=text_name,
        answers=sum(counts),
    )


def as_dict(result: Heads) -> dict[str, Any]:
    """Every number of a result, ready for JSON: lists of layers of heads, no maps."""
    values = result._asdict()
    del values["maps"]
    is_array = {name: isinstance(value, np.ndarray) for name, value in values.items()}
    return {
        name: value.tolist() if is_array[name] else value
        for name, value in values.items()
    }


def summary(result: Heads) -> list[str]:
    """The heads that are most of a kind and the mean support, a line each."""
    kind = "softmax" if result.alpha == 1 else f"entmax {result.alpha:g}"
    lines = [
        f"{result.model or 'model'} ({kind}): {result.windows} windows of "
        f"{result.context} tokens of {result.text}, {result.answers} answer tokens of "
        "pass keys"
    ]

    def line(label: str, values: np.ndarray, form: str, sign: int = 1) -> None:
        best = int((sign * values).argmax())
        layer, head = divmod(best, values.shape[1])
        figure = form.format(float(values[layer, head]))
        lines.append(f"  {label:<18}layer {layer:>2}, head {head:>2}: {figure}")

    line("retrieval", result.retrieval, "source has the most weight {:.0%} of the time")
    line("retrieval by mass", result.needle_mass, "{:.0%} of its mass on the needle")
    line("sink", result.sink, "{:.0%} of its mass on the first token")
    line("local", result.previous, "{:.0%} of its mass on the token before")
    line("highest entropy", result.entropy, "{:.2f} bits")
    line("lowest entropy", result.entropy, "{:.2f} bits", sign=-1)
    lines.append(
        f"  mean support      {result.support.mean():.1f} keys of non-zero weight, "
        f"{result.effective_support.mean():.1f} hold {MASS:.0%} of the mass"
    )
    return lines


def _asked(model, text, context, prompts, seed) -> list[_Asked]:
    tokenizer, found = model.tokenizer, []
    for example in needles.passkey(
        tokenizer, text, context=context, n=prompts, seed=seed
    ):
        whole = haystack.whole(tokenizer, example)
        asked = len(example.prompt)
        answer = whole[asked:]
        starts = range(asked - len(answer) + 1)
        places = [i for i in starts if whole[i : i + len(answer)] == answer]
        if len(places) != 1:
            raise ValueError(
                f"the tokenizer writes {example.answer!r} in other tokens in the text "
                "than as an answer: heads that copy it cannot be told."
            )
        end = first = places[0]
        while end < asked and "\n" not in tokenizer.decode(whole[first:end]):
            end += 1
        steps = np.arange(len(answer), dtype=np.int32)
        found.append(_Asked(whole, asked - 1 + steps, first + steps, (first, end)))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _look(
    decoder: Any,
    params: Any,
    tokens: Int[Array, "1 T"],
    asking: Int[Array, "A"],
    sources: Int[Array, "A"],
    needle: Int[Array, "2"],
) -> _Seen:
    """Measures the heads of all layers in one row."""
    seen: list[_Seen | None] = [None] * decoder.num_layers
    length = tokens.shape[1]
    later = np.linspace(length // 2, length - 1, min(QUERIES, length - length // 2))
    queries = jnp.asarray(later.astype(np.int32))
    keys = jnp.arange(length, dtype=jnp.int32)
    in_needle = (keys >= needle[0]) & (keys < needle[1])

    def attention(layer, q, k, v):
        weigh = _weigher(decoder, layer, q, k)
        weights = weigh(queries)
        first, before = weights[..., 0], weights[:, jnp.arange(len(later)), queries - 1]
        positive = weights > 0
        logs = jnp.log2(jnp.where(positive, weights, 1.0))
        ranked = jnp.cumsum(-jnp.sort(-weights, -1), -1)
        copied = weigh(asking)
        is_copied = copied.argmax(-1).astype(jnp.int32) == sources
        seen[layer] = _Seen(
            sink=first.mean(-1),
            previous=before.mean(-1),
            entropy=-(weights * logs).sum(-1).mean(-1),
            support=positive.sum(-1).mean(-1, dtype=jnp.float32),
            effective_support=1 + (ranked < MASS).sum(-1).mean(-1, dtype=jnp.float32),
            retrieval=is_copied.astype(jnp.float32),
            needle_mass=jnp.where(in_needle, copied, 0.0).sum(-1),
        )
        return _attend(weigh, v, q.dtype)

    decoder.hidden(params, tokens, attention)
    return jax.tree.map(lambda *x: jnp.stack(x), *seen)


@functools.partial(jax.jit, static_argnums=0)
def _all_weights(
    decoder: Any, params: Any, tokens: Int[Array, "1 T"]
) -> Float[Array, "L Hq T T"]:
    weights: dict[int, Array] = {}

    def attention(layer, q, k, v):
        weigh = _weigher(decoder, layer, q, k)
        weights[layer] = weigh(jnp.arange(tokens.shape[1], dtype=jnp.int32))
        return _attend(weigh, v, q.dtype)

    decoder.hidden(params, tokens, attention)
    return jnp.stack([weights[layer] for layer in range(decoder.num_layers)])


def _weigher(decoder, layer, q, k) -> Callable[[Array], Array]:
    """`weigh(queries (R,)) -> (Hq, R, T)`: causal weights of one row, float32."""
    length = k.shape[2]
    spec = decoder.cache_spec(1, length, layer=layer)
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    total = jnp.full((1,), length, jnp.int32)
    q, k = (spec.rope(x, positions, total)[0] for x in (q, k))
    copies.refuse(spec.copies, "what single heads do")
    q = q.reshape(spec.num_kv_heads, spec.group, length, spec.head_dim)
    scale = np.float32(spec.sm_scale)

    def weigh(queries):
        logits = jnp.einsum(
            "kgrd,ksd->kgrs",
            q[:, :, queries],
            k,
            preferred_element_type=jnp.float32,
        )
        logits = (logits * scale).reshape(spec.num_q_heads, len(queries), length)
        visible = positions <= queries[:, None]
        return _normalise(logits, visible, spec.alpha)

    return weigh


def _normalise(logits, visible, alpha):
    if alpha == 1:
        return jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    return entmax(logits, alpha=alpha, where=visible)


def _attend(weigh, v, dtype):
    """The attention's output, with the weights of `BLOCK` queries at a time."""
    _, heads, length, head_dim = v.shape
    wide = v[0].astype(jnp.float32)

    def block(queries):
        weights = weigh(queries).reshape(heads, -1, len(queries), length)
        return jnp.einsum("kgrs,ksd->rkgd", weights, wide)

    size = min(BLOCK, length)
    starts = -(-length // size)
    # The last block goes past the end: its rows there are the last one's again.
    queries = jnp.arange(starts * size, dtype=jnp.int32).reshape(starts, size)
    out = jax.lax.map(block, jnp.minimum(queries, length - 1))
    out = out.reshape(starts * size, -1, head_dim)[:length]
    return out.swapaxes(0, 1)[None].astype(dtype)


def _maps(model, text, scores, size, seed) -> tuple[Map, ...]:
    """The heads that are most of each kind, on the end of a short pass key prompt."""
    (asked,) = _asked(model, text, size, 1, seed)
    tokens = jnp.asarray(np.array([asked.tokens], np.int32))
    weights = np.asarray(_all_weights(model.decoder, model.params, tokens))
    kinds = {
        "most retrieval-like": scores["needle_mass"],
        "most sink-like": scores["sink"],
        "most local": scores["previous"],
    }
    maps, taken = [], set()
    for label, score in kinds.items():
        ranked = np.argsort(-score, axis=None, kind="stable").tolist()
        best = next((i for i in ranked if i not in taken), ranked[0])
        taken.add(best)
        layer, head = divmod(best, score.shape[1])
        value = float(score[layer, head])
        maps.append(Map(label, value, layer, head, weights[layer, head]))
    return tuple(maps)
