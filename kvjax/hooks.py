"""The wishes of a method while a prompt is read, ends or is saved: hooks of the driver.

Those of :class:`kvjax.interface.Method` stay as they are; what is here is optional, and
a method without it is read chunk by chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int


class Asked(NamedTuple):
    """An instruction at a prompt's end that votes on what is kept of its context.

    The reader knows where the instruction begins. It reads the context `stride` tokens
    at a time, with a `probe` before each but the first; then it calls `close`, probes
    once more, calls `settle`, reads the instruction by the method's own `prefill`, and
    ends with `finish`. A method that is read without any of this goes by what it reads.

    Fields:
        stride: context tokens between two probes, and most tokens of an instruction.
        tokens: those of an instruction where nobody says how many.
        probe: a :class:`kvjax.interface.PrefillFn` of the instruction: attends to what
            is kept and to itself, votes, and leaves no key behind.
        close: a :class:`kvjax.interface.FinishFn` of the context's end: what was read
            and waits is kept too.
        settle: a :class:`kvjax.interface.FinishFn`: keeps what the last probe voted
            for, in the final shape; `prefill` goes on from it without eviction.
        reach: positions that a prompt takes, however long; with those generated they
            must be in the model's context.
        votes_once: the probe before `settle` is the only one.
    """

    stride: int
    tokens: int
    probe: Callable[..., Any]
    close: Callable[[Any], Any]
    settle: Callable[[Any], Any]
    reach: int
    votes_once: bool = False


@runtime_checkable
class PrefillAfterFn(Protocol):
    """Reads a chunk as `prefill` does, knowing what the layer below handed up.

    `below` is None for the first layer. What a layer hands up has one structure and
    shape, whatever came from below: the layers share a program.
    """

    def __call__(
        self,
        state: Any,
        /,
        q: Float[Array, "B Hq T D"],
        k: Float[Array, "B Hkv T D"],
        v: Float[Array, "B Hkv T D"],
        lengths: Int[Array, "B"],
        below: Any,
    ) -> tuple[Any, Float[Array, "B Hq T D"], Any]: ...


class Hooks(NamedTuple):
    """The wishes of a method to the driver, beyond one layer's functions; None: none.

    Fields:
        asked: what an instruction at the prompt's end does while the rest is read.
        settle: `settle(states) -> states`, once behind `finish`, of all layers: what is
            decided over the whole model. Structure, shapes and dtypes stay.
        seal: `seal(state) -> state`, of a layer's prompt that is to be saved: what can
            be made of it once for all that comes behind. `prefill` and `finish` take
            the outcome, too; not more comes behind than `max_new_tokens`.
        granule: tokens of a part of the prompt that `prefill` may attend to by rules of
            its own if it comes whole in one call. The reader gives parts whole, counted
            from the first token, but for a row's last, which it cuts, unless all keys
            rotate at once, as beyond the original context under `dynamic` RoPE.
        prefill_after: in place of `prefill`, for what layers hand to each other.
        work: `work(spec, length)` query-key pairs that a query head attends to while a
            prompt of `length` tokens is read: `length * (length + 1) / 2` if every
            token sees all.
    """

    asked: Asked | None = None
    settle: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None
    seal: Callable[[Any], Any] | None = None
    granule: int | None = None
    prefill_after: PrefillAfterFn | None = None
    work: Callable[[Any, int], int] | None = None
