"""Claims of CritiPrefill: a prompt is read faster, and little is lost."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.evaluation import statistics
from kvjax.evaluation.claims import recorded
from kvjax.evaluation.claims.claim import (
    Claim,
    Effect,
    Measured,
    NotMeasuredError,
    Within,
    of_interval,
    without_spread,
)
from kvjax.evaluation.claims.measure import asked, clock, layers, shapes, texts
from kvjax.evaluation.claims.session import SOFTMAX, Session

PAPER = "arXiv:2409.12490"
RESULTS = "*-critiprefill.json"
SEGMENT, BLOCK = 64, 16  # of short contexts; the paper's are 512 and 32
SHARE = 8  # of the blocks one in so many is looked at
FIRST, EMBEDDED_FIRST = 1, 2  # layers that read densely; the paper's is 1


def _spec(session: Session, context: int, first: int | None = None) -> str:
    budget = max(context // session.sizes.cut // BLOCK, 1) * BLOCK
    if first is None:
        first = EMBEDDED_FIRST if session.models is None else FIRST
    return (
        f"critiprefill:segment={SEGMENT},block={BLOCK},budget={budget},"
        f"dense_tokens=128,first={first}+full"
    )


def _text(session: Session) -> Measured:
    session.needs_thorough()
    context = session.sizes.cascade_context
    found = texts.nats_above_while_read(session, _spec(session, context))
    if session.models is not None:
        return found
    sparser = _spec(session, context, FIRST)
    lost = texts.nats_above_while_read(session, sparser).value
    note = f"With the second of four layers sparse too it loses {lost:.3f}"
    return found._replace(note=note)


def _answers(session: Session, question: str) -> Measured:
    spec = _spec(session, session.sizes.context)
    return asked.above_full(session, spec, question=question)


def common(spec: Any, given: layers.Inputs) -> list[float]:
    """Shares of the blocks that queries look at most which two of them have in common.

    Returns:
        Of queries half a segment apart, then of those of two segments that lie far
        apart; blocks of the first half, which all of them see.
    """
    return [float(x) for x in _common(spec, given)]


@functools.partial(jax.jit, static_argnums=0)
def _common(spec, given):
    length = given.k.shape[2]
    size, past = min(SEGMENT, length // 4), length // 2 // BLOCK * BLOCK
    positions = jnp.arange(length, dtype=jnp.int32)
    positions = jnp.broadcast_to(positions, (given.k.shape[0], length))
    k = spec.rope(given.k.astype(jnp.float32), positions)[:, :, :past]
    q = spec.rope(given.q.astype(jnp.float32), positions)

    def chosen(first):  # (R, Hkv, G, size, blocks): whether a query looks there most
        rows = q[:, :, first : first + size]
        rows = rows.reshape(q.shape[0], k.shape[1], -1, size, q.shape[3])
        logits = spec.sm_scale * jnp.einsum("rhgtd,rhsd->rhgts", rows, k)
        weights = jax.nn.softmax(logits, axis=-1)
        blocks = weights.reshape(*weights.shape[:-1], -1, BLOCK).sum(-1)
        number = max(blocks.shape[-1] // SHARE, 1)
        best = jax.lax.top_k(blocks, number)[1]
        return jax.nn.one_hot(best, blocks.shape[-1]).sum(-2), number

    near, number = chosen(past)
    far, _ = chosen(length - size)
    half = size // 2
    pairs = (near[..., :half, :], near[..., half:, :]), (near, far)
    return [(one * other).sum(-1).mean() / number for one, other in pairs]


def _locality(session: Session) -> Measured:
    spec = layers.layer_spec(session, SOFTMAX, 1)
    make = functools.partial(common, spec)
    key = "common blocks", SOFTMAX, SEGMENT, BLOCK
    near, far = np.array(layers.each_window(session, SOFTMAX, key, make)).T
    details = {"in a segment": float(near.mean()), "far apart": float(far.mean())}
    return of_interval(statistics.paired_shares(near, far), details=details)


def _prefill(session: Session) -> Measured:
    length = session.sizes.clocked[-1]
    spec = "critiprefill:first=0,fusion=0+full"
    ours, full = clock.seconds_a_token(session, (spec, length), ("full", length))
    return of_interval(
        statistics.amount_interval(full / ours), details={"tokens": length}
    )


def times_fewer(session: Session, tokens: int) -> float:
    """Operations of an 8B model's prompt under full attention over CritiPrefill's."""
    counts = (
        shapes.prompt_operations_of_8b(session, spec, tokens)
        for spec in ("full", "critiprefill+full")
    )
    full, ours = counts
    return full / ours


def _on_a_gpu(session: Session) -> Measured:
    for document, when in recorded.documents(session.results, RESULTS):
        if document.get("device") != "cpu":
            longest = max(document["rows"], key=lambda row: row["length"])
            ratio, details = longest["layer_ratio"], {"length": longest["length"]}
            return without_spread(ratio, 1, when=when, details=details)
    raise NotMeasuredError(
        "the paper's seconds are of a GPU, and no `python benchmarks/critiprefill.py "
        "--lengths 131072 --json FILE` of one is among the recorded runs; by formulas "
        f"an 8B model takes {times_fewer(session, shapes.LONG):.1f} times fewer "
        "operations for the prompt."
    )


CLAIMS = (
    Claim(
        name="criti-text",
        method="critiprefill",
        sentence="A prompt that is read by critical blocks is predicted nearly as well",
        source=f"{PAPER}, abstract; the measure is ours",
        paper="minimal loss of quality; the figures were not seen",
        value="nats a token lost of text that is read, 1/8 of the tokens before a "
        "segment",
        bar=Within(0.02),
        measure=_text,
    ),
    Claim(
        name="criti-answers",
        method="critiprefill",
        sentence="Of a prompt that was read so it answers within 2 points of full "
        "attention",
        source=f"{PAPER}, needle figure; the size is ours",
        paper="10.0 of 10 at 5K to 128K tokens (Llama-3-8B-Gradient-1048k)",
        value="needles found, above full attention's, 1/8 of the tokens before a "
        "segment",
        bar=Within(-0.02, "higher"),
        measure=functools.partial(_answers, question="seen"),
        note="As in the paper the end of a prompt, where the question is, sees "
        "everything",
    ),
    Claim(
        name="criti-locality",
        method="critiprefill",
        sentence="Neighbouring queries look at the same parts of the past",
        source=f"{PAPER}, abstract",
        paper="they do; a figure that was not seen",
        value="share of a query's most looked at blocks, an eighth of all, that are "
        "those of one 32 tokens on, above those of one half a context on",
        bar=Effect(none=0.0, bar=0.0),
        measure=_locality,
    ),
    Claim(
        name="criti-prefill",
        method="critiprefill",
        sentence="It reads a long prompt faster than full attention",
        source=f"{PAPER}, abstract",
        paper="2.7 times at 128K tokens (Llama-3-8B, a GPU, the whole prompt)",
        value="times as fast as full attention, one layer's attention, by processor "
        "time on a CPU",
        bar=Effect(none=1.0, bar=2.7),
        measure=_prefill,
        note="The ratio grows with the length: 16K tokens, or 8K with --quick",
    ),
    Claim(
        name="criti-gpu",
        method="critiprefill",
        sentence="It reads a prompt of 128K tokens faster than full attention, on a "
        "GPU",
        source=f"{PAPER}, abstract",
        paper="2.7 times (Llama-3-8B), 3.0 (Yi-9B), one A100",
        value="times as fast as full attention, one 8B layer, its products among it, "
        "the longest recorded",
        bar=Effect(none=1.0, bar=2.7),
        measure=_on_a_gpu,
    ),
)

MORE = (
    Claim(
        name="criti-answers-after",
        method="critiprefill",
        sentence="Asked after such a prompt it answers within 2 points of full "
        "attention",
        source=f"{PAPER}, needle figure; size and order are ours",
        paper="10.0 of 10 at 5K to 128K tokens (Llama-3-8B-Gradient-1048k)",
        value="needles found, above full attention's, 1/8 of the tokens before a "
        "segment",
        bar=Within(-0.02, "higher"),
        measure=functools.partial(_answers, question="after"),
    ),
)
