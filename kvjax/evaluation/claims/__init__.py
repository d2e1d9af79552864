"""The papers' claims, one entry each: what is said, how it is measured here, the bar.

`kvjax reproduce` runs them and computes a verdict for each.
"""

import difflib
from collections.abc import Sequence

from kvjax.evaluation.claims.claim import Claim
from kvjax.evaluation.claims.papers import (
    cascade,
    citrus,
    critiprefill,
    entmaxkv,
    hip,
    refreshkv,
    retro,
    squeezed,
    subgen,
    topk_completion,
)

ALL: tuple[Claim, ...] = (
    *topk_completion.CLAIMS,
    *cascade.CLAIMS,
    *entmaxkv.CLAIMS,
    *refreshkv.CLAIMS,
    *retro.CLAIMS,
    *squeezed.CLAIMS,
    *hip.CLAIMS,
    *subgen.CLAIMS,
    *citrus.CLAIMS,
    *critiprefill.CLAIMS,
)


# What the embedded models cannot tell: they were trained for less.
MORE: tuple[Claim, ...] = (
    *topk_completion.MORE,
    *cascade.MORE,
    *refreshkv.MORE,
    *retro.MORE,
    *hip.MORE,
    *subgen.MORE,
    *critiprefill.MORE,
)


def on(model: str, names: Sequence[str] = ()) -> tuple[Claim, ...]:
    """The claims of these names as another model than the embedded ones tells them.

    Args:
        model: as `--model` names it.
        names: of claims; all of them for none.

    Raises:
        ValueError: as :func:`named`.
    """
    every = tuple(claim.on(model) for claim in (*ALL, *MORE))
    return named(names, every)


def named(names: Sequence[str], every: Sequence[Claim] = ALL) -> tuple[Claim, ...]:
    """The claims of these names, in the order of the table; all of them for none.

    Raises:
        ValueError: for a name that no claim has, with the nearest one.
    """
    known = {claim.name: claim for claim in every}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(
                f"unknown claim {name!r}; did you mean {close[0]!r}? "
                "`kvjax reproduce --list` shows all."
            )
    return tuple(claim for claim in every if not names or claim.name in names)
