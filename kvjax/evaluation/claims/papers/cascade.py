"""Claims of "Training-Free Exponential Context Extension via Cascading KV Cache"."""

import functools

import numpy as np

from kvjax import accounting
from kvjax.evaluation import statistics
from kvjax.evaluation.claims.claim import (
    Claim,
    Effect,
    Measured,
    Within,
    from_shapes,
    of_interval,
)
from kvjax.evaluation.claims.measure import asked, clock, steps, texts
from kvjax.evaluation.claims.session import SEED, SOFTMAX, Session
from kvjax.evaluation.tasks import haystack, needles
from kvjax.text.stream import continuation

PAPER = "arXiv:2406.17808"
# The key sits in the middle of a fifth of the prompt, as in the official passkey job.
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def _cascade(session: Session) -> str:
    sizes = session.sizes
    return f"cascade:budget={sizes.cache},stride={sizes.cascade_stride}"


def _streaming(session: Session) -> str:
    """StreamingLLM as the paper runs it: one ring, read in the same strides."""
    return f"{_cascade(session)},num_cascades=1"


def _perplexity(session: Session) -> Measured:
    session.needs_thorough()
    nats = functools.partial(texts.nats_while_read, session)
    theirs, ours = nats(_streaming(session)), nats(_cascade(session))
    # What else is meant by StreamingLLM: read token by token. With a cache alone, and
    # with as many tokens as one in a stride sees in the mean.
    cache = session.sizes.cache
    beside = {
        f"streaming_llm:budget={size}": float(
            (nats(f"streaming_llm:budget={size}") - ours).mean()
        )
        for size in (cache, cache + session.sizes.cascade_stride // 2)
    }
    told = [
        f"{spec} is {abs(above):.3f} nats {'above' if above > 0 else 'below'} it"
        for spec, above in beside.items()
    ]
    return of_interval(
        statistics.paired_difference(theirs, ours),
        details={"perplexity": float(np.exp(ours.mean())), "nats_above": beside},
        note=f"Token by token, {', '.join(told)}: a token in a stride sees half a "
        "stride more than a cache, in the mean",
    )


def _recalled(session: Session, spec: str, doublings: int) -> np.ndarray:
    """Share of each key's digits that greedy decoding says before its first mistake."""
    sizes, model = session.sizes, session.model(SOFTMAX)

    def examples() -> list[needles.Example]:
        return needles.passkey(
            model.tokenizer,
            session.text,
            context=sizes.cache << doublings,
            n=sizes.keys,
            seed=SEED,
            depths=DEPTHS,
        )

    def make(start: int, end: int) -> list[float]:
        made = session.remember(("cascade keys", doublings), examples)[start:end]
        whole = [haystack.whole(model.tokenizer, example) for example in made]
        likeliest, shape = [], texts.reading_shape(session)
        for first in range(0, len(made), shape.batch):
            rows = steps.filled(whole[first : first + shape.batch], shape.batch)
            read = steps.read(model, session.method(spec), shape, rows, scored=True)
            likeliest += list(np.asarray(read.likeliest))
        decode = model.tokenizer.decode
        shares = []
        for example, row, right in zip(made, whole, likeliest, strict=False):
            asked = len(example.prompt)
            count = int(right[asked - 1 : len(row) - 1].cumprod().sum())
            recalled = continuation(decode, example.prompt, row[asked : asked + count])
            shares.append(len(recalled.strip()) / len(example.answer.strip()))
        return shares

    key = "recalled", spec, doublings, sizes.cache, sizes.cascade_context
    return np.array(session.sampled(key, sizes.keys, make))


def _recall(session: Session, doublings: int) -> Measured:
    session.needs_thorough()
    ours, theirs = (
        _recalled(session, spec, doublings)
        for spec in (_cascade(session), _streaming(session))
    )
    details = {"cascade": float(ours.mean()), "streaming_llm": float(theirs.mean())}
    gain = statistics.paired_shares(ours, theirs)
    return of_interval(
        gain, details=details | {"context": session.sizes.cache << doublings}
    )


def _retrieval(session: Session, question: str) -> Measured:
    ours, theirs = (
        asked.retrieved(session, SOFTMAX, spec, question=question)
        for spec in (_cascade_of(session), _streaming_of(session))
    )
    details = {"cascade": float(ours.mean()), "streaming_llm": float(theirs.mean())}
    return of_interval(statistics.paired_shares(ours, theirs), details=details)


def _cascade_of(session: Session) -> str:
    """A cascade with a cache as large as other methods'."""
    sizes = session.sizes
    cache = sizes.cascade_context // sizes.cut
    return f"cascade:budget={cache},stride={cache}"


def _streaming_of(session: Session) -> str:
    return f"{_cascade_of(session)},num_cascades=1"


def _memory(session: Session) -> Measured:
    decoder = session.model(SOFTMAX).decoder
    method = session.method(_cascade(session))
    num_bytes = {
        length: accounting.bytes_held(method, decoder, length, 64)
        for length in (1 << 16, 1 << 20)
    }
    return from_shapes(
        num_bytes[1 << 20] / num_bytes[1 << 16], details={"bytes": num_bytes[1 << 20]}
    )


def _seconds(session: Session, *runs: tuple[str, int]) -> list[np.ndarray]:
    chunk = 4 * session.sizes.cascade_stride
    return clock.seconds_a_token(session, *runs, chunk=chunk)


def _linear(session: Session) -> Measured:
    short, long = session.sizes.clocked
    ours = _cascade(session)
    one, more = _seconds(session, (ours, short), (ours, long))
    details = {
        "tokens": [short, long],
        "microseconds_a_token": [1e6 * float(one.mean()), 1e6 * float(more.mean())],
    }
    return of_interval(statistics.amount_interval(more / one), details=details)


def _prefill(session: Session) -> Measured:
    length = session.sizes.clocked[-1]
    ours, full = _seconds(session, (_cascade(session), length), ("full", length))
    return of_interval(
        statistics.amount_interval(full / ours), details={"tokens": length}
    )


def _recall_claim(doublings: int, paper: str, bar: float) -> Claim:
    why = (
        "read in strides, one ring reaches as far back in so short a context"
        if doublings == 1
        else "a key's two tokens are neighbours, and of an aligned block of 2^i tokens "
        "ring i keeps one"
    )
    times = "once" if doublings == 1 else f"{doublings} times"
    return Claim(
        name=f"cascade-recall-{doublings}",
        method="cascade",
        sentence="It finds a pass key better than StreamingLLM where the context is "
        f"its cache, doubled {times}",
        source=f"{PAPER}, abstract and the pass-key figure",
        paper=paper,
        value="share of the digits before the first mistake above StreamingLLM's, "
        "equal caches and strides",
        bar=Effect(none=0.0, bar=bar),
        measure=functools.partial(_recall, doublings=doublings),
        because={"not reproduced": why, "direction only": why},
    )


_NEWEST = "what predicts here are the newest tokens, of which one ring holds more"
CLAIMS = (
    Claim(
        name="cascade-perplexity",
        method="cascade",
        sentence="It predicts text better than StreamingLLM with a cache of equal size",
        source=f"{PAPER}, v1 abstract (PG-19)",
        paper="perplexity 1.2% lower: 0.012 nats",
        value="nats a token below StreamingLLM, equal caches and strides",
        bar=Effect(none=0.0, bar=0.012),
        measure=_perplexity,
        because={"not reproduced": _NEWEST, "direction only": _NEWEST},
        note="StreamingLLM is one ring read in strides, as in the official code",
    ),
    _recall_claim(1, "better; the figure was not seen", 0.0),
    _recall_claim(2, "better; the figure was not seen", 0.0),
    _recall_claim(4, "24 points more at 1M tokens, 65K slots", 0.24),
    Claim(
        name="cascade-memory",
        method="cascade",
        sentence="It holds no more the longer the context",
        source=f"{PAPER}, abstract",
        paper="a fixed cache",
        value="bytes held at 1M tokens over those at 64K",
        bar=Within(1.0),
        measure=_memory,
    ),
    Claim(
        name="cascade-linear",
        method="cascade",
        sentence="Its prompt takes time linear in the length",
        source=f"{PAPER}, latency figure",
        paper="linear",
        value="time of a token in a prompt four times as long, over the short one's",
        bar=Within(1.2),
        measure=_linear,
    ),
    Claim(
        name="cascade-prefill",
        method="cascade",
        sentence="It reads a long prompt faster than full attention",
        source=f"{PAPER}, abstract",
        paper="6.8 times at 1M tokens (a GPU)",
        value="times as fast as full attention, one layer, by processor time on a CPU",
        bar=Effect(none=1.0, bar=6.8),
        measure=_prefill,
        because={
            "direction only": "the ratio grows with the length, and these are the "
            "longest prompts that full attention reads here in the time of this command"
        },
        note="The ratio grows with the length over the cache, here 128: 16K tokens, or "
        "8K with --quick",
        elsewhere={
            "note": "The ratio grows with the length over the cache: 16K tokens, or 8K "
            "with --quick"
        },
    ),
)


def _retrieval_claim(question: str, when: str) -> Claim:
    return Claim(
        name=f"cascade-ruler{'-after' if question == 'after' else ''}",
        method="cascade",
        sentence=f"It retrieves better than StreamingLLM, the question {when}",
        source=f"{PAPER}, v1 abstract (LongBench); the task is ours",
        paper="LongBench 5.6% higher",
        value="RULER's score above StreamingLLM's, equal caches and strides",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(_retrieval, question=question),
    )


# What models that were trained for less do not answer.
MORE = (
    _retrieval_claim("seen", "read with the context"),
    _retrieval_claim("after", "asked after it"),
)
