"""Claims of "RefreshKV: Updating Small KV Cache During Long-form Generation"."""

import functools
import math
from typing import Any

import numpy as np

from kvjax import accounting
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
from kvjax.evaluation.claims.measure import asked, texts
from kvjax.evaluation.claims.session import REFRESHED, SOFTMAX, Session
from kvjax.evaluation.statistics import Interval

PAPER = "arXiv:2411.05787"
RESULTS = "*-refreshkv.json"


def _budget(session: Session) -> int:
    return session.sizes.context // session.sizes.cut


def _ours(session: Session, options: str = "") -> str:
    return f"refreshkv:budget={_budget(session)},group_reduce=mean{options}"


def _evicting(session: Session, model: str, steps: int, options: str = "") -> str:
    """SnapKV with as many bytes a step as RefreshKV reads, in the mean over `steps`.

    RefreshKV's are a mean over its stride, half-way. What is generated SnapKV keeps
    besides its budget: half the steps, in the mean, come off it.
    """
    decoder = session.model(model).decoder
    middle = session.sizes.context + steps // 2
    ours, full = (
        accounting.bytes_read(session.method(spec), decoder, middle)
        for spec in (_ours(session), "full")
    )
    return f"snapkv:budget={-(-middle * ours // full) - steps // 2}{options}"


def _long_output(session: Session, task: str, model: str, options: str) -> Measured:
    made = texts.examples(session, model, task)
    steps = max(example.answer_tokens for example in made)
    ours = _ours(session, options)
    theirs = _evicting(session, model, steps, options)
    scores_of = {
        spec: texts.scores(session, model, task, spec)
        for spec in (ours, theirs, "full")
    }
    interval = statistics.paired_shares(scores_of[ours], scores_of[theirs])
    details = {spec: float(scores.mean()) for spec, scores in scores_of.items()}
    return of_interval(interval, details={"scores": details, "model": model})


def _right_output(
    session: Session, task: str, model: str = SOFTMAX, options: str = ""
) -> Measured:
    """The right answer fed, under methods that read as many bytes over it."""
    made = asked.examples(session, model, task)
    steps = max(example.answer_tokens for example in made)
    ours = _ours(session, options)
    theirs = _evicting(session, model, steps, options)
    found = {
        spec: asked.nats(session, model, task, spec) for spec in (theirs, ours, "full")
    }
    details = {spec: float(nats.mean()) for spec, nats in found.items()}
    interval = statistics.paired_difference(found[theirs], found[ours])
    return of_interval(interval, details={"nats": details, "tokens": steps})


def _retrieval(session: Session) -> Measured:
    steps = asked.NEW_TOKENS
    theirs, ours = (
        asked.retrieved(session, SOFTMAX, spec, question="after")
        for spec in (_evicting(session, SOFTMAX, steps), _ours(session))
    )
    details = {"snapkv": float(theirs.mean()), "refreshkv": float(ours.mean())}
    return of_interval(statistics.paired_shares(ours, theirs), details=details)


def _divergence(session: Session) -> Measured:
    theirs, ours = (
        texts.divergence(session, SOFTMAX, spec)
        for spec in (_evicting_on_text(session), _ours(session))
    )
    details = {"snapkv": float(theirs.mean()), "refreshkv": float(ours.mean())}
    return of_interval(statistics.paired_difference(theirs, ours), details=details)


def _untrained(session: Session) -> Measured:
    session.model(SOFTMAX)
    raise NotMeasuredError(
        "not measurable on this model: it takes weights of it that were trained in "
        "RefreshKV's setting, and a control; none are at hand."
    )


def _fed(task: str, options: str = "") -> dict[str, Any]:
    """The measure on a model that was not trained on a task: it hardly answers it."""
    return {
        "value": "nats a token of the right answer, which is fed, below SnapKV's, "
        "equal bytes read",
        "measure": functools.partial(_right_output, task=task, options=options),
        "note": "a model that was not trained on the task hardly answers it, so what "
        "is told is how likely the right answer is",
    }


def _nats(session: Session, spec: str) -> np.ndarray:
    return -texts.log_probs(session, SOFTMAX, spec)


def _evicting_on_text(session: Session) -> str:
    return _evicting(session, SOFTMAX, session.sizes.text_steps)


def _text(session: Session) -> Measured:
    theirs, ours = (
        _nats(session, spec).mean(1)
        for spec in (_evicting_on_text(session), _ours(session))
    )
    return of_interval(statistics.paired_difference(theirs, ours))


def _drift(session: Session) -> Measured:
    full = _nats(session, "full")
    lost = {
        name: _nats(session, spec) - full
        for name, spec in {
            "snapkv": _evicting_on_text(session),
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
    """Bytes of a refresh by attention's weights alone over one that attends to all."""
    spec = session.model(SOFTMAX).decoder.cache_spec(1, 131_072, 64)
    totals = []
    for options in (",full_attend=false", ""):
        always = "refreshkv:budget=2048,schedule=fixed,stride=1"
        method = session.method(f"{always}{options}")
        totals.append(method.traffic(spec, 131_072).total)
    return from_shapes(totals[0] / totals[1], details={"bytes": totals})


def _training(session: Session, training: str) -> Measured:
    on_text = [
        entry
        for entry in recorded.entries(session.results, RESULTS, "seeds")
        if entry.data["source"] == "text" and training in entry.data.get("training", "")
    ]
    ours, full = (
        recorded.first(
            on_text,
            f"text under {method} of models trained on {training}",
            lambda e, method=method: e["method"].startswith(method),
        )
        for method in ("refreshkv", "full")
    )
    above = full.data["nats_above_control"]
    gain = below(ours, "nats_above_control", full_attention=above)
    return gain._replace(
        note="Under full attention they are {mean:.3f} nats [{low:.3f}, {high:.3f}] "
        "above their controls; {n} seeds".format(**above)
    )


def below(entry: recorded.Entry, key: str, **details: Any) -> Measured:
    """Turns round what was recorded as an interval of nats above."""
    above = entry.data[key]
    low, high = above["low"], above["high"]
    low, high = (
        edge if x is None else x for x, edge in ((low, -math.inf), (high, math.inf))
    )
    gain = Interval(-above["mean"], -high, -low, above["n"])
    return of_interval(gain, when=entry.when, details=details)


def _speed(session: Session) -> Measured:
    step = recorded.first(
        recorded.entries(session.results, RESULTS, "time"),
        "a decode step of refreshkv",
        lambda e: e["method"].startswith("refreshkv"),
    )
    return without_spread(
        step.data["times_as_fast_as_full"],
        1,
        when=step.when,
        details={"length": step.data["length"], "method": step.data["method"]},
    )


_NEWEST = (
    "text at this size is predicted from the newest tokens, and SnapKV keeps all that "
    "are generated besides its budget; RefreshKV's small cache has to hold them too, "
    "and here outputs are long beside it"
)

# As the recorded runs say what the models were trained on.
_MIXTURE, _TEXT_ALONE = "the preset's mixture", "text alone"


def _training_claim(name: str, training: str, like: str) -> Claim:
    few = "0.2 million targets, and held-out text hardly tells the models apart"
    return Claim(
        name=name,
        method="refreshkv",
        sentence="Continued pretraining in its setting helps its decoding more than "
        f"the same training with full attention: trained on {training}",
        source=f"{PAPER}, Table 5",
        paper="perplexity 3.13 to 3.05 at a stride of 50, full attention 2.70 to 2.70",
        value="nats a token of text below the controls, under RefreshKV",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(_training, training=training),
        because={"not reproduced": few, "direction only": few},
        note=f"Trained on {training}, {like}",
        elsewhere={"measure": _untrained},
    )


def _table_claim(name: str, kernel: int, why: str) -> Claim:
    reason = (
        f"votes pooled over {kernel} tokens do not reach from a row to the next, and "
        "neither method finds many"
    )
    return Claim(
        name=name,
        method="refreshkv",
        sentence="On long outputs it beats eviction that reads as much: a list written "
        f"as a table, votes pooled over {kernel} tokens",
        source=f"{PAPER}, Table 2 (HTML to TSV)",
        paper="F1 17 against SnapKV's 0, full 33 (Llama-3.1-8B)",
        value="F1 of rows above SnapKV's, equal bytes read",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(
            _long_output,
            task="extraction",
            model=REFRESHED,
            options=f",kernel={kernel}",
        ),
        because={"not reproduced": reason, "direction only": reason},
        note=f"Both methods pool {kernel} tokens, {why}; the only embedded model that "
        "knows the task was trained on it, in RefreshKV's setting",
        elsewhere=_fed("extraction", f",kernel={kernel}"),
    )


CLAIMS = (
    Claim(
        name="refresh-chain",
        method="refreshkv",
        sentence="On long outputs it beats eviction that reads as much: chain of keys",
        source=f"{PAPER}, Table 2",
        paper="25 against SnapKV's 12, full 56 (Llama-3.1-70B)",
        value="share of links before a mistake above SnapKV's, equal bytes read",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(
            _long_output, task="chain", model=SOFTMAX, options=""
        ),
        elsewhere=_fed("chain"),
    ),
    _table_claim("refresh-table", 7, "the paper's"),
    _table_claim("refresh-table-13", 13, "as many as reach from a row to the next"),
    Claim(
        name="refresh-text",
        method="refreshkv",
        sentence="It predicts text better than SnapKV",
        source=f"{PAPER}, Table 1",
        paper="perplexity 2.27 against 2.54, full 2.22 (Llama-3.1-8B, Arxiv)",
        value="nats a token below SnapKV, equal bytes read",
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
    _training_claim("refresh-training", _MIXTURE, "as the model that ships"),
    _training_claim("refresh-training-text", _TEXT_ALONE, "as the paper's"),
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


def _long_claim(name: str, task: str, what: str) -> Claim:
    return Claim(
        name=name,
        method="refreshkv",
        sentence=f"On long outputs it beats eviction that reads as much: {what}",
        source=f"{PAPER}, Table 2; the task is LongProc's",
        paper="F1 17 against SnapKV's 0, full 33 (HTML to TSV, Llama-3.1-8B)",
        bar=Effect(none=0.0, bar=0.0),
        **_fed(task),
    )


MORE = (
    _long_claim("refresh-countdown", "countdown", "a search, attempt by attempt"),
    _long_claim("refresh-route", "path_traversal", "a route from town to town"),
    Claim(
        name="refresh-kl",
        method="refreshkv",
        sentence="It predicts more as full attention does than SnapKV",
        source=f"{PAPER}, Table 1; the divergence is ours",
        paper="perplexity 2.27 against 2.54, full 2.22 (Llama-3.1-8B, Arxiv)",
        value="nats of KL divergence from full attention below SnapKV's, equal bytes "
        "read",
        bar=Effect(none=0.0, bar=0.0),
        measure=_divergence,
    ),
    Claim(
        name="refresh-ruler-after",
        method="refreshkv",
        sentence="Asked after the context was read it answers more than SnapKV, which "
        "chose before it knew the question",
        source="ours: what a refresh is for",
        paper="no figure",
        value="RULER's score above SnapKV's, equal bytes read",
        bar=Effect(none=0.0, bar=0.0),
        measure=_retrieval,
    ),
)
