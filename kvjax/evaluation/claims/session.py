"""A session that claims share while measured: models, inputs, what is done already.

Compiling is most of the time, so claims look at the same windows in the same shapes,
and a run of a method serves every claim that asks for it.
"""

import pathlib
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

from kvjax.evaluation.claims import recorded
from kvjax.evaluation.claims.claim import NotMeasuredError
from kvjax.interface import LanguageModel, Method

T = TypeVar("T")

SEED = 70_000  # of every input: far from those of training and of the defaults


class Sizes(NamedTuple):
    """The amounts that are measured. Contexts are tokens, steps included."""

    # Layers alone, on keys and queries of the model under its own attention.
    layer_context: int
    layer_windows: int
    layer_steps: int
    share: float  # of the context, what retrieval reads
    # The whole model, token by token.
    context: int
    windows: int  # of text, all in one batch
    text_steps: int
    examples: int  # of a task, in batches of `windows`
    rows: int  # of a table to be written
    # Cascades.
    cache: int  # slots
    cascade_stride: int
    cascade_context: int
    cascade_windows: int
    keys: int  # pass keys at each distance
    clocked: tuple[int, int]  # lengths of prompts that are timed, in one layer
    decoded: int  # tokens before a decode step that is timed, in one layer
    repeats: int
    thorough: bool  # measures anew what a recorded run may stand in for


FULL = Sizes(
    layer_context=2048,
    layer_windows=8,
    layer_steps=32,
    share=0.04,
    context=1024,
    windows=8,
    text_steps=256,
    examples=24,
    rows=12,
    cache=128,
    cascade_stride=128,
    cascade_context=2048,
    cascade_windows=8,
    keys=24,
    clocked=(4096, 16384),
    decoded=65536,
    repeats=5,
    thorough=True,
)
QUICK = Sizes(
    layer_context=1024,
    layer_windows=6,
    layer_steps=16,
    share=0.05,
    context=512,
    windows=8,
    text_steps=64,
    examples=8,
    rows=12,
    cache=64,
    cascade_stride=64,
    cascade_context=1024,
    cascade_windows=8,
    keys=8,
    clocked=(2048, 8192),
    decoded=16384,
    repeats=3,
    thorough=False,
)


class Session(NamedTuple):
    """One run of the command.

    Fields:
        load: a model by its name.
        parse: a method by its spec string.
        text: held out of the models' training.
        sizes: how much is measured.
        results: the folder of recorded runs.
        done: by key; what was run once.
    """

    load: Callable[[str], LanguageModel]
    parse: Callable[[str], Method]
    text: str
    sizes: Sizes
    results: pathlib.Path
    done: dict[Hashable, Any]

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Calls `make`; the second time, returns what it gave."""
        if key not in self.done:
            self.done[key] = make()
        return self.done[key]

    def model(self, name: str) -> LanguageModel:
        """A model, loaded once."""
        return self.remember(("model", name), lambda: self.load(name))

    def needs_thorough(self) -> None:
        """Raises NotMeasuredError where `--quick` leaves a claim out."""
        if not self.sizes.thorough:
            raise NotMeasuredError("left out of --quick: without it, it is measured.")

    def method(self, spec: str) -> Method:
        """A method, made once: the same object finds the same compiled program."""
        return self.remember(("method", spec), lambda: self.parse(spec))


SOFTMAX, ENTMAX, REFRESHED = "embedded-softmax", "embedded-entmax", "embedded-refreshkv"


def session(
    load: Callable[[str], LanguageModel],
    parse: Callable[[str], Method],
    text: str,
    *,
    quick: bool = False,
    sizes: Sizes | None = None,
    results: pathlib.Path | None = None,
) -> Session:
    """A session with nothing done yet.

    Args:
        load, parse, text: see :class:`Session`.
        quick: the small sizes.
        sizes: others, if given.
        results: folder of recorded runs; `recorded.FOLDER` if None.
    """
    if sizes is None:
        sizes = QUICK if quick else FULL
    folder = recorded.FOLDER if results is None else results
    return Session(load, parse, text, sizes, folder, {})
