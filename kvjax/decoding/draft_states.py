"""The states that drafts are made from, and how a pass over a draft leaves them.

One store, two views: where the drafting method keeps every token and can take some
back, its own exact `prefill` checks the draft and no second cache exists. Any other
method of the same model is given what the checking pass computed: the queries, keys and
values of the tokens that hold. It drafts from a copy that is dropped. A draft model
reads the text itself, and takes back what does not hold. A lookup has the text alone.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.decoding import speculative
from kvjax.decoding.lookup import Lookup, Text
from kvjax.interface import DecoderLM, Hooks, Method, Params, State


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Who drafts, and who checks: static, and hashable.

    Attributes:
        decoder: of the text.
        target: checks; its text it is.
        method: drafts, or says where in the text a draft stands.
        tokens: most tokens of a draft.
        other: the decoder of a draft model; None: `decoder` drafts.
    """

    decoder: DecoderLM
    target: Method
    method: Method | Lookup
    tokens: int
    other: DecoderLM | None = None

    @property
    def width(self) -> int:
        """Tokens of a pass: the newest, and a draft."""
        return self.tokens + 1

    @property
    def is_shared(self) -> bool:
        """Says whether the drafting method's own cache is the only one."""
        method = self.method
        if isinstance(method, Lookup):
            return False
        keeps_all = method.rewind is not None and method.exact_prompt
        is_plain = method.hooks == Hooks() and method.reread is None
        is_lossy = method.lossy or self.target.lossy
        return self.other is None and keeps_all and is_plain and not is_lossy

    @property
    def checking(self) -> Method:
        """The method whose `prefill` and `rewind` check a draft."""
        if isinstance(self.method, Lookup) or not self.is_shared:
            return self.target
        return self.method


class Caches(NamedTuple):
    """The states of all layers, without each row's newest token."""

    target: tuple[State, ...]  # with every token: those that check
    draft: tuple[State, ...] | Text | None  # None where they draft too


class Heads(NamedTuple):
    """Queries, keys and values of a pass in one layer, not rotated."""

    q: Float[Array, "B Hq T D"]
    k: Float[Array, "B Hkv T D"]
    v: Float[Array, "B Hkv T D"]


class Both(NamedTuple):
    """One layer's states of the method that checks and of the one that drafts."""

    target: State
    draft: State


@functools.cache
def both(target: Method, method: Method) -> Method:
    """Returns a method that reads prompts for two: one run, the first one's output.

    It decodes nothing: its states are taken apart when the prompt has ended.

    Args:
        target: attends to everything, and wants nothing of whoever reads.
        method: is told and asked all that it wants.
    """

    def init(spec, weights=None):
        return Both(target.init(spec), method.init(spec, weights))

    def read_after(state, q, k, v, lengths, below):
        kept, out = target.prefill(state.target, q, k, v, lengths)
        own, _, handed = method.prefill_layer(state.draft, q, k, v, lengths, below)
        return Both(kept, own), out, handed

    def prefill(state, q, k, v, lengths):
        return read_after(state, q, k, v, lengths, None)[:2]

    def finish(state):
        return Both(target.finish(state.target), method.finish(state.draft))

    def decode(*arguments: Any, **named: Any) -> Any:
        del arguments, named
        raise TypeError("methods that read together decode one by one.")

    again = method.reread
    return Method(
        init=init,
        prefill=prefill,
        finish=finish,
        append=decode,
        inspect_step=decode,
        traffic=decode,
        reread=again and again._replace(prefill=of_draft(again.prefill)),
        hooks=_hooks(method, read_after),
    )


def of_draft(prefill: Any) -> Any:
    """Returns a `prefill` of the drafting method alone, as one of both."""

    def read(state, q, k, v, lengths):
        own, out = prefill(state.draft, q, k, v, lengths)
        return state._replace(draft=own), out

    return read


def _hooks(method: Method, read_after: Any) -> Hooks:
    """Returns the wishes of the drafting method, as those of both."""
    hooks, asked = method.hooks, method.hooks.asked
    over_layers: Any = hooks.settle

    def alone(change):
        return lambda state: state._replace(draft=change(state.draft))

    def settle(states):
        own = over_layers(tuple(state.draft for state in states))
        pairs = zip(states, own, strict=True)
        return tuple(state._replace(draft=one) for state, one in pairs)

    if asked is not None:
        asked = asked._replace(
            probe=of_draft(asked.probe),
            close=alone(asked.close),
            settle=alone(asked.settle),
        )
    return Hooks(
        asked=asked,
        settle=hooks.settle and settle,
        granule=hooks.granule,
        prefill_after=hooks.prefill_after and read_after,
    )


class _Watched(NamedTuple):
    """One layer's state, and what the last chunk brought."""

    state: State
    heads: Heads


@functools.cache
def _watching(method: Method) -> Method:
    """Returns the method with the heads of each chunk beside its state."""

    def prefill(state, q, k, v, lengths):
        own, out = method.prefill(state.state, q, k, v, lengths)
        return _Watched(own, Heads(q, k, v)), out

    return method._replace(prefill=prefill, hooks=Hooks())


def read_draft(
    drafter: Drafter,
    params: Params,
    states: tuple[State, ...],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> tuple[tuple[State, ...], Float[Array, "B T E"], tuple[Heads, ...]]:
    """Reads a draft in one exact pass: its states, hidden states and heads a layer."""
    decoder, method = drafter.decoder, drafter.checking
    is_told = drafter.other is None and isinstance(drafter.method, Method)
    if drafter.is_shared or not is_told:
        states, hidden = decoder.prefill(params, states, tokens, lengths, method)
        return states, hidden, ()
    watched = tuple(
        _Watched(state, _no_heads(decoder, layer, tokens.shape))
        for layer, state in enumerate(states)
    )
    watching = _watching(method)
    watched, hidden = decoder.prefill(params, watched, tokens, lengths, watching)
    pairs: Any = watched
    return tuple(x.state for x in pairs), hidden, tuple(x.heads for x in pairs)


def _no_heads(decoder: DecoderLM, layer: int, shape: tuple[int, ...]) -> Heads:
    batch, rows = shape
    spec = decoder.cache_spec(batch, rows, layer=layer)

    def empty(heads):
        return jnp.zeros((batch, heads, rows, spec.head_dim), spec.dtype)

    keys = empty(spec.num_kv_heads)
    return Heads(empty(spec.num_q_heads), keys, keys)


def settle(
    drafter: Drafter,
    caches: Caches,
    heads: tuple[Heads, ...],
    steps: Int[Array, ""],
    read: Int[Array, "B"],
    held: Int[Array, "B"],
) -> Caches:
    """Takes back what does not hold of a draft, and gives what does to who drafts.

    Args:
        caches: with the whole draft in the states that checked it.
        heads: of the pass, for a method that is to be told of the tokens that hold.
        steps: that a draft model took.
        read: tokens of each row in the pass.
        held: of these, how many hold: the first of them is the newest token.
    """
    most, checking = drafter.width, drafter.checking
    target = speculative.rewind(checking, caches.target, read - held, most)
    method, draft = drafter.method, caches.draft
    if draft is None or isinstance(draft, Text) or isinstance(method, Lookup):
        return caches._replace(target=target)
    if drafter.other is None:
        return Caches(target, follow(method, draft, heads, held))
    return Caches(target, speculative.rewind(method, draft, steps - held, most))


def follow(
    method: Method,
    states: tuple[State, ...],
    heads: tuple[Heads, ...],
    count: Int[Array, "B"],
) -> tuple[State, ...]:
    """Feeds each row the first `count` tokens of a pass, by the method's own steps."""

    def step(carry):
        index, before = carry
        after = []
        for state, own in zip(before, heads, strict=True):
            q, k, v = (jax.lax.dynamic_slice_in_dim(x, index, 1, axis=2) for x in own)
            new, _ = method.decode_step(method.append(state, k, v), q)
            # One row stops with the loop, and needs no copy.
            after.append(new if len(count) == 1 else chosen(index < count, new, state))
        return index + 1, tuple(after)

    begun = jnp.int32(0), states
    return jax.lax.while_loop(lambda carry: carry[0] < count.max(), step, begun)[1]


def chosen(is_new: Bool[Array, "B"], new: State, old: State) -> State:
    """Returns the new state of some rows and the old one of the others.

    The first axis of a state's arrays are the rows, but for weights, which stay. What
    lies in the host's memory comes to be chosen, one layer at a time.
    """

    def one(new: Array, old: Array) -> Array:
        if new is old:
            return new
        memory = jax.typeof(old).memory_space
        rows = is_new.reshape(-1, *[1] * (new.ndim - 1))
        here = (jax.device_put(x, jax.memory.Space.Device) for x in (new, old))
        return jax.device_put(jnp.where(rows, *here), memory)

    return jax.tree.map(one, new, old)
