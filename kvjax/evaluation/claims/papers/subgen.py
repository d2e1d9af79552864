"""Claims of "SubGen: Token Generation in Sublinear Time and Memory"."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
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
from kvjax.evaluation.claims.measure import asked, layers
from kvjax.evaluation.claims.session import SOFTMAX, Session
from kvjax.methods.subgen import bound

PAPER = "arXiv:2402.06082"
RESULTS = "*-subgen.json"
FEW = 16  # centres of keys, and of values


def _budget(session: Session) -> int:
    return session.sizes.context // session.sizes.cut


def _answers(session: Session, method: str, question: str) -> Measured:
    specs = (f"{name}:budget={_budget(session)}" for name in ("subgen", method))
    return asked.above(session, *specs, question=question)


def _memory(session: Session) -> Measured:
    decoder = session.model(SOFTMAX).decoder
    method = session.method(f"subgen:mode=stream,budget={_budget(session)}")
    num_bytes = {
        length: accounting.bytes_held(method, decoder, length, 64)
        for length in (1 << 16, 1 << 20)
    }
    details = {"bytes": num_bytes[1 << 20]}
    return from_shapes(num_bytes[1 << 20] / num_bytes[1 << 16], details=details)


def spreads(spec: Any, given: layers.Inputs) -> list[list[list[float]]]:
    """Radii over spreads of keys and of values, by layer and KV head."""
    found = _spreads(spec, given.k, given.v)
    return [np.asarray(x, np.float64).round(6).tolist() for x in found]


@functools.partial(jax.jit, static_argnums=0)
def _spreads(spec, k, v):
    positions = jnp.arange(k.shape[2], dtype=jnp.int32)
    positions = jnp.broadcast_to(positions, (k.shape[0], k.shape[2]))
    every = jnp.ones(k.shape[:3], bool)
    keys = spec.rope(k.astype(jnp.float32), positions)
    values = v.astype(jnp.float32)
    return [bound.radius_over_spread(x, every, FEW) for x in (keys, values)]


def _clusters(session: Session) -> Measured:
    spec = layers.layer_spec(session, SOFTMAX, 1)
    make = functools.partial(spreads, spec)
    found = layers.each_window(session, SOFTMAX, ("spreads", SOFTMAX, FEW), make)
    keys, values = np.array(found).swapaxes(0, 1)  # (W, L, H) each
    details = {
        "share of heads": float((keys < values).mean()),
        "keys": keys.mean((0, 2)).tolist(),
        "values": values.mean((0, 2)).tolist(),
    }
    pair = (x.mean((1, 2)) for x in (values, keys))
    return of_interval(statistics.paired_difference(*pair), details=details)


def _bound(session: Session) -> Measured:
    name = SOFTMAX
    if session.models is not None:
        session.model(SOFTMAX)
        name = session.models[SOFTMAX]
    for document, when in recorded.documents(session.results, RESULTS):
        for entry in document["entries"]:
            if entry["model"] == name:
                details = {
                    key: entry[key] for key in ("nats", "least_nats", "log_n", "folded")
                }
                share = entry["exponent_below_log_n"]
                note = (
                    f"The exponent is at least {2 * entry['least_nats']:.1f} nats, and "
                    f"log n {entry['log_n']:.1f}"
                )
                return without_spread(share, 1, when=when, details=details, note=note)
    raise NotMeasuredError(
        f"no recorded run has it: `python benchmarks/subgen.py --model {name} --json "
        "FILE` measures it."
    )


def _answers_claim(method: str, title: str, question: str = "seen") -> Claim:
    asked_after = question == "after"
    return Claim(
        name=f"subgen-{method.partition('_')[0]}{'-after' if asked_after else ''}",
        method="subgen",
        sentence=f"With an equal cache it finds more lines than {title}"
        + (", asked after the context" if asked_after else ""),
        source=f"{PAPER}, line retrieval, as a review quotes it",
        paper=".44 against about .34 at 9K tokens",
        value=f"needles found, above {title}'s, equal budgets",
        bar=Effect(none=0.0, bar=0.0),
        measure=functools.partial(_answers, method=method, question=question),
    )


CLAIMS = (
    _answers_claim("h2o", "H2O"),
    _answers_claim("streaming_llm", "StreamingLLM"),
    Claim(
        name="subgen-memory",
        method="subgen",
        sentence="What it holds grows less than the context: of a stream, not at all",
        source=f"{PAPER}, abstract",
        paper="sublinear",
        value="bytes held at 1M tokens over those at 64K, mode=stream",
        bar=Within(1.0),
        measure=_memory,
    ),
    Claim(
        name="subgen-clusters",
        method="subgen",
        sentence="Keys cluster more than values do",
        source=f"{PAPER}, section on clusterability, as others quote it",
        paper="keys more than values; a figure",
        value="radius of 16 greedy centres over the spread, values' above keys'",
        bar=Effect(none=0.0, bar=0.0),
        measure=_clusters,
        because={
            "not reproduced": "keys do in the lower two of four layers, and in the "
            "upper two they lie further apart than values"
        },
    ),
    Claim(
        name="subgen-bound",
        method="subgen",
        sentence="Its bound on the error holds with less memory than the context",
        source=f"{PAPER}, theorem, as others quote it",
        paper="if delta r = o(log n); delta was not measured",
        value="share of layers, heads and queries whose e^(2 delta r) is below n",
        bar=Effect(none=0.0, bar=1.0),
        measure=_bound,
        because={
            "not reproduced": "the bound is of the widest cluster, and one is wide"
        },
    ),
)

MORE = (
    _answers_claim("h2o", "H2O", "after"),
    _answers_claim("streaming_llm", "StreamingLLM", "after"),
)
