"""Measures claims one after another; what is done is written before the next begins."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvjax.evaluation.claims.claim import (
    Claim,
    NotMeasuredError,
    Row,
    judge,
    not_measured,
)
from kvjax.evaluation.claims.measure.steps import optimised
from kvjax.evaluation.claims.samples import DamagedError
from kvjax.evaluation.claims.session import Session

Finished = Callable[[Sequence[Row]], Any]


def run(
    claims: Sequence[Claim],
    session: Session,
    *,
    quick: bool = False,
    earlier: Mapping[str, Row] | None = None,
    is_tolerant: bool = False,
    started: Callable[[Claim], Any] = lambda claim: None,
    finished: Finished = lambda rows: None,
) -> list[Row]:
    """Judges every claim.

    Args:
        claims: in the order of the table.
        session: what they share.
        quick: compiles with few optimisations, except what is timed.
        earlier: rows by claim that another run has measured: they stand.
        is_tolerant: a claim whose inputs do not suit the model is not measured, with
            the error as its reason, and the others are.
        started: called before a claim is measured.
        finished: called with all rows so far after each; a fault in a later claim is
            raised once they have been given to it.
    """
    rows: list[Row] = []
    for claim in claims:
        if claim.name in (earlier or {}):
            rows.append((earlier or {})[claim.name])
            finished(tuple(rows))
            continue
        started(claim)
        reused = session.samples.reused
        wall, processor = time.perf_counter(), time.process_time()
        try:
            with optimised(not quick):
                measured = claim.measure(session)
        except NotMeasuredError as error:
            rows.append(not_measured(claim, str(error)))
        except DamagedError:
            raise
        except ValueError as error:
            if not is_tolerant:
                raise
            rows.append(not_measured(claim, f"not measurable on this model: {error}"))
        else:
            seconds = time.perf_counter() - wall, time.process_time() - processor
            # What an earlier run has measured is among them.
            before = zip(session.samples.reused, reused, strict=True)
            spent = zip(seconds, before, strict=True)
            rows.append(judge(claim, measured, *(x + b - a for x, (b, a) in spent)))
        finished(tuple(rows))
    return rows
