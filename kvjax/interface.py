"""The interface between methods, models and the decode loop. Read this first.

Axes, one alphabet for the whole repository:

    B    sequences                      Hq   query heads
    T    query tokens in this call      Hkv  key/value heads
    S    cache slots (capacity)         G    query heads per KV head, Hq // Hkv
    N    slots a method keeps           D    head dim
    NP   pages    P  tokens per page    E    model width, V vocabulary, L layers

Query head ``h`` reads KV head ``h // G``. Layout is head-major, ``(B, H, T, D)``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from kvjax import naming
from kvjax.cache_spec import CacheSpec as CacheSpec
from kvjax.cache_spec import Share as Share
from kvjax.cache_spec import with_layer as with_layer
from kvjax.cache_spec import with_specs as with_specs
from kvjax.copies import Copies as Copies
from kvjax.hooks import Hooks as Hooks
from kvjax.hooks import PrefillAfterFn as PrefillAfterFn
from kvjax.naming import RECIPES as RECIPES
from kvjax.naming import Recipe as Recipe

State = Any  # a pytree of arrays: one layer's NamedTuple
Params = Any  # a pytree of arrays: a model's weights


class Diagnostics(NamedTuple):
    """The set that one decode step attended to. Every method fills every field.

    Under `jax.jit` an unused field costs nothing: XLA removes its computation.

    Of entmax attention `attended` lists what was read, weights of exactly 0 included,
    and `lse` is the value max over p of p . logits + H(p), H the Tsallis entropy. For
    softmax, whose H is Shannon's, that value is the log-sum-exp. Either grows with the
    set attended to; only softmax's tells the mass of one set in another.
    """

    attended: Int[Array, "B H N"]  # absolute positions, -1 = none; H is Hkv or Hq
    lse: Float[Array, "B Hq T"]  # log-sum-exp of the attended logits (see below)
    refreshed: Bool[Array, "B"]  # this step read the whole cache
    exact: Bool[Array, "B Hq"]  # proved equal to attention over every token so far


class Traffic(NamedTuple):
    """Bytes of cache one decode step of one layer reads, all rows together."""

    kv: int  # keys and values that enter attention
    metadata: int  # summaries, scores and keys read only to choose
    link: int = 0  # of these, what may have to come from the host's memory first

    @property
    def total(self) -> int:
        return self.kv + self.metadata


@runtime_checkable
class InitFn(Protocol):
    """Makes the empty state of one layer; `weights` are a method's own learned ones."""

    def __call__(self, spec: CacheSpec, weights: Any = None) -> State: ...


@runtime_checkable
class PrefillFn(Protocol):
    """Reads a chunk of the prompt, right-padded to T; called once a chunk.

    Row b has `lengths[b]` tokens in it, 0 allowed. Exact attention over the prompt
    unless the method says otherwise. Splitting a prompt into chunks changes nothing.
    """

    def __call__(
        self,
        state: State,
        /,
        q: Float[Array, "B Hq T D"],
        k: Float[Array, "B Hkv T D"],
        v: Float[Array, "B Hkv T D"],
        lengths: Int[Array, "B"],
    ) -> tuple[State, Float[Array, "B Hq T D"]]: ...


@runtime_checkable
class FinishFn(Protocol):
    """Ends the prompt, after its last chunk.

    Evicting methods choose here what to keep, and the state takes its final, smaller
    shape. Layers of equal shapes share one program: nothing may depend on
    `CacheSpec.layer` here but through what `init` put into the state.

    No chunk comes afterwards. What does, a question about the prompt as much as what is
    generated, is appended token by token, and kept or evicted by the one rule that the
    method has for appended tokens (the section State of its factory). A finished state
    is arrays whose first axis are the rows, but for weights that rows share: copied,
    saved and restored, or with other rows of the same prompt, it goes on as it was.
    """

    def __call__(self, state: State, /) -> State: ...


@runtime_checkable
class AppendFn(Protocol):
    """Writes keys and values of a step's tokens; before `inspect_step`, once a step."""

    def __call__(
        self,
        state: State,
        /,
        k: Float[Array, "B Hkv T D"],
        v: Float[Array, "B Hkv T D"],
    ) -> State: ...


@runtime_checkable
class InspectStepFn(Protocol):
    """Attends from the tokens just appended, and says to what.

    The state keeps its structure, shapes and dtypes, so that a step can be scanned.
    """

    def __call__(
        self, state: State, /, q: Float[Array, "B Hq T D"]
    ) -> tuple[State, Float[Array, "B Hq T D"], Diagnostics]: ...


@runtime_checkable
class TrafficFn(Protocol):
    """Counts what a step of one layer reads when `length` tokens are cached."""

    def __call__(self, spec: CacheSpec, length: int) -> Traffic: ...


@runtime_checkable
class SelectFn(Protocol):
    """Lists the pages that a rotated query of the newest token reads, -1 = none.

    Of methods whose state is a :class:`kvjax.stores.paged.Paged` and whose step attends
    to listed pages. Transforms of such methods choose by it.
    """

    def __call__(
        self, state: State, /, q: Float[Array, "B Hq 1 D"]
    ) -> Int[Array, "B H K"]: ...


@runtime_checkable
class ImportanceFn(Protocol):
    """Scores the tokens of a prompt, float32: `finish` keeps the highest of a KV head.

    Of methods whose state before `finish`, which it takes, has a
    :class:`kvjax.stores.contiguous.Contiguous` in its field `store`; slot s is token s.
    +inf is kept whatever the budget, such as sinks and the newest tokens; -inf is no
    token. Transforms that share budgets out rank by it.
    """

    def __call__(self, state: State, /) -> Float[Array, "B Hkv S"]: ...


@runtime_checkable
class RewindFn(Protocol):
    """Takes back the newest `count` tokens, at most `most`, as if they had not come.

    After `finish`; of methods that keep every token, and take more of a prompt then.
    """

    def __call__(self, state: State, /, count: Int[Array, "B"], most: int) -> State: ...


class Rereading(NamedTuple):
    """A second reading of the prompt, between its last chunk and `finish`.

    For methods that learn from a second reading what to keep. Each chunk of the prompt
    is read behind the whole prompt, from position `length` on, and forgotten.
    """

    prefill: PrefillFn  # attends to the prompt and the chunk; keeps what it learns
    chunk: int  # tokens of the prompt that are read at once
    words: str  # the text before every chunk


class Lists(NamedTuple):
    """The lists by which a step reads rows, and no others: these may lie elsewhere.

    Fields:
        most: `most(spec, length)`, the pages that the lists of a KV head hold at most
            when `length` tokens are cached; or tokens, of a store in slots.
        keys: of tokens in slots keys are read so too, not only values: no step looks at
            all of them.
    """

    most: Callable[[CacheSpec, int], int]
    keys: bool = False


class Method(NamedTuple):
    """A KV-cache method: pure functions over one layer's state.

    Made by a factory whose keyword-only arguments are the hyperparameters. The order
    of calls is `init`, `prefill` once per chunk of the prompt, `finish` once, then
    `append` and `inspect_step` for every token, generated or of a question that comes
    after `finish`. `q` and `k` arrive un-rotated: a method owns its positions. A row's
    result never depends on the other rows. Heads may be on other devices: what is one
    for all of a layer comes of :mod:`kvjax.attention.heads`.

    Each function has a type in this module, whose docstring says what it promises. T is
    the chunk in `prefill` and `rows` in a step; out is as q, in q's dtype.

    Fields:
        rows: query rows per decode step: the newest token, behind those it revises.
        select: None unless the method lists pages.
        rewind: None unless tokens can be taken back.
        importance: None unless `finish` keeps the tokens that score highest by it.
        exact_prompt: `prefill` returns exact attention over the prompt, whatever the
            options. Such methods can read a prompt together: the model runs once.
        renumbers: no query meets a key at a distance that grows with the text, because
            positions are re-numbered: the model's context is no limit to them.
        reread: None unless the prompt is read again before `finish`.
        verifies: behind `finish`, too, a chunk that `prefill` reads is as many steps:
            it checks a draft in one pass, and `rewind` takes back what does not hold.
        lossy: keys and values are kept as other numbers than came: no step is exact.
        listed: None unless a step reads by lists alone.
        streamed: bytes that a step reads on average of its cache, if all of it or none.
        hooks: what it wants of the driver while a prompt is read, ends or is saved.
        repeats: takes the rows of a model that feeds copies of a token.
        estimates: a step's output has an estimate of tokens that its `lse` leaves out:
            it does not merge with attention to others.
    """

    init: InitFn
    prefill: PrefillFn
    finish: FinishFn
    append: AppendFn
    inspect_step: InspectStepFn
    traffic: TrafficFn
    rows: int = 1
    select: SelectFn | None = None
    importance: ImportanceFn | None = None
    rewind: RewindFn | None = None
    exact_prompt: bool = False
    renumbers: bool = False
    reread: Rereading | None = None
    verifies: bool = False
    lossy: bool = False
    listed: Lists | None = None
    streamed: Callable[[CacheSpec, int], int] | None = None
    hooks: Hooks = Hooks()
    repeats: bool = False
    estimates: bool = False

    def __repr__(self) -> str:
        """Its spec string, marked as a method's."""
        return f"Method({self.spec_text()!r})"

    def spec_text(self) -> str:
        """Its spec string; of a factory's call what can be read from the functions."""
        made_of = RECIPES.get(self)
        return made_of.spec if made_of else naming.spec_of(self)

    def decode_step(
        self, state: State, q: Float[Array, "B Hq T D"]
    ) -> tuple[State, Float[Array, "B Hq T D"]]:
        """Attends for the tokens just appended: the transform of this library."""
        state, out, _ = self.inspect_step(state, q)
        return state, out

    def prefill_layer(
        self,
        state: State,
        q: Float[Array, "B Hq T D"],
        k: Float[Array, "B Hkv T D"],
        v: Float[Array, "B Hkv T D"],
        lengths: Int[Array, "B"],
        below: Any = None,
    ) -> tuple[State, Float[Array, "B Hq T D"], Any]:
        """Reads a chunk in one layer of a model, which gives the last to the next."""
        if self.hooks.prefill_after is not None:
            return self.hooks.prefill_after(state, q, k, v, lengths, below)
        return (*self.prefill(state, q, k, v, lengths), below)


@runtime_checkable
class Rotation(Protocol):
    """A rotation of queries or keys by their positions: :class:`kvjax.rope.Rope`."""

    @property
    def static_until(self) -> float:
        """The longest length, in tokens, at which earlier rotations still hold."""
        ...

    def __call__(
        self,
        x: Float[Array, "B H T D"],
        positions: Int[Array, "B T"],
        length: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B H T D"]: ...


@runtime_checkable
class DecoderLM(Protocol):
    """The part of a model that decodes: pure functions, static and hashable.

    `cache_spec` is that of one layer: layers may differ in their rope. `states` is a
    tuple, one method state per layer. Hidden states have the cache's dtype; they go
    through `logits` separately, so that a prompt's are computed where they are wanted.
    """

    @property
    def num_layers(self) -> int: ...

    @property
    def context(self) -> int:
        """The longest sequence that the model was made for, tokens."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def width(self) -> int:
        """Elements of a hidden state, E."""
        ...

    @property
    def alpha(self) -> float:
        """The normaliser of attention: 1 is softmax, above 1 alpha-entmax."""
        ...

    @property
    def rope(self) -> Rotation:
        """The rotation of the layers that rotate; some may not."""
        ...

    def cache_spec(
        self, batch: int, capacity: int, max_new_tokens: int = 0, layer: int = 0
    ) -> CacheSpec: ...

    def prefill(
        self,
        params: Params,
        states: tuple[State, ...],
        tokens: Int[Array, "B T"],
        lengths: Int[Array, "B"],
        method: Method,
    ) -> tuple[tuple[State, ...], Float[Array, "B T E"]]: ...

    def decode_step(
        self,
        params: Params,
        states: tuple[State, ...],
        tokens: Int[Array, "B T"],
        method: Method,
    ) -> tuple[tuple[State, ...], Float[Array, "B T E"]]: ...

    def logits(
        self, params: Params, hidden: Float[Array, "*B E"]
    ) -> Float[Array, "*B V"]: ...


@runtime_checkable
class LayerwiseLM(Protocol):
    """A :class:`DecoderLM` that also runs one layer at a time.

    Prompts are then read by a small program that all layers share, compiled once.
    """

    def embed(
        self, params: Params, tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T E"]: ...

    def layer_params(self, params: Params) -> tuple[Params, ...]: ...

    def run_layer(
        self,
        layer_params: Params,
        x: Float[Array, "B T E"],
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "B T E"]: ...

    def normalise(
        self, params: Params, x: Float[Array, "*B E"]
    ) -> Float[Array, "*B E"]: ...


@runtime_checkable
class LayeredLM(Protocol):
    """The part of a model that says what its layers hold."""

    @property
    def num_layers(self) -> int: ...

    def cache_spec(
        self, batch: int, capacity: int, max_new_tokens: int = 0, layer: int = 0
    ) -> CacheSpec: ...


def layer_specs(
    decoder: LayeredLM, batch: int, capacity: int, max_new_tokens: int = 0
) -> tuple[CacheSpec, ...]:
    """Returns the spec of every layer, in their order, each with their number."""
    specs = (
        decoder.cache_spec(batch, capacity, max_new_tokens, layer)
        for layer in range(decoder.num_layers)
    )
    return tuple(
        dataclasses.replace(spec, num_layers=decoder.num_layers) for spec in specs
    )


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class LanguageModel(NamedTuple):
    """A decoder, its weights, and how to talk to it.

    `generation` are the checkpoint's own sampling defaults, as its
    `generation_config.json` names them.
    """

    decoder: DecoderLM
    params: Params
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...] = ()
    name: str = ""
    generation: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """One line: its weights have millions of numbers."""
        return naming.of_model(self)
