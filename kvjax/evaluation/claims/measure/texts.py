"""Held-out text and answers under a method: what several papers' claims look at."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from kvjax.decoding import finite
from kvjax.decoding.feeding import Fed, drop_programs, feed
from kvjax.evaluation import fidelity, statistics, together
from kvjax.evaluation.claims.claim import Measured, of_interval
from kvjax.evaluation.claims.measure.asked import CHUNK, asked_scores
from kvjax.evaluation.claims.measure.steps import (
    Driven,
    Shape,
    Watch,
    drive,
    filled,
    read,
)
from kvjax.evaluation.claims.session import SEED, SOFTMAX, Session
from kvjax.evaluation.tasks import needles
from kvjax.evaluation.tasks.chain import chain_of_key
from kvjax.evaluation.tasks.extraction import extraction
from kvjax.text.stream import continuation


def shape(session: Session) -> Shape:
    """The shape of every batch: a prompt that fills the context, then the steps."""
    sizes = session.sizes
    return Shape(sizes.windows, sizes.context, sizes.text_steps, sizes.context // 2)


def windows(session: Session, model: str) -> list[list[int]]:
    """Text of a context and as many tokens more as are predicted."""
    sizes = session.sizes

    def cut() -> list[list[int]]:
        return needles.windows(
            session.model(model).tokenizer,
            session.text,
            context=sizes.context + sizes.text_steps,
            n=sizes.windows,
            seed=SEED,
        )

    return session.remember(("windows", model), cut)


def text(
    session: Session, model: str, method: str, watch: Watch | None = None
) -> Driven:
    """The windows' last tokens, fed one by one."""

    def run() -> Driven:
        asked = session.sizes.context
        rows = windows(session, model)
        return drive(
            session.model(model),
            session.method(method),
            shape(session),
            [row[:asked] for row in rows],
            [row[asked:] for row in rows],
            session.sizes.text_steps,
            watch=watch,
        )

    return session.remember(("text", model, method), run)


def log_probs(session: Session, model: str, method: str) -> Float[np.ndarray, "W T"]:
    """Log-probabilities by decode steps; the first token is the prompt's: left out."""
    if session.sizes.batch is None:
        return text(session, model, method).log_probs[:, 1:]
    return np.array([one["log_probs"] for one in followed(session, model, method)])


def divergence(session: Session, model: str, method: str) -> Float[np.ndarray, "W"]:
    """KL divergence of predictions from full attention's, mean over a window, nats."""
    return np.array([one["kl"] for one in followed(session, model, method)])


def nats_above(session: Session, ours: str, theirs: str = "full") -> Measured:
    """Nats a token that a method loses to another, fed the windows' last tokens."""
    found = {
        spec: -log_probs(session, SOFTMAX, spec).mean(1) for spec in (ours, theirs)
    }
    details = {spec: float(nats.mean()) for spec, nats in found.items()}
    interval = statistics.paired_difference(found[ours], found[theirs])
    return of_interval(interval, details={"nats": details})


def nats_above_while_read(
    session: Session, ours: str, theirs: str = "full"
) -> Measured:
    """Nats a token that a method loses to another, of text that is read."""
    found = {spec: nats_while_read(session, spec) for spec in (ours, theirs)}
    details = {spec: float(nats.mean()) for spec, nats in found.items()}
    interval = statistics.paired_difference(found[ours], found[theirs])
    return of_interval(interval, details={"nats": details})


# What else is kept of a batch of windows, a value each: full attention's steps (None
# under full attention itself), those of the method, and the number of windows.
Also = Callable[[Fed | None, Fed, int], Sequence[Any]]


def followed(
    session: Session,
    model: str,
    method: str,
    *,
    watch: Watch | None = None,
    also: Also | None = None,
) -> list[dict[str, Any]]:
    """Each window's last tokens fed one by one, beside full attention.

    `log_probs` are of the tokens but the first, `kl` is the KL divergence from full
    attention's predictions, mean over them, `also` what `also` gives.
    """
    sizes, given = session.sizes, session.model(model)
    full, parsed = session.method("full"), session.method(method)
    methods = [parsed] if parsed is full else [full, parsed]

    def make(first: int, last: int) -> list[dict[str, Any]]:
        rows = filled(windows(session, model)[first:last], sizes.batch or 1)
        ahead = np.array([row[sizes.context :] for row in rows], np.int32)
        both = together.read(
            given,
            methods,
            [row[: sizes.context] for row in rows],
            max_new_tokens=sizes.text_steps,
            chunk_size=CHUNK,
        )
        fed = []
        for place, one in enumerate(methods):
            watched = watch if one is parsed else None
            begun = both.take(place)
            fed.append(
                feed(given, one, begun, ahead, watch=watched, return_logits=True)
            )
            finite.check_rows(given.decoder, fed[-1].log_probs)
        both.drop()
        return _beside(fed, last - first, also)

    key = "text", model, method, sizes.context, sizes.text_steps
    found = session.sampled(key, sizes.windows, make)
    drop_programs(watch)
    return found


def _beside(fed: Sequence[Fed], count: int, also: Also | None) -> list[dict[str, Any]]:
    mine, full = fed[-1], fed[0] if len(fed) > 1 else None
    found = [{"log_probs": row[1:].tolist()} for row in mine.log_probs[:count]]
    if full is not None:
        logits = [np.asarray(one.logits)[:count, 1:] for one in (full, mine)]
        kl = fidelity.agreement(*logits).kl.mean(1)
        found = [one | {"kl": float(x)} for one, x in zip(found, kl, strict=True)]
    if also is not None:
        more = also(full, mine, count)
        found = [one | {"also": x} for one, x in zip(found, more, strict=True)]
    return found


def reading_shape(session: Session) -> Shape:
    """The shape of batches that are scored while they are read, stride by stride."""
    sizes = session.sizes
    batch = sizes.batch or sizes.cascade_windows
    return Shape(batch, sizes.cascade_context, 1, sizes.cascade_stride)


def nats_while_read(session: Session, spec: str) -> Float[np.ndarray, "W"]:
    """Nats a token of each window that is read, of the tokens behind two caches."""
    sizes, model = session.sizes, session.model(SOFTMAX)

    def cut() -> list[list[int]]:
        return needles.windows(
            model.tokenizer,
            session.text,
            context=sizes.cascade_context,
            n=sizes.cascade_windows,
            seed=SEED,
        )

    def make(first: int, last: int) -> list[float]:
        windows, shape = (
            session.remember("cascade windows", cut),
            reading_shape(session),
        )
        found = read(
            model,
            session.method(spec),
            shape,
            filled(windows[first:last], shape.batch),
            scored=True,
        )
        nats = -np.asarray(found.log_probs)[: last - first, 2 * sizes.cache :]
        return nats.mean(1, dtype=np.float64).tolist()

    key = "cascade text", spec, sizes.cascade_context, sizes.cascade_stride
    return np.array(session.sampled(key, sizes.cascade_windows, make))


def examples(session: Session, model: str, task: str) -> list:
    """Prompts of a task, seeded."""
    sizes, tokenizer = session.sizes, session.model(model).tokenizer
    options: dict[str, Any] = {
        "context": sizes.context,
        "n": sizes.examples,
        "seed": SEED,
    }
    if task == "chain":
        return chain_of_key(tokenizer, session.text, **options)
    if task == "extraction":
        return extraction(tokenizer, session.text, rows=sizes.rows, **options)
    return needles.passkey(tokenizer, session.text, **options)


def scores(session: Session, model: str, task: str, method: str) -> np.ndarray:
    """Scores of the answers of greedy decoding, one an example."""
    if session.sizes.batch is not None:
        return asked_scores(session, model, task, method)

    def run() -> np.ndarray:
        made = examples(session, model, task)
        given = session.model(model)
        steps = max(example.answer_tokens for example in made)
        prompts = [example.prompt for example in made]
        found = drive(
            given, session.method(method), shape(session), prompts, None, steps
        )
        said = (
            continuation(given.tokenizer.decode, prompt, tokens.tolist())
            for prompt, tokens in zip(prompts, found.tokens, strict=True)
        )
        return np.array([x.score(answer) for x, answer in zip(made, said, strict=True)])

    return session.remember(("scores", model, task, method), run)
