"""Claims of "Squeezed Attention: Accelerating Long Context Length LLM Inference"."""

import functools

import numpy as np

from kvjax.attention import clustering
from kvjax.evaluation import statistics
from kvjax.evaluation.claims import recorded
from kvjax.evaluation.claims.claim import (
    Claim,
    Effect,
    Measured,
    Within,
    from_shapes,
    of_interval,
)
from kvjax.evaluation.claims.measure import asked, layers, shapes, texts
from kvjax.evaluation.claims.session import SOFTMAX, Session

PAPER = "arXiv:2411.09688"
RESULTS = "*-squeezed.json"
CLUSTERS = 0.05  # of the tokens, the paper's
LOW, HIGH = 0.7, 0.9  # share of the tokens that stays unread
# Of the whole model, and lists as long as they come: as in the paper.
WHOLE = "scope=model"
COARSE = "coarse=0.01"


def _tail(context: int) -> int:
    """Tokens that are always read: the paper's, or fewer in a short context."""
    return min(100, context // 16)


def _spec(context: int, unread: float, *options: str) -> str:
    given = f"sparsity={unread}", f"budget={context}", f"tail={_tail(context)}"
    return f"squeezed:{','.join([*given, *options])}"


def _run(session: Session, unread: float, *options: str) -> layers.Layers:
    """Layers alone, each with a threshold of its own."""
    spec = _spec(session.sizes.layer_context, unread, *options)
    return layers.run(session, SOFTMAX, spec)


def _reads(session: Session) -> Measured:
    """Counts as the paper does: tokens of the fixed context, centroids as keys."""
    sizes, found = session.sizes, _run(session, LOW)
    tail = _tail(sizes.layer_context)
    fixed = sizes.layer_context - sizes.layer_steps - tail
    heads = layers.layer_spec(session, SOFTMAX).num_kv_heads
    dense = tail + (sizes.layer_steps + 1) / 2  # in the mean over steps
    read = np.asarray(found.found.read.mean(0)) / heads - dense
    centroids = clustering.share_of(fixed, CLUSTERS) / 2
    share = statistics.amount_interval((read + centroids) / fixed)
    details = {
        "fixed": fixed,
        "of them read": float(read.mean() / fixed),
        "dense": dense,
        "dropped": float(found.dropped.mean()),
    }
    return of_interval(share, details=details)


def _text(session: Session) -> Measured:
    session.needs_thorough()
    return texts.nats_above(session, _spec(asked.room(session), LOW, WHOLE))


def _answers(session: Session, question: str) -> Measured:
    if question == "seen":
        session.needs_thorough()
    spec = _spec(asked.room(session), LOW, WHOLE)
    return asked.above_full(session, spec, question=question)


def _lookup(session: Session) -> Measured:
    flat, two = _run(session, HIGH), _run(session, HIGH, COARSE)
    more = statistics.paired_shares(two.dropped, flat.dropped)
    details = {
        "dropped": {
            "flat": float(flat.dropped.mean()),
            "two": float(two.dropped.mean()),
        }
    }
    return of_interval(more, details=details)


def _lookup_bytes(session: Session) -> Measured:
    context = shapes.LONG
    budget = int((1 - HIGH) * context)
    base = f"squeezed:sparsity={HIGH},budget={budget}"
    totals = [
        shapes.traffic_of_8b(session, spec, context).total
        for spec in (base, f"{base},{COARSE}")
    ]
    return from_shapes(totals[1] / totals[0], details={"bytes": totals})


def _speed(session: Session) -> Measured:
    steps = recorded.entries(session.results, RESULTS, "steps")
    longest = max(steps, key=lambda entry: entry.data["keys"])
    times = statistics.amount_interval(longest.data["times_as_fast_as_full"])
    details = {"keys": longest.data["keys"], "method": longest.data["method"]}
    return of_interval(times, when=longest.when, details=details)


def _answers_claim(question: str, when: str) -> Claim:
    return Claim(
        name=f"squeezed-answers{'-after' if question == 'after' else ''}",
        method="squeezed",
        sentence="With 3.1 times fewer keys and values loaded it answers as full "
        f"attention, the question {when}",
        source=f"{PAPER}, abstract (LongBench)",
        paper="no noticeable loss of accuracy; the figures were not seen",
        value="needles found, above full attention's, 70% of the context unread",
        bar=Within(-0.01, "higher"),
        measure=functools.partial(_answers, question=question),
        note="The paper's questions are of one fixed context: asked after it",
    )


CLAIMS = (
    Claim(
        name="squeezed-reads",
        method="squeezed",
        sentence="A threshold set on the context's last queries leaves 70% of it "
        "unread by later ones: 3.1 times fewer keys and values are loaded",
        source=f"{PAPER}, abstract; the share is the code's",
        paper="3.1 times fewer: .325 of them, of which .025 are centroids",
        value="share of the fixed context read a step, centroids among it",
        bar=Effect(none=1.0, bar=0.325, better="lower"),
        measure=_reads,
        note="The tokens behind the fixed context are not counted, as in the paper",
    ),
    Claim(
        name="squeezed-text",
        method="squeezed",
        sentence="With 3.1 times fewer keys and values loaded it predicts as full "
        "attention",
        source=f"{PAPER}, abstract; the measure is ours",
        paper="no noticeable loss of accuracy; the figures were not seen",
        value="nats a token lost to full attention, 70% of the context unread",
        bar=Within(0.02),
        measure=_text,
    ),
    _answers_claim("after", "asked after the context"),
    _answers_claim("seen", "read as its end"),
    Claim(
        name="squeezed-lookup",
        method="squeezed",
        sentence="Looked up in two levels, what is read is as good",
        source=f"{PAPER}, Table 2, as others quote it",
        paper="57.20 / 51.89 in two levels, 56.95 / 51.57 in one (LCC / RepoBench-P)",
        value="attention mass dropped above one level's, 90% of the context unread",
        bar=Within(0.01),
        measure=_lookup,
        note="A cluster's share is of those below coarse ones that pass, and so larger "
        "than in one level: more of them pass",
    ),
    Claim(
        name="squeezed-lookup-bytes",
        method="squeezed",
        sentence="Looked up in two levels, less is loaded",
        source=f"{PAPER}, Table 2, as others quote it",
        paper=".122 of the cache in two levels, .125 in one: .976",
        value="bytes a step in two levels over those in one, one 8B layer at 128K, "
        "90% unread",
        bar=Effect(none=1.0, bar=0.976, better="lower"),
        measure=_lookup_bytes,
        because={
            "direction only": "a step has room for all centroids that may pass, three "
            "quarters, where 68% of them do in the paper"
        },
    ),
    Claim(
        name="squeezed-speed",
        method="squeezed",
        sentence="It decodes faster than full attention",
        source=f"{PAPER}, abstract",
        paper="more than 4 times (kernels alone, a GPU)",
        value="times as fast as full attention, one layer, the longest recorded, 90% "
        "unread",
        bar=Effect(none=1.0, bar=4.0),
        measure=_speed,
        because={
            "not reproduced": "a step gathers a list of 15% of the tokens, however few "
            "of them pass, and no kernel reads clusters as runs"
        },
    ),
)
