"""Held-out text and answers under a method: what several papers' claims look at."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from kvjax.decoding import finite
from kvjax.decoding.feeding import Fed, drop_programs, feed
from kvjax.evaluation import fidelity, together
from kvjax.evaluation.claims.measure.asked import CHUNK, asked_scores
from kvjax.evaluation.claims.measure.steps import Driven, Shape, Watch, drive, filled
from kvjax.evaluation.claims.session import SEED, Session
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
        read = together.read(
            given,
            methods,
            [row[: sizes.context] for row in rows],
            max_new_tokens=sizes.text_steps,
            chunk_size=CHUNK,
        )
        fed = []
        for place, one in enumerate(methods):
            watched = watch if one is parsed else None
            begun = read.take(place)
            fed.append(
                feed(given, one, begun, ahead, watch=watched, return_logits=True)
            )
            finite.check_rows(given.decoder, fed[-1].log_probs)
        read.drop()
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
