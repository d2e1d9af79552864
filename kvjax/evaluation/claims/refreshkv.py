"""Claims of "RefreshKV: Updating Small KV Cache During Long-form Generation"."""

import functools
import math
from typing import Any

import numpy as np

from kvjax import accounting
from kvjax.evaluation import statistics
from kvjax.evaluation.claims import recorded, texts
from kvjax.evaluation.claims.claim import (
    Claim,
    Effect,
    Measured,
    NotMeasuredError,
    Within,
    counted,
    of_interval,
    without_spread,
)
from kvjax.evaluation.claims.session import REFRESHED, SOFTMAX, Session
from kvjax.evaluation.statistics import Interval

PAPER = "arXiv:2411.05787"
RESULTS = "*-refreshkv.json"


def _budget(session: Session) -> int:
    return session.sizes.context // 8


def _ours(session: Session, options: str = "") -> str:
    return f"refreshkv:budget={_budget(session)},group_reduce=mean{options}"


def _evicting(session: Session, model: str) -> str:
    """SnapKV with as many bytes a step as RefreshKV reads in the mean over its stride.

    What is generated it keeps besides its budget, which RefreshKV's has to hold too.
    """
    context, decoder = session.sizes.context, session.model(model).decoder
    ours, full = (
        accounting.bytes_read(session.method(spec), decoder, context)
        for spec in (_ours(session), "full")
    )
    return f"snapkv:budget={-(-context * ours // full)}"


def _long_output(session: Session, task: str, model: str, options: str) -> Measured:
    ours, theirs = _ours(session, options), _evicting(session, model)
    found = {
        spec: texts.scores(session, model, task, spec)
        for spec in (ours, theirs, "full")
    }
    interval = statistics.paired_difference(found[ours], found[theirs])
    details = {spec: float(scores.mean()) for spec, scores in found.items()}
    return of_interval(interval, details={"scores": details, "model": model})


def _nats(session: Session, spec: str) -> np.ndarray:
    return -texts.log_probs(session, SOFTMAX, spec)


def _text(session: Session) -> Measured:
    theirs, ours = (
        _nats(session, spec).mean(1)
        for spec in (_evicting(session, SOFTMAX), _ours(session))
    )
    return of_interval(statistics.paired_difference(theirs, ours))


def _drift(session: Session) -> Measured:
    full = _nats(session, "full")
    lost = {
        name: _nats(session, spec) - full
        for name, spec in {
            "snapkv": _evicting(session, SOFTMAX),
            "refreshkv": _ours(session),
        }.items()
    }
    quarter = full.shape[1] // 4
    grown = {
        name: x[:, -quarter:].mean(1) - x[:, :quarter].mean(1)
        for name, x in lost.items()
    }
    found = statistics.paired_difference(grown["snapkv"], grown["refreshkv"])
    bucket = max(quarter // 2, 1)
    curves = {
        name: [float(x[:, i : i + bucket].mean()) for i in range(0, x.shape[1], bucket)]
        for name, x in lost.items()
    }
    return of_interval(found, details={"nats_lost_by_place": curves, "bucket": bucket})


def _attention_only(session: Session) -> Measured:
    session.needs_thorough()
    without, with_ = (
        _nats(session, _ours(session, options)).mean(1)
        for options in (",full_attend=false", "")
    )
    return of_interval(statistics.paired_difference(without, with_))


def _bytes(session: Session) -> Measured:
    """Of a refresh by attention's weights alone over one that attends to everything."""
    spec = session.model(SOFTMAX).decoder.cache_spec(1, 131_072, 64)
    found = []
    for options in (",full_attend=false", ""):
        always = "refreshkv:budget=2048,schedule=fixed,stride=1"
        method = session.method(f"{always}{options}")
        found.append(method.traffic(spec, 131_072).total)
    return counted(found[0] / found[1], details={"bytes": found})


def _training(session: Session) -> Measured:
    try:
        seeds = recorded.entries(session.results, RESULTS, "seeds")
    except NotMeasuredError:
        seeds = []
    ours = [e for e in seeds if e.data["method"].startswith("refreshkv")]
    on_text = [e for e in ours if e.data["source"] == "text"]
    if on_text:
        details = {e.data["source"]: e.data["nats_above_control"] for e in ours}
        return below(on_text[-1], "nats_above_control", nats_above_control=details)
    found = recorded.first(
        recorded.entries(session.results, RESULTS, "text"),
        "text of embedded-refreshkv under refreshkv against its control",
        lambda e: e["model"] == REFRESHED and e["method"].startswith("refreshkv"),
    )
    return below(found, "nats_above_the_first_model", seeds=1)


def below(entry: recorded.Entry, key: str, **details: Any) -> Measured:
    """What was recorded as an interval of nats above, turned round."""
    above = entry.data[key]
    low, high = above["low"], above["high"]
    low, high = (
        edge if x is None else x for x, edge in ((low, -math.inf), (high, math.inf))
    )
    gain = Interval(-above["mean"], -high, -low, above["n"])
    return of_interval(gain, when=entry.when, details=details)


def _speed(session: Session) -> Measured:
    found = recorded.first(
        recorded.entries(session.results, RESULTS, "time"),
        "a decode step of refreshkv",
        lambda e: e["method"].startswith("refreshkv"),
    )
    return without_spread(
        found.data["times_as_fast_as_full"],
        1,
        when=found.when,
        details={"length": found.data["length"], "method": found.data["method"]},
    )


_NEWEST = (
    "text at this size is predicted from the newest tokens, and SnapKV keeps all that "
    "are generated besides its budget; RefreshKV's small cache has to hold them too, "
    "and here outputs are long beside it"
)

CLAIMS = (
    Claim(
        name="refresh-chain",
        method="refreshkv",
        sentence="On long outputs it beats eviction that reads as much: chain of keys",
        source=f"{PAPER}, Table 2",
        paper="25 against SnapKV's 12, full 56 (Llama-3.1-70B)",
        value="share of links before the first mistake above SnapKV's, which reads as "
        "many bytes a step",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(
            _long_output, task="chain", model=SOFTMAX, options=""
        ),
    ),
    Claim(
        name="refresh-table",
        method="refreshkv",
        sentence="On long outputs it beats eviction that reads as much: a list written "
        "as a table",
        source=f"{PAPER}, Table 2 (HTML to TSV)",
        paper="F1 17 against SnapKV's 0, full 33 (Llama-3.1-8B)",
        value="F1 of rows above SnapKV's, which reads as many bytes a step",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(
            _long_output, task="extraction", model=REFRESHED, options=",kernel=13"
        ),
        note="Pooling of 13 tokens, the paper's 7 do not reach from a row to the next; "
        "the only embedded model that knows the task was trained on it",
    ),
    Claim(
        name="refresh-text",
        method="refreshkv",
        sentence="It predicts text better than SnapKV",
        source=f"{PAPER}, Table 1",
        paper="perplexity 2.27 against 2.54, full 2.22 (Llama-3.1-8B, Arxiv)",
        value="nats a token below SnapKV, which reads as many bytes a step",
        bar=Effect(none=0.0, bar=0.0),
        measure=_text,
        because={"not reproduced": _NEWEST, "direction only": _NEWEST},
    ),
    Claim(
        name="refresh-drift",
        method="refreshkv",
        sentence="What SnapKV loses grows with every token generated; what RefreshKV "
        "loses does not",
        source=f"{PAPER}, Figure 3",
        paper="SnapKV drifts up from the first 16 tokens on, RefreshKV stays flat",
        value="growth of the nats lost, last quarter minus first, SnapKV's above ours",
        bar=Effect(none=0.0, bar=0.0),
        measure=_drift,
        because={"not reproduced": _NEWEST, "direction only": _NEWEST},
    ),
    Claim(
        name="refresh-attention-only",
        method="refreshkv",
        sentence="Refreshing the small cache is what helps: full steps need not attend "
        "to everything",
        source=f"{PAPER}, Table 4",
        paper="perplexity 2.32 with full attention and 2.32 without it",
        value="nats a token lost by full steps that attend to the small cache",
        bar=Within(0.01),
        measure=_attention_only,
    ),
    Claim(
        name="refresh-bytes",
        method="refreshkv",
        sentence="A full step that does not attend to everything reads about half",
        source=f"{PAPER}, Table 4; the bytes are ours",
        paper="no figure",
        value="bytes of a full step, attention's weights alone over full attention, "
        "at 128K",
        bar=Within(0.55),
        measure=_bytes,
    ),
    Claim(
        name="refresh-training",
        method="refreshkv",
        sentence="Continued pretraining in its setting helps its decoding more than "
        "the same training with full attention",
        source=f"{PAPER}, Table 5",
        paper="perplexity 3.13 to 3.05 at a stride of 50, full attention 2.70 to 2.70",
        value="nats a token below the control, under RefreshKV",
        bar=Effect(none=0.0, bar=0.0),
        measure=_training,
        because={
            "not reproduced": "60 steps are 0.2 million targets, and held-out text "
            "does not tell the two models apart",
            "direction only": "60 steps are 0.2 million targets, and held-out text "
            "hardly tells the two models apart",
        },
    ),
    Claim(
        name="refresh-speed",
        method="refreshkv",
        sentence="It decodes faster than full attention",
        source=f"{PAPER}, Table 1",
        paper="6.33 s against 7.50 s (Llama-3.1-8B, 16K, one A100): 1.18 times",
        value="times as fast as full attention, one 8B layer",
        bar=Effect(none=1.0, bar=1.18),
        measure=_speed,
    ),
)
