"""Claims of "EntmaxKV: Support-Aware Decoding for Entmax Attention"."""

import functools

import numpy as np

from kvjax.cost import bench_kernels
from kvjax.evaluation import statistics
from kvjax.evaluation.claims import recorded
from kvjax.evaluation.claims.claim import (
    Claim,
    Effect,
    Measured,
    NotMeasuredError,
    Within,
    in_whole,
    of_interval,
    without_spread,
)
from kvjax.evaluation.claims.measure import layers, steps, texts
from kvjax.evaluation.claims.session import ENTMAX, SOFTMAX, Session
from kvjax.stores import buffers

PAPER = "arXiv:2605.21649"
PAGE = 16  # the method's default
SPARSE = "sparse, entmax, gaussian"  # operation of `kvjax bench kernels`


def _budget(session: Session, context: int) -> int:
    """Whole pages, two at least."""
    return max(context // session.sizes.cut // PAGE * PAGE, 2 * PAGE)


def _layers(session: Session) -> tuple[layers.Layers, layers.Layers]:
    """EntmaxKV on the entmax model, Quest on the softmax model: the same pages."""
    for role in (ENTMAX, SOFTMAX):  # before either is measured
        session.model(role)
    budget = _budget(session, session.sizes.layer_context)
    ours = layers.run(session, ENTMAX, f"entmaxkv:budget={budget}")
    theirs = layers.run(session, SOFTMAX, f"quest:budget={budget}")
    return ours, theirs


def _details(session: Session) -> dict:
    ours, theirs = _layers(session)
    return {
        name: {
            "error": float(found.error.mean()),
            "dropped": float(found.dropped.mean()),
            "bytes_a_layer": float(found.bytes_read.mean()),
        }
        for name, found in {"entmaxkv": ours, "quest": theirs}.items()
    }


def _below(session: Session, what: str) -> Measured:
    ours, theirs = (getattr(lost, what) for lost in _layers(session))
    is_share = what == "dropped"
    paired = statistics.paired_shares if is_share else statistics.paired_difference
    below = paired(theirs, ours)
    return of_interval(below, details=_details(session))


def _support(session: Session) -> Measured:
    ours, theirs = (found.found.support.mean((0, 2)) for found in _layers(session))
    found = statistics.paired_shares(ours, theirs)
    details = {"entmaxkv": float(ours.mean()), "quest": float(theirs.mean())}
    return of_interval(found, details=details)


def _sparse(session: Session) -> str:
    return f"entmaxkv:budget={_budget(session, session.sizes.context)}"


def _recorded_answers(session: Session) -> Measured:
    for document, when in recorded.documents(session.results, "*-entmaxkv.json"):
        found, context = document.get("passkey", {}), document.get("context", 0)
        ours, full = (found.get(name) for name in (f"topk {context // 8}", "dense"))
        if ours and full and len(ours["scores"]) == len(full["scores"]):
            interval = statistics.paired_shares(ours["scores"], full["scores"])
            details = {"entmaxkv": ours["mean"], "full": full["mean"]}
            details["context"] = context
            return of_interval(interval, when=when, details=details)
    raise NotMeasuredError("no recorded run has pass keys under entmaxkv.")


def _answers(session: Session) -> Measured:
    if not session.sizes.thorough:
        return _recorded_answers(session)
    ours, full = (
        texts.scores(session, ENTMAX, "passkey", spec)
        for spec in (_sparse(session), "full")
    )
    details = {"entmaxkv": float(ours.mean()), "full": float(full.mean())}
    return of_interval(statistics.paired_shares(ours, full), details=details)


def _text(session: Session) -> Measured:
    session.needs_thorough()
    ours, full = (
        texts.log_probs(session, ENTMAX, spec).mean(1)
        for spec in (_sparse(session), "full")
    )
    return of_interval(statistics.paired_difference(full, ours))


def _adaptive(session: Session) -> Measured:
    lost = layers.run(session, ENTMAX, "entmaxkv:budget=none,selector=gaussian")
    spec = layers.layer_spec(session, ENTMAX)
    tokens = session.sizes.layer_context - session.sizes.layer_steps
    whole = buffers.kv_bytes(spec, tokens) / spec.batch
    share = statistics.amount_interval(lost.bytes_read / whole)
    return of_interval(share, details={"error": float(lost.error.mean())})


def _certificate(session: Session) -> Measured:
    session.needs_thorough()
    budget = _budget(session, session.sizes.layer_context)
    lost = layers.run(session, ENTMAX, f"entmaxkv:budget={budget},certified=true")
    largest = float(lost.found.error.max())
    details = {
        "proved": float(lost.found.exact.mean()),
        "read_in_full": float(lost.found.refreshed.mean()),
    }
    return in_whole(
        largest,
        lost.found.error.size,
        details=details,
        note=f"For it {details['read_in_full']:.0%} of a layer's steps read its whole "
        "cache",
    )


def _timed(session: Session) -> dict[str, np.ndarray]:
    """Seconds of one 8B layer's step on this machine, repeats in turns."""

    def run():
        sizes = bench_kernels.Sizes(context=session.sizes.decoded, budget=512)
        every = bench_kernels.operations(sizes)
        chosen = {name: every[name] for name in ("full", "entmax full", SPARSE)}
        del every
        measured = bench_kernels.measure(chosen, 2 * session.sizes.repeats)
        return {name: np.array(seconds) for name, seconds in measured.items()}

    with steps.optimised():
        return session.remember("entmax seconds", run)


def _faster(session: Session, than: str) -> Measured:
    if not session.sizes.thorough:
        return _recorded_faster(session, than, on_gpu=False)
    seconds = _timed(session)
    ratios = seconds[than] / seconds[SPARSE]
    details = {"context": session.sizes.decoded, "budget": 512}
    return of_interval(statistics.amount_interval(ratios), details=details)


def _recorded_faster(session: Session, than: str, on_gpu: bool) -> Measured:
    rows, when = recorded.kernels(session.results, on_gpu)
    by_context: dict[int, dict[str, float]] = {}
    for row in rows:
        by_context.setdefault(row["context"], {})[row["name"]] = row["median"]
    curve = {
        context: seconds[than] / seconds[SPARSE]
        for context, seconds in sorted(by_context.items())
        if {than, SPARSE} <= set(seconds)
    }
    if not curve:
        advice = "" if on_gpu else "; without --quick it is measured"
        raise NotMeasuredError(f"the recorded run, {when}, lacks {SPARSE!r}{advice}.")
    longest = max(curve)
    details = {"times_as_fast_by_context": curve}
    return without_spread(curve[longest], 1, when=when, details=details)


_SELECTORS = (
    "neither selector finds the few pages that heads which match tokens need: their "
    "keys are nearly random directions, and the bounds of any page look alike"
)

_PLANTED = (
    "Keys are drawn so that the selector lists 512 tokens, a far smaller part than on "
    "a model (`entmax-adaptive`); full attention is XLA's, which on a CPU reaches a "
    "quarter of its roofline"
)

CLAIMS = (
    Claim(
        name="entmax-dropped",
        method="entmaxkv",
        sentence="At an equal budget it drops less attention mass than sparse softmax",
        source=f"{PAPER}, abstract and section 5.1",
        paper="less; the figures were not seen",
        value="attention mass dropped, below Quest's, 1/8 of the tokens",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(_below, what="dropped"),
    ),
    Claim(
        name="entmax-error",
        method="entmaxkv",
        sentence="At an equal budget its outputs err less than sparse softmax's",
        source=f"{PAPER}, abstract and section 5.1",
        paper="less; the figures were not seen",
        value="relative L2 error of head outputs below Quest's, 1/8 of the tokens",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(_below, what="error"),
    ),
    Claim(
        name="entmax-support",
        method="entmaxkv",
        sentence="At an equal budget it keeps more of the tokens that have weight",
        source=f"{PAPER}, abstract and section 5.1",
        paper="more; the figures were not seen",
        value="share of the tokens with weight that are read, above Quest's",
        bar=Effect(none=0.0, bar=0.0),
        measure=_support,
        note="Under softmax every token has weight: Quest's share is that of the "
        "tokens it reads, whatever it chooses",
    ),
    Claim(
        name="entmax-answers",
        method="entmaxkv",
        sentence="With a small part of the cache it answers as entmax over all of it",
        source=f"{PAPER}, abstract (long-context benchmarks)",
        paper="close to full-cache entmax; the figures were not seen",
        value="pass keys found, above full-cache entmax, 1/8 of the tokens",
        bar=Within(-0.05, "higher"),
        measure=_answers,
        because={"not reproduced": _SELECTORS, "direction only": _SELECTORS},
    ),
    Claim(
        name="entmax-text",
        method="entmaxkv",
        sentence="With a small part of the cache it predicts as entmax over all of it",
        source=f"{PAPER}, abstract (language modelling)",
        paper="close to full-cache entmax; the figures were not seen",
        value="nats a token lost to full-cache entmax, 1/8 of the tokens",
        bar=Within(0.02),
        measure=_text,
        because={"not reproduced": _SELECTORS, "direction only": _SELECTORS},
    ),
    Claim(
        name="entmax-adaptive",
        method="entmaxkv",
        sentence="The Gaussian selector reads what the support needs, a small part",
        source=f"{PAPER}, abstract; a quarter is the authors' benchmark's coverage",
        paper="a small fraction of the cache",
        value="share of the cache's bytes read, no budget set",
        bar=Effect(none=1.0, bar=0.25, better="lower"),
        measure=_adaptive,
        because={"direction only": _SELECTORS, "not reproduced": _SELECTORS},
    ),
    Claim(
        name="entmax-certificate",
        method="entmaxkv",
        sentence="With the certificate, outputs are those of full-cache entmax",
        source="ours, not the paper's",
        paper="-",
        value="largest relative L2 error of a head's output, mean over steps",
        bar=Within(1e-5),
        measure=_certificate,
    ),
    Claim(
        name="entmax-speed-softmax",
        method="entmaxkv",
        sentence="At a long context it decodes faster than full softmax",
        source=f"{PAPER}, abstract",
        paper="up to 3.36 times at 1M tokens (a GPU)",
        value="times as fast as full softmax on this machine, one 8B layer",
        bar=Effect(none=1.0, bar=3.36),
        measure=functools.partial(_faster, than="full"),
        note=_PLANTED,
    ),
    Claim(
        name="entmax-speed-entmax",
        method="entmaxkv",
        sentence="At a long context it decodes faster than full entmax",
        source=f"{PAPER}, abstract",
        paper="up to 5.43 times at 1M tokens (a GPU)",
        value="times as fast as full entmax on this machine, one 8B layer",
        bar=Effect(none=1.0, bar=5.43),
        measure=functools.partial(_faster, than="entmax full"),
        note=_PLANTED,
    ),
    Claim(
        name="entmax-gpu-softmax",
        method="entmaxkv",
        sentence="At a long context it decodes faster than full softmax, on a GPU",
        source=f"{PAPER}, abstract",
        paper="up to 3.36 times at 1M tokens",
        value="times as fast as full softmax at the longest context recorded",
        bar=Effect(none=1.0, bar=3.36),
        measure=functools.partial(_recorded_faster, than="full", on_gpu=True),
    ),
    Claim(
        name="entmax-gpu-entmax",
        method="entmaxkv",
        sentence="At a long context it decodes faster than full entmax, on a GPU",
        source=f"{PAPER}, abstract",
        paper="up to 5.43 times at 1M tokens",
        value="times as fast as full entmax at the longest context recorded",
        bar=Effect(none=1.0, bar=5.43),
        measure=functools.partial(_recorded_faster, than="entmax full", on_gpu=True),
    ),
)
