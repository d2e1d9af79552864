"""Claims of "Top-K Retrieval with Fixed-Size Linear-Attention Completion"."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from scipy import stats

from kvjax.evaluation import statistics
from kvjax.evaluation.claims import recorded
from kvjax.evaluation.claims.claim import (
    Claim,
    Effect,
    Measured,
    NotMeasuredError,
    Within,
    from_shapes,
    of_interval,
    without_spread,
)
from kvjax.evaluation.claims.measure import asked, layers, texts
from kvjax.evaluation.claims.session import SOFTMAX, Session
from kvjax.methods.topk_completion import linear_attention
from kvjax.stores.buffers import num_bytes

PAPER = "arXiv:2604.05438"
SINKS, TAIL = 4, 16  # the method's defaults and the paper's


def _specs(session: Session, context: int) -> tuple[str, str]:
    """Retrieval alone and completed, at the same reads in tokens."""
    budget = linear_attention.budget_tokens(context, session.sizes.share)
    method = f"topk_completion:budget={budget}"
    return f"{method},lam=0", method


def _pair(session: Session) -> tuple[layers.Layers, layers.Layers]:
    alone, completed = _specs(session, session.sizes.layer_context)
    return layers.run(session, SOFTMAX, alone), layers.run(session, SOFTMAX, completed)


def _error(session: Session) -> Measured:
    alone, completed = _pair(session)
    saved = statistics.paired_difference(alone.error, completed.error)
    return of_interval(
        saved,
        details={
            "alone": float(alone.error.mean()),
            "completed": float(completed.error.mean()),
            "context": session.sizes.layer_context,
            "share": session.sizes.share,
        },
    )


def _entropy(session: Session) -> Measured:
    alone, completed = _pair(session)
    saved = (alone.found.error - completed.found.error).mean(1)
    gain = np.asarray(saved).ravel()
    entropy = layers.entropies(session, SOFTMAX, num_sinks=SINKS, tail=TAIL).ravel()
    details = {"entropy": entropy.tolist(), "gain": gain.tolist()}
    # Heads of a layer are alike: as samples they count as one.
    num_layers = session.model(SOFTMAX).decoder.num_layers
    return rank_correlation(entropy, gain, num_layers, details)


def rank_correlation(
    x: np.ndarray, y: np.ndarray, n: int, details: dict | None = None
) -> Measured:
    """Spearman's, with Fisher's interval and the variance of Bonett and Wright.

    `n` of the pairs count as independent; the interval of three or fewer is all of
    [-1, 1].
    """
    correlation: Any = stats.spearmanr(x, y)
    rho = float(correlation.statistic)
    details = details or {}
    if n <= 3:
        return Measured(rho, -1.0, 1.0, n, details=details)
    middle = math.atanh(max(min(rho, 1 - 1e-9), 1e-9 - 1))
    spread = math.sqrt((1 + rho**2 / 2) / (n - 3))
    half = float(stats.norm.ppf(0.975)) * spread
    low, high = math.tanh(middle - half), math.tanh(middle + half)
    return Measured(rho, min(low, rho), max(high, rho), n, details=details)


RESULTS = "*-topk-completion.json"


def _recorded_text(session: Session) -> Measured:
    """The mean over the recorded budgets; the runs kept no samples to pair."""
    found = recorded.entries(session.results, RESULTS, "quality")[-1]
    lost: dict[str, dict[float, float]] = {}
    for method in found.data["methods"]:
        if "nats_lost" in method:
            by_share = lost.setdefault(method["name"], {})
            by_share[method["share"]] = method["nats_lost"]["mean"]
    if not {"selection", "anchor"} <= set(lost):
        raise NotMeasuredError(
            "the recorded runs lack the text of anchor's completion."
        )
    saved = {
        share: alone - lost["anchor"][share]
        for share, alone in lost["selection"].items()
    }
    windows = found.data["windows"]
    mean = float(np.mean(list(saved.values())))
    return without_spread(mean, windows, when=found.when, details={"by_share": saved})


def _text(session: Session) -> Measured:
    if not session.sizes.thorough:
        return _recorded_text(session)
    alone, completed = (
        texts.log_probs(session, SOFTMAX, spec).mean(1)
        for spec in _specs(session, session.sizes.context)
    )
    return of_interval(statistics.paired_difference(completed, alone))


def _divergence(session: Session) -> Measured:
    alone, completed = (
        texts.divergence(session, SOFTMAX, spec)
        for spec in _specs(session, session.sizes.context)
    )
    details = {"alone": float(alone.mean()), "completed": float(completed.mean())}
    return of_interval(statistics.paired_difference(alone, completed), details=details)


def _retrieval(session: Session, question: str) -> Measured:
    alone, completed = (
        asked.retrieved(session, SOFTMAX, spec, question=question)
        for spec in _specs(session, session.sizes.layer_context)
    )
    details = {"alone": float(alone.mean()), "completed": float(completed.mean())}
    return of_interval(statistics.paired_shares(completed, alone), details=details)


# Of one layer of an 8B model, where the paper's budget of 1% leaves room.
_LONG, _SHORT = 131_072, 4096


def _of_8b(session: Session, context: int, options: str):
    spec = dataclasses.replace(
        session.model(SOFTMAX).decoder.cache_spec(1, context, 64),
        num_q_heads=32,
        num_kv_heads=8,
    )
    method = session.method(f"topk_completion:budget=1024,charge=none{options}")
    return method, spec


def _reads(session: Session) -> Measured:
    (alone, spec), (completed, _) = (
        _of_8b(session, _LONG, options) for options in (",lam=0", "")
    )
    both = [method.traffic(spec, _LONG) for method in (alone, completed)]
    details = {"alone": both[0]._asdict(), "completed": both[1]._asdict()}
    return from_shapes(both[1].kv / both[0].kv, details=details)


def _state(session: Session) -> Measured:
    sizes = {}
    for context in (_SHORT, _LONG):
        method, spec = _of_8b(session, context, "")
        state = jax.eval_shape(lambda m=method, s=spec: m.finish(m.init(s)))
        sizes[context] = num_bytes((state.summary, state.params))
    return from_shapes(sizes[_LONG] / sizes[_SHORT], details={"bytes": sizes[_LONG]})


_MAPS = "Maps that need no training (anchor); the paper trains its map"

CLAIMS = (
    Claim(
        name="completion-error",
        method="topk_completion",
        sentence="At equal reads, counted in tokens with the summary charged, "
        "completed retrieval errs less than retrieval alone",
        source=f"{PAPER}, Tables 2 and 3",
        paper="RULER 16K, 1%: .606 alone, .630 completed (Llama-3.2-1B)",
        value="relative L2 error of head outputs saved",
        bar=Effect(none=0.0, bar=0.0),
        measure=_error,
        note=_MAPS,
    ),
    Claim(
        name="completion-text",
        method="topk_completion",
        sentence="At equal reads, completed retrieval predicts better than retrieval "
        "alone",
        source=f"{PAPER}, Tables 2 and 3",
        paper="RULER 16K, 1%: .606 alone, .630 completed (Llama-3.2-1B)",
        value="nats a token saved on held-out text",
        bar=Effect(none=0.0, bar=0.0),
        measure=_text,
        because={
            "not reproduced": "heads whose output errs less need not predict better: "
            "those that retrieve gain nothing, and the ones that gain hardly matter to "
            "the next token here",
            "direction only": "heads whose output errs less need not predict better: "
            "those that gain hardly matter to the next token here",
        },
        note=_MAPS,
    ),
    Claim(
        name="completion-entropy",
        method="topk_completion",
        sentence="The gain of completion is largest in heads of high entropy",
        source=f"{PAPER}, analysis of H_mid",
        paper="the gain rises with the entropy; a tie in its lowest quartile",
        value="rank correlation of a head's gain with its entropy",
        bar=Effect(none=0.0, bar=0.0),
        measure=_entropy,
    ),
    Claim(
        name="completion-reads",
        method="topk_completion",
        sentence="Completion reads no more keys and values than retrieval alone",
        source=f"{PAPER}, section 4 and Table 1",
        paper="the same exact reads",
        value="bytes of keys and values read, completed over alone, the same K",
        bar=Within(1.0),
        measure=_reads,
    ),
    Claim(
        name="completion-state",
        method="topk_completion",
        sentence="What completion adds is of fixed size, whatever the context",
        source=f"{PAPER}, section 4",
        paper="fixed-size",
        value="bytes of summary and map at 128K tokens over those at 4K",
        bar=Within(1.0),
        measure=_state,
    ),
)


def _retrieval_claim(question: str, when: str) -> Claim:
    return Claim(
        name=f"completion-ruler{'-after' if question == 'after' else ''}",
        method="topk_completion",
        sentence="At equal reads, completed retrieval answers more than retrieval "
        f"alone, the question {when}",
        source=f"{PAPER}, Tables 2 and 3",
        paper="RULER 16K, 1%: .606 alone, .630 completed (Llama-3.2-1B)",
        value="RULER's score above retrieval alone",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(_retrieval, question=question),
        note=_MAPS,
    )


MORE = (
    Claim(
        name="completion-kl",
        method="topk_completion",
        sentence="At equal reads, completed retrieval predicts more as full attention "
        "does than retrieval alone",
        source="ours; the paper's measure is RULER",
        paper="no figure",
        value="nats of KL divergence from full attention saved, held-out text",
        bar=Effect(none=0.0, bar=0.0),
        measure=_divergence,
        note=_MAPS,
    ),
    _retrieval_claim("seen", "read with the context"),
    _retrieval_claim("after", "asked after it"),
)
