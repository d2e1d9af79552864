"""Held-out text and answers under a method: what several papers' claims look at."""

from typing import Any

import numpy as np
from jaxtyping import Float

from kvjax.evaluation.claims.measure.steps import Driven, Shape, Watch, drive
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
    return needles.windows(
        session.model(model).tokenizer,
        session.text,
        context=sizes.context + sizes.text_steps,
        n=sizes.windows,
        seed=SEED,
    )


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
    return text(session, model, method).log_probs[:, 1:]


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
