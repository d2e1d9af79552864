"""A session that claims share while measured: models, inputs, what is done already.

Compiling is most of the time, so claims look at the same windows in the same shapes,
and a run of a method serves every claim that asks for it.
"""

import pathlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from kvjax.evaluation.claims import recorded
from kvjax.evaluation.claims.claim import NotMeasuredError
from kvjax.evaluation.claims.samples import Make, Samples
from kvjax.evaluation.tasks.ruler import texts as ruler_texts
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
    # Of the context, one in so many tokens is what a method keeps or reads.
    cut: int = 8
    # Samples at a time, each kept when it is there; None takes all of them at once.
    batch: int | None = None


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


CONTEXTS = (1024, 2048, 4096, 8192)  # that claims are made for
CUTS = (4, 8, 16, 32)
# Sizes that only say how many samples there are, and how many at a time: what has been
# measured of one number is measured of another.
COUNTS = ("layer_windows", "windows", "examples", "cascade_windows", "keys", "batch")
_LEAST = 40  # tokens that retrieval reads: twice those it always does
# In one layer: speed is of shapes, not of a model's context.
_TIMED, _TIMED_QUICKLY = (
    {"clocked": sizes.clocked, "decoded": sizes.decoded, "repeats": sizes.repeats}
    for sizes in (FULL, QUICK)
)


def fitted(
    context: int, *, n: int, cut: int = 8, batch: int = 4, quick: bool = False
) -> Sizes:
    """The sizes of every claim on a model, from the longest input.

    Args:
        context: tokens of an input, what follows a prompt included.
        n: windows of text, and examples of each task.
        cut: a method keeps or reads one in so many tokens.
        batch: samples at a time.
        quick: what is timed is timed on short inputs.

    Raises:
        ValueError: if `n` or `batch` < 1, or the context is below 64 or no multiple
            of 16, or `cut` is not in [2, context / 8].
    """
    if n < 1 or batch < 1:
        raise ValueError(f"{n=} and {batch=} must be at least 1.")
    if context < 64 or context % 16 or not 2 <= cut <= context // 8:
        raise ValueError(
            f"{context=} must be a multiple of 16, at least 64, and {cut=} in [2, "
            f"context / 8]."
        )
    steps = context // 8
    timed = _TIMED_QUICKLY if quick else _TIMED
    return Sizes(
        layer_context=context,
        layer_windows=n,
        layer_steps=max(context // 64, 4),
        share=max(1 / (4 * cut), _LEAST / (context - steps)),
        context=context - steps,
        windows=n,
        text_steps=steps,
        examples=n,
        rows=12,
        # Doubled four times it is the context.
        cache=context // 16,
        cascade_stride=context // 16,
        cascade_context=context,
        cascade_windows=n,
        keys=n,
        thorough=True,
        cut=cut,
        batch=batch,
        **timed,
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
        samples: values that are kept sample by sample.
        models: of each role (`SOFTMAX`, `ENTMAX`, `REFRESHED`) the model that has it;
            None where the embedded models have them.
        source: texts of RULER's tasks.
        is_chat: tasks are asked in the model's chat template.
    """

    load: Callable[[str], LanguageModel]
    parse: Callable[[str], Method]
    text: str
    sizes: Sizes
    results: pathlib.Path
    done: dict[Hashable, Any]
    samples: Samples
    models: Mapping[str, str] | None = None
    source: ruler_texts.Texts | None = None
    is_chat: bool = False

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Calls `make`; the second time, returns what it gave."""
        if key not in self.done:
            self.done[key] = make()
        return self.done[key]

    def model(self, name: str) -> LanguageModel:
        """A model by its role, loaded once.

        Raises:
            NotMeasuredError: if the model that is asked about has not that role.
        """
        if self.models is not None:
            if name not in self.models:
                raise NotMeasuredError(self._lacking(name))
            name = self.models[name]
        return self.remember(("model", name), lambda: self.load(name))

    def _lacking(self, role: str) -> str:
        given = ", ".join(dict.fromkeys((self.models or {}).values()))
        if role == ENTMAX:
            return (
                f"not measurable on {given}: it attends by softmax, and the claim "
                "takes a model trained to attend by alpha-entmax."
            )
        return (
            f"not measurable on {given}: it attends by alpha-entmax, and the claim is "
            "about softmax."
        )

    def sampled(self, key: Sequence[Any], count: int, make: Make) -> list[Any]:
        """The values of so many samples, batch by batch; see :class:`Samples`."""
        batch = count if self.sizes.batch is None else self.sizes.batch
        return self.samples.values(key, count, make, batch=batch)

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
    samples: Samples | None = None,
    models: Mapping[str, str] | None = None,
    source: ruler_texts.Texts | None = None,
    is_chat: bool = False,
) -> Session:
    """A session with nothing done yet.

    Args:
        load, parse, text: see :class:`Session`.
        quick: the small sizes.
        sizes: others, if given.
        results: folder of recorded runs; `recorded.FOLDER` if None.
        samples, models, source, is_chat: see :class:`Session`.
    """
    if sizes is None:
        sizes = QUICK if quick else FULL
    folder = recorded.FOLDER if results is None else results
    samples = samples or Samples()
    return Session(
        load, parse, text, sizes, folder, {}, samples, models, source, is_chat
    )


def roles(model: str, alpha: float) -> dict[str, str]:
    """The roles that a model has, by the kind of its attention."""
    return {ENTMAX: model} if alpha > 1 else {SOFTMAX: model, REFRESHED: model}
