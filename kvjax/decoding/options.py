"""The options of a generation: one frozen object, checked once, when it is made."""

import dataclasses
from collections.abc import Collection, Sequence

from kvjax.decoding import instructions
from kvjax.decoding.checks import (
    check_counts,
    check_eos_ids,
    check_model,
    check_seed,
    check_stop,
)
from kvjax.decoding.lookup import Lookup
from kvjax.decoding.sampling import Sampling, validate
from kvjax.interface import LanguageModel, Method

_GREEDY = Sampling()


# A verifying pass and its rewind are compiled for this many tokens at most.
MOST_DRAFTED = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting:
    """The options of drafts: see :mod:`kvjax.decoding.drafting`.

    Attributes:
        method: drafts, or says where in the text a draft stands.
        tokens: most tokens of a draft.
        model: drafts instead of the model whose text it is; None: that one.

    Raises:
        ValueError: if one is of another type or out of its range.
    """

    method: Method | Lookup
    tokens: int = 6
    model: LanguageModel | None = None

    def __post_init__(self):
        check_counts(draft_tokens=self.tokens)
        if self.tokens > MOST_DRAFTED:
            raise ValueError(
                f"draft_tokens={self.tokens} must be at most {MOST_DRAFTED}: few of so "
                "long a draft would hold."
            )
        object.__setattr__(self, "tokens", int(self.tokens))
        if self.model is not None:
            check_model(self.model)
            if isinstance(self.method, Lookup):
                raise ValueError(
                    f"{self.method} finds drafts in the text, and needs no draft "
                    "model: leave either out."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of :func:`kvjax.decoding.generate.generate`, and of its parts.

    Attributes:
        max_new_tokens: most tokens a row generates, its EOS token included; the caches
            have room for them.
        sampling: greedy by default.
        stop: a row ends at the first token whose text completes one of these.
        eos_ids: tokens that end a row; None means the model's.
        seed: of the random keys.
        chunk_size: most prompt tokens processed at once; a second reading takes the
            method's own `chunk`.
        stream_every: decode steps between two looks of the host.
        longest: tokens of a prompt to make room for, where none is so long: prompts up
            to there share their compiled code.
        instruction: tokens at the end of every prompt, or of each, by which a method
            selects that is told of them; None is as many as it takes by itself.
        drafting: who drafts tokens that are checked several at once; None: nobody.

    Raises:
        ValueError: if one is of another type or out of its range.
    """

    max_new_tokens: int = 128
    sampling: Sampling = _GREEDY
    stop: Sequence[str] = ()
    eos_ids: Collection[int] | None = None
    seed: int = 0
    chunk_size: int = 512
    stream_every: int = 16
    longest: int = 0
    instruction: int | Sequence[int] | None = None
    drafting: Drafting | None = None

    def __post_init__(self):
        validate(self.sampling)
        check_seed(self.seed)
        check_eos_ids(self.eos_ids)
        check_stop(self.stop)
        counts = ("stream_every", "max_new_tokens", "chunk_size")
        check_counts(**{name: getattr(self, name) for name in counts})
        for name in (*counts, "seed"):  # NumPy's are integers too
            object.__setattr__(self, name, int(getattr(self, name)))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "instruction", instructions.given(self.instruction))

    def ends(self, model: LanguageModel) -> frozenset[int]:
        """Returns the tokens that end a row."""
        return frozenset(model.eos_ids if self.eos_ids is None else self.eos_ids)
