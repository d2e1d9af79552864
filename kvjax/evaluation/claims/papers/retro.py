"""Claims of "Retrospective Sparse Attention for Efficient Long-Context Generation"."""

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
    from_shapes,
    of_interval,
    without_spread,
)
from kvjax.evaluation.claims.measure import asked, shapes, texts
from kvjax.evaluation.claims.session import SOFTMAX, Session
from kvjax.evaluation.statistics import Interval
from kvjax.methods.retro import history
from kvjax.stores import paged

PAPER = "arXiv:2508.09001"
RESULTS = "*-retro.json"
PAGE = 16  # quest's default
SHARE = 0.15  # of the tokens, the paper's
WINDOW, WIDE = 2, 8  # the paper's default, and its widest


def _quest(session: Session) -> str:
    # The paper reads at least 256 tokens; the share is what short contexts allow.
    share = SHARE * 8 / session.sizes.cut
    least = max(int(share * session.sizes.context) // PAGE * PAGE, PAGE)
    return f"quest:budget={least},budget_ratio={share}"


def _retro(session: Session, window: int) -> str:
    return f"retro:window={window}+{_quest(session)}"


def _driven(session: Session, spec: str):
    # What is watched belongs to the run, whichever claim asks for it first.
    watch = num_seen if spec.startswith("retro") else None
    return texts.text(session, SOFTMAX, spec, watch)


def _followed(session: Session, spec: str) -> list[dict[str, Any]]:
    """Each window under a method beside full attention, keys and pages as well."""
    if spec == "full":
        return texts.followed(session, SOFTMAX, spec)
    is_ours = spec.startswith("retro")
    also = functools.partial(_beside, session, is_ours)
    watch = num_seen if is_ours else None
    return texts.followed(session, SOFTMAX, spec, watch=watch, also=also)


def _beside(session: Session, is_ours: bool, full: Any, mine: Any, count: int) -> list:
    """Each window's distance of keys from full attention's, and pages seen by age."""
    errors = _distance(session, mine.states, full.states)[:count]
    ages = [None] * count
    if is_ours:
        ages = [history.exposure(mine.watched[:, :, b]).tolist() for b in range(count)]
    return [
        {"key_error": float(error), "by_age": age}
        for error, age in zip(errors, ages, strict=True)
    ]


def _nats(session: Session, spec: str) -> np.ndarray:
    if session.sizes.batch is None:
        return -_driven(session, spec).log_probs[:, 1:]
    return -np.array([one["log_probs"] for one in _followed(session, spec)])


def _divergence(session: Session) -> Measured:
    theirs, ours = (
        np.array([one["kl"] for one in _followed(session, spec)])
        for spec in (_quest(session), _retro(session, WINDOW))
    )
    details = {"quest": float(theirs.mean()), "window 2": float(ours.mean())}
    return of_interval(statistics.paired_difference(theirs, ours), details=details)


def _right_output(session: Session, task: str, wider: bool = False) -> Measured:
    """The right answer fed, under Quest and window 2, or under windows 2 and 8."""
    specs = _quest(session), _retro(session, WINDOW)
    if wider:
        specs = specs[1], _retro(session, WIDE)
    before, after = (asked.nats(session, SOFTMAX, task, spec) for spec in specs)
    full = float(asked.nats(session, SOFTMAX, task, "full").mean())
    details = dict(zip(specs, (float(before.mean()), float(after.mean())), strict=True))
    interval = statistics.paired_difference(before, after)
    return of_interval(interval, details={"nats": details | {"full": full}})


def _text(session: Session) -> Measured:
    quest, ours, full = (
        _nats(session, spec).mean(1)
        for spec in (_quest(session), _retro(session, WINDOW), "full")
    )
    gain = statistics.paired_difference(quest, ours)
    gap = float((quest - full).mean())
    return of_interval(gain, details={"quest_above_full": gap})


def _keys(session: Session) -> Measured:
    errors = {
        name: key_errors(session, spec)
        for name, spec in {
            "quest": _quest(session),
            "window 2": _retro(session, WINDOW),
        }.items()
    }
    gain = statistics.paired_difference(errors["quest"], errors["window 2"])
    details = {name: float(error.mean()) for name, error in errors.items()}
    return of_interval(gain, details={"relative_error": details})


def _recorded(session: Session, part: str, window: int) -> recorded.Entry:
    return recorded.first(
        recorded.entries(session.results, RESULTS, part),
        f"{part} under retro {window}",
        lambda e: e["method"] == f"retro {window}",
    )


def _recorded_widening(session: Session) -> Measured:
    two, eight = (_recorded(session, "text", window) for window in (WINDOW, WIDE))
    errors = [entry.data["key_error_by_layer"][-1] for entry in (two, eight)]
    details = {"relative_error": dict(zip(("2", "8"), errors, strict=True))}
    below = errors[0] - errors[1]
    return without_spread(below, two.data["windows"], when=two.when, details=details)


def _widening(session: Session) -> Measured:
    if not session.sizes.thorough:
        return _recorded_widening(session)
    two, eight = (
        key_errors(session, _retro(session, window)) for window in (WINDOW, WIDE)
    )
    return of_interval(statistics.paired_difference(two, eight))


def key_errors(session: Session, spec: str) -> np.ndarray:
    """The distance, in each window, of the deepest layer's keys from full attention's.

    Relative L2 distance of the keys of decoded tokens that are revised no more.
    """

    if session.sizes.batch is not None:
        return np.array([one["also"]["key_error"] for one in _followed(session, spec)])
    states = (_driven(session, one).states for one in (spec, "full"))
    return _distance(session, *states)


def _distance(session: Session, mine: Any, full: Any) -> np.ndarray:
    def keys(states: Any) -> np.ndarray:
        state = states[-1]
        store = state.store if hasattr(state, "store") else state
        kept = paged.views(store)[0] if hasattr(store, "pages") else store.k
        first = session.sizes.context
        last = first + session.sizes.text_steps - WIDE
        return np.asarray(kept)[:, :, first:last]

    kept, true = keys(mine), keys(full)
    gap = np.linalg.norm(kept - true, axis=-1) / np.linalg.norm(true, axis=-1)
    return gap.mean((1, 2))


def num_seen(before: tuple, after: tuple) -> jax.Array:
    """`(L, B, H, W)`: pages that each row of the step has seen by now."""
    del before
    counts = [
        history.num_seen(state.window, state.store.length, PAGE) for state in after
    ]
    return jnp.stack(counts)


def _ages(session: Session, spec: str) -> np.ndarray:
    """Pages seen by age over those of the step itself, of each window of text."""
    if session.sizes.batch is not None:
        return np.array([one["also"]["by_age"] for one in _followed(session, spec)])
    # (steps, L, B, H, W): windows of text are the samples.
    counts = _driven(session, spec).watched
    return np.stack([history.exposure(counts[:, :, b]) for b in range(counts.shape[2])])


def _exposure(session: Session) -> Measured:
    window = WIDE if session.sizes.thorough else WINDOW
    by_age = _ages(session, _retro(session, window))
    # A union is never smaller than one of its sets.
    more = statistics.amount_interval(by_age[:, WINDOW - 1] - 1)
    found = Interval(1 + more.mean, 1 + more.low, 1 + more.high, more.n)
    curve = by_age.mean(0).tolist()
    return of_interval(found, details={"by_window": dict(enumerate(curve, 1))})


def _bytes(session: Session) -> Measured:
    quest = f"quest:budget=256,budget_ratio={SHARE}"
    plain, ours = (
        shapes.traffic_of_8b(session, name, 32_768).total
        for name in (quest, f"retro:window={WINDOW}+{quest}")
    )
    return from_shapes(
        ours / plain, details={"bytes": [plain, ours]}, note=_compiled(session)
    )


def _compiled(session: Session) -> str:
    """Says what the compiler counted of a step: more than the cache it reads."""
    try:
        entry = _recorded(session, "bytes", WINDOW)
    except NotMeasuredError:
        return ""
    more, context = entry.data["counted_over_quest"], entry.data["context"]
    return (
        "Of all that XLA's program touches, logits too, the compiler counts "
        f"{more:.2f} times Quest's at {context:,} tokens"
    )


def _answers(session: Session) -> Measured:
    ours = _recorded(session, "chain", WINDOW)
    above = Interval(**ours.data["above_quest"])
    if above.low == above.high:  # every example scored the same
        above = statistics.paired_shares([above.mean] * above.n, [0.0] * above.n)
    details = {"links": ours.data["links"], "tokens": ours.data["new_tokens"]}
    return of_interval(above, when=ours.when, details=details)


def _wider_answers(session: Session) -> Measured:
    """Compares answers to the questions; the runs kept no scores to pair."""
    two, eight = (_recorded(session, "questions", window) for window in (WINDOW, WIDE))
    means = [entry.data["score"]["mean"] for entry in (two, eight)]
    details = {"scores": dict(zip(("2", "8"), means, strict=True))}
    more, n = means[1] - means[0], two.data["n"]
    return without_spread(more, n, when=two.when, details=details)


def _time(session: Session) -> Measured:
    ours = _recorded(session, "time", WINDOW)
    if ours.when.endswith("cores"):
        raise NotMeasuredError(
            "the paper's milliseconds are of a GPU, and none is recorded; on "
            f"{ours.when}, a step of embedded-softmax takes "
            f"{ours.data['over_quest']:.2f} times Quest's, as rows are computed, not "
            "read, there."
        )
    quest = recorded.first(
        recorded.entries(session.results, RESULTS, "time"),
        "a decode step of quest",
        lambda e: e["method"] == "quest",
    )
    more = ours.data["milliseconds_a_token"] - quest.data["milliseconds_a_token"]
    return without_spread(more, ours.data["repeats"], when=ours.when)


def _fed(task: str, *, wider: bool = False) -> dict[str, Any]:
    """The measure on a model that was not trained on a task: it hardly answers it."""
    whose = "window 8's below window 2's" if wider else "below Quest's, window 2"
    return {
        "value": f"nats a token of the right answer, which is fed, {whose}",
        "measure": functools.partial(_right_output, task=task, wider=wider),
        "note": "a model that was not trained on the task hardly answers it, so what "
        "is told is how likely the right answer is",
    }


_NOT_REPAIRED = "what Quest does not find when asked is not repaired afterwards"

CLAIMS = (
    Claim(
        name="retro-text",
        method="retro",
        sentence="It predicts better than Quest over long generation",
        source=f"{PAPER}, perplexity on PG-19",
        paper="closer to full attention than Quest throughout; no figure seen",
        value="nats a token below Quest, window 2",
        bar=Effect(none=0.0, bar=0.0),
        measure=_text,
        because={
            "not reproduced": "keys improve, which hardly shows in what is predicted",
            "direction only": "keys improve, which hardly shows in what is predicted",
        },
    ),
    Claim(
        name="retro-answers",
        method="retro",
        sentence="It answers better than Quest in long generation",
        source=f"{PAPER}, LongGenBench",
        paper="GSM8K 56.5 against 52.6 (Llama-3.1-8B-Instruct)",
        value="share of 20 links before the first mistake above Quest's",
        bar=Effect(none=0.0, bar=0.0),
        measure=_answers,
        because={
            "not reproduced": "the answers are the same, example for example: "
            + _NOT_REPAIRED
        },
        elsewhere=_fed("chain"),
    ),
    Claim(
        name="retro-keys",
        method="retro",
        sentence="Revised tokens leave keys nearer to those of full attention",
        source=f"{PAPER}, abstract (outputs are refined by what arrives later)",
        paper="no figure",
        value="relative error of the deepest layer's keys below Quest's, window 2",
        bar=Effect(none=0.0, bar=0.0),
        measure=_keys,
    ),
    Claim(
        name="retro-window",
        method="retro",
        sentence="A wider window answers better",
        source=f"{PAPER}, sensitivity to the window",
        paper="accuracy rises from window 2 to 4 to 8; flat after 8",
        value="share of 12 questions of a prompt answered, window 8's above window 2's",
        bar=Effect(none=0.0, bar=0.0),
        measure=_wider_answers,
        because={"not reproduced": _NOT_REPAIRED},
        elsewhere=_fed("chain", wider=True),
    ),
    Claim(
        name="retro-keys-window",
        method="retro",
        sentence="A wider window leaves keys nearer to those of full attention",
        source="ours; the paper's measure of a window is accuracy",
        paper="no figure",
        value="relative error of the deepest layer's keys, window 2's above window 8's",
        bar=Effect(none=0.0, bar=0.0),
        measure=_widening,
    ),
    Claim(
        name="retro-exposure",
        method="retro",
        sentence="A token comes to see more pages than its own step read, the more the "
        "wider the window",
        source=f"{PAPER}, effective KV exposure",
        paper="no figure seen",
        value="pages seen after one step more, over those of its own",
        bar=Effect(none=1.0, bar=1.0),
        measure=_exposure,
        note="A union cannot be smaller than its parts: the claim is how much larger",
    ),
    Claim(
        name="retro-bytes",
        method="retro",
        sentence="It reads hardly more than Quest",
        source=f"{PAPER}, memory traffic",
        paper="1.6% to 3.0% more",
        value="bytes a step over Quest's, one 8B layer at 32K, window 2",
        bar=Within(1.03),
        measure=_bytes,
    ),
    Claim(
        name="retro-time",
        method="retro",
        sentence="A token takes less than a millisecond more than under Quest",
        source=f"{PAPER}, latency",
        paper="less than 1 ms at window 2, about 2 ms at 8 (a GPU)",
        value="milliseconds a token above Quest's",
        bar=Within(1.0),
        measure=_time,
    ),
)


def _long_claim(name: str, task: str, what: str) -> Claim:
    return Claim(
        name=name,
        method="retro",
        sentence=f"It answers better than Quest in long generation: {what}",
        source=f"{PAPER}, LongGenBench; the task is LongProc's",
        paper="GSM8K 56.5 against 52.6 (Llama-3.1-8B-Instruct)",
        bar=Effect(none=0.0, bar=0.0),
        **_fed(task),
    )


MORE = (
    _long_claim("retro-countdown", "countdown", "a search, attempt by attempt"),
    _long_claim("retro-route", "path_traversal", "a route from town to town"),
    Claim(
        name="retro-kl",
        method="retro",
        sentence="It predicts more as full attention does than Quest over long "
        "generation",
        source=f"{PAPER}, perplexity on PG-19; the divergence is ours",
        paper="closer to full attention than Quest throughout; no figure seen",
        value="nats of KL divergence from full attention below Quest, window 2",
        bar=Effect(none=0.0, bar=0.0),
        measure=_divergence,
    ),
)
