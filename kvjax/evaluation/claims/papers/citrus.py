"""Claims of "CItruS: Chunked Instruction-aware State Eviction for Long Sequences"."""

import functools

from kvjax import accounting
from kvjax.evaluation.claims.claim import (
    Claim,
    Effect,
    Measured,
    Within,
    from_shapes,
)
from kvjax.evaluation.claims.measure import asked, texts
from kvjax.evaluation.claims.session import SOFTMAX, Session

PAPER = "arXiv:2406.12018"
SHARED, INDIVIDUAL, CHUNK = "shared", "individual", "chunk"


def _spec(session: Session, variant: str = SHARED) -> str:
    return f"citrus:budget={_budget(session)},variant={variant}"


def _budget(session: Session) -> int:
    return session.sizes.context // session.sizes.cut


def _variants(session: Session, ours: str, theirs: str) -> Measured:
    if theirs == INDIVIDUAL:
        session.needs_thorough()
    specs = (_spec(session, variant) for variant in (ours, theirs))
    return asked.above(session, *specs, question="seen")


def _answers(session: Session, theirs: str, question: str) -> Measured:
    other = f"{theirs}:budget={_budget(session)}"
    return asked.above(session, _spec(session), other, question=question)


def _text(session: Session) -> Measured:
    """Reads as nobody's instruction says: by chunks, beside a ring read in chunks."""
    session.needs_thorough()
    cache = session.sizes.cache
    stride = cache // 4
    ours = f"citrus:budget={cache},stride={stride},variant={CHUNK}"
    ring = f"cascade:budget={cache},stride={stride},num_cascades=1"
    return texts.nats_above_while_read(session, ours, ring)


def _memory(session: Session) -> Measured:
    decoder, method = session.model(SOFTMAX).decoder, session.method(_spec(session))
    num_bytes = {
        length: accounting.bytes_of_prompt(method, decoder, length, 64)
        for length in (1 << 16, 1 << 20)
    }
    details = {"bytes": num_bytes[1 << 20]}
    return from_shapes(num_bytes[1 << 20] / num_bytes[1 << 16], details=details)


def _answers_claim(method: str, title: str, question: str, when: str) -> Claim:
    after = "-after" if question == "after" else ""
    return Claim(
        name=f"citrus-{method.partition('_')[0]}{after}",
        method="citrus",
        sentence=f"With an equal cache it answers more than {title}, the question "
        f"{when}",
        source=f"{PAPER}, abstract (long documents, retrieval)",
        paper="more than other evictions; the figures were not seen",
        value=f"needles found, above {title}'s, equal budgets",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(_answers, theirs=method, question=question),
        note="Asked after the context, nobody knows the instruction while it is read"
        if after
        else "",
    )


CLAIMS = (
    Claim(
        name="citrus-instruction",
        method="citrus",
        sentence="Evicted by what the instruction looks at, a cache answers more than "
        "by what the text itself looks at",
        source=f"{PAPER}, abstract",
        paper="more: the text alone neglects what is asked; the figures were not seen",
        value="needles found, shared cache above eviction by chunks, equal budgets",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(_variants, ours=SHARED, theirs=CHUNK),
    ),
    _answers_claim("streaming_llm", "StreamingLLM", "seen", "known while it reads"),
    _answers_claim("h2o", "H2O", "seen", "known while it reads"),
    _answers_claim("streaming_llm", "StreamingLLM", "after", "asked after the context"),
    Claim(
        name="citrus-shared",
        method="citrus",
        sentence="One cache answers as well as two, at half the memory",
        source=f"{PAPER}, the shared cache, as a note quotes it",
        paper="about as good; the figures were not seen",
        value="needles found, one cache above two",
        bar=Within(-0.05, "higher"),
        measure=functools.partial(_variants, ours=SHARED, theirs=INDIVIDUAL),
    ),
    Claim(
        name="citrus-text",
        method="citrus",
        sentence="What it evicts by chunks preserves language modelling",
        source=f"{PAPER}, abstract",
        paper="perplexity is preserved; the figures were not seen",
        value="nats a token lost to StreamingLLM, equal caches and strides",
        bar=Within(0.02),
        measure=_text,
        note="Beside StreamingLLM as one ring that is read in strides; of the variants "
        "two read as this one does, and `shared` without an instruction, too",
    ),
    Claim(
        name="citrus-memory",
        method="citrus",
        sentence="It reads a text of any length in the same memory",
        source=f"{PAPER}, abstract (a million tokens)",
        paper="a fixed cache",
        value="bytes held while 1M tokens are read over those of 64K",
        bar=Within(1.0),
        measure=_memory,
    ),
)
