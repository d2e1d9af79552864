"""Claims of HiP, hierarchically pruned attention: answers, and work below quadratic."""

import functools

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
from kvjax.evaluation.claims.measure import asked, clock, texts
from kvjax.evaluation.claims.session import SOFTMAX, Session

PAPER = "arXiv:2406.09827"
RESULTS = "*-hip.json"
STRIDE = 8  # steps that share a list, the paper's
DENSE, OF = 3, 32  # layers that stay dense, the paper's
PAGE = 4  # the paper's is 2
# Of a prompt that is timed: tokens of a list, of which a search finds 160.
BUDGET = 256
TIMED = 32_768  # tokens of a step that is timed, the paper's


def _spec(session: Session, stride: int = STRIDE) -> str:
    """The paper's spelling: lists of query heads, first layers dense, lists kept."""
    budget = max(session.sizes.context // session.sizes.cut // PAGE, 3) * PAGE
    spec = f"hip:budget={budget},page_size={PAGE},per=query"
    if stride > 1:
        spec = f"refresh:stride={stride}+{spec}"
    dense = session.model(SOFTMAX).decoder.num_layers * DENSE // OF
    return f"dense_layers:first={dense}+{spec}" if dense else spec


def _text(session: Session) -> Measured:
    session.needs_thorough()
    return texts.nats_above(session, _spec(session))


def _answers(session: Session) -> Measured:
    return asked.above_full(session, _spec(session), question="seen")


def _streaming(session: Session, question: str) -> Measured:
    budget = session.sizes.context // session.sizes.cut
    theirs = f"streaming_llm:budget={budget}"
    return asked.above(session, _spec(session), theirs, question=question)


def _kept_lists(session: Session) -> Measured:
    session.needs_thorough()
    return texts.nats_above(session, _spec(session), _spec(session, stride=1))


def _prompt(session: Session) -> Measured:
    short, long = session.sizes.clocked
    spec = f"hip:budget={BUDGET},prefill=sparse"
    one, more = clock.seconds_a_token(session, (spec, short), (spec, long))
    details = {
        "tokens": [short, long],
        "microseconds_a_token": [1e6 * float(one.mean()), 1e6 * float(more.mean())],
    }
    return of_interval(statistics.amount_interval(more / one), details=details)


def _speed(session: Session) -> Measured:
    entries = recorded.entries(session.results, RESULTS, "decode")
    found: dict[int, dict[str, float]] = {}
    for entry in entries:
        by_method = found.setdefault(entry.data["length"], {})
        by_method[entry.data["method"]] = entry.data["microseconds"]
    times = {
        length: microseconds["full"] / microseconds["hip"]
        for length, microseconds in sorted(found.items())
        if {"full", "hip"} <= set(microseconds)
    }
    if TIMED not in times:
        raise NotMeasuredError(
            f"the recorded runs lack a step of hip beside full's at {TIMED:,} tokens."
        )
    details = {"times_as_fast_by_length": times}
    return without_spread(times[TIMED], 1, when=entries[0].when, details=details)


_DENSE = "No layer of the four is dense, where in the paper 3 of 32 are"

CLAIMS = (
    Claim(
        name="hip-text",
        method="hip",
        sentence="At a fixed budget it predicts nearly as full attention",
        source=f"{PAPER}, PG19",
        paper="perplexity 8.650 against 8.115: 0.064 nats (Llama-3.1-8B)",
        value="nats a token lost to full attention, 1/8 of the tokens",
        bar=Within(0.064),
        measure=_text,
        because={
            "not reproduced": "more than half of it is lost by lists that are kept "
            "for 8 steps (`hip-refresh`)"
        },
        note=_DENSE,
        elsewhere={"note": ""},
    ),
    Claim(
        name="hip-answers",
        method="hip",
        sentence="At a fixed budget it answers nearly as full attention",
        source=f"{PAPER}, abstract of its results (LongBench)",
        paper="96% of full attention's score (Llama-3.1-8B-Instruct, LongBench)",
        value="needles found, above full attention's, 1/8 of the tokens",
        bar=Within(-0.04, "higher"),
        measure=_answers,
        note=_DENSE,
        elsewhere={"note": ""},
    ),
    Claim(
        name="hip-streaming",
        method="hip",
        sentence="It answers more than StreamingLLM with an equal budget",
        source=f"{PAPER}, LongBench",
        paper="more; the table was not seen",
        value="needles found, above StreamingLLM's, equal budgets",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(_streaming, question="seen"),
    ),
    Claim(
        name="hip-refresh",
        method="hip",
        sentence="A list that is kept for 8 steps serves nearly as well as a new one",
        source=f"{PAPER}, mask refresh on BookSum",
        paper="0.52 points of ROUGE-1 lost, 1.7 times as fast",
        value="nats a token lost by lists that are kept for 8 steps",
        bar=Within(0.02),
        measure=_kept_lists,
    ),
    Claim(
        name="hip-prompt",
        method="hip",
        sentence="Its prompt takes time below quadratic, of n log n",
        source=f"{PAPER}, abstract",
        paper="O(n log n); of a search for 160 tokens 1.43 times, full attention 4",
        value="time of a token in a prompt four times as long, over the short one's",
        bar=Effect(none=4.0, bar=1.43, better="lower"),
        measure=_prompt,
    ),
    Claim(
        name="hip-speed",
        method="hip",
        sentence="A step's attention is faster than full attention's",
        source=f"{PAPER}, introduction",
        paper="16.5 times at 32K (a GPU)",
        value="times as fast as full attention at 32K, one small layer",
        bar=Effect(none=1.0, bar=16.5),
        measure=_speed,
    ),
)

# Where an answer is asked for after the context, steps alone look for it.
MORE = (
    Claim(
        name="hip-streaming-after",
        method="hip",
        sentence="Asked after the context was read it answers more than StreamingLLM "
        "with an equal budget",
        source=f"{PAPER}, LongBench; the order is ours",
        paper="more; the table was not seen",
        value="needles found, above StreamingLLM's, equal budgets",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(_streaming, question="after"),
    ),
)
