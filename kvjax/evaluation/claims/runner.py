"""Measures claims one after another; what is done is written before the next begins."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from kvjax.evaluation.claims.claim import (
    Claim,
    NotMeasuredError,
    Row,
    judge,
    not_measured,
)
from kvjax.evaluation.claims.measure.steps import optimised
from kvjax.evaluation.claims.session import Session

Finished = Callable[[Sequence[Row]], Any]


def run(
    claims: Sequence[Claim],
    session: Session,
    *,
    quick: bool = False,
    started: Callable[[Claim], Any] = lambda claim: None,
    finished: Finished = lambda rows: None,
) -> list[Row]:
    """Judges every claim.

    Args:
        claims: in the order of the table.
        session: what they share.
        quick: compiles with few optimisations, except what is timed.
        started: called before a claim is measured.
        finished: called with all rows so far after each; a fault in a later claim is
            raised once they have been given to it.
    """
    rows: list[Row] = []
    for claim in claims:
        started(claim)
        wall, processor = time.perf_counter(), time.process_time()
        try:
            with optimised(not quick):
                measured = claim.measure(session)
        except NotMeasuredError as error:
            rows.append(not_measured(claim, str(error)))
        else:
            seconds = time.perf_counter() - wall, time.process_time() - processor
            rows.append(judge(claim, measured, *seconds))
        finished(tuple(rows))
    return rows
