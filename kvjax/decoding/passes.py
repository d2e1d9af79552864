"""The loop of passes: a draft, one pass that checks it, and what each row takes of it.

Several passes run on the device before the host looks. A row drafts as many tokens as
it is likely to keep: two more after a whole draft that held, one fewer after one that
did not. No length compiles anew: the pass has rows for the longest.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax.decoding import draft_states, lookup, loop, speculative
from kvjax.decoding.draft_states import Caches, Drafter
from kvjax.decoding.finite import is_finite
from kvjax.decoding.lookup import Lookup, Text
from kvjax.decoding.reader import PAD
from kvjax.decoding.sampling import Sampling, filter_logits
from kvjax.interface import DecoderLM, Method, Params, State


class Given(NamedTuple):
    """The choices that hold for all passes."""

    keys: Key[Array, "B"] | None  # None if greedy
    sampling: Sampling  # from `active`
    eos_ids: Int[Array | np.ndarray, "n"]
    most: Int[Array | np.ndarray | np.int32, ""]  # tokens that a row generates


class Counts(NamedTuple):
    """The drafts of each row so far."""

    drafted: Int[Array | np.ndarray, "B"]
    accepted: Int[Array | np.ndarray, "B"]
    passes: Int[Array | np.ndarray, "B"]


class Memory(NamedTuple):
    """The facts that a pass remembers of each row, beside states and window."""

    chosen: Int[Array | np.ndarray, "B"]  # tokens that it generated
    done: Bool[Array | np.ndarray, "B"]
    finite: Bool[Array | np.ndarray, "B"]  # the logits of the newest pass were
    seen: Bool[Array | np.ndarray, "B V"] | None  # only under a repetition penalty
    next_draft: Int[Array | np.ndarray, "B"]  # tokens
    counts: Counts


class Taken(NamedTuple):
    """The tokens that rows take of a pass."""

    tokens: Int[Array, "*n B T"]  # padded
    numbers: Int[Array, "*n B"]


class Passes(NamedTuple):
    """The outcome of some passes."""

    caches: Caches
    window: Int[Array, "B R"]  # the newest tokens of each row; the last is not fed yet
    memory: Memory
    taken: Taken  # of every pass
    num_passes: Int[Array, ""]


class Draft(NamedTuple):
    """The tokens that were drafted, more than a row may check of them."""

    tokens: Int[Array, "B T"]
    logits: Float[Array, "B T V"] | None  # that each was drawn by; None if greedy
    seen: Bool[Array, "B V"] | None
    states: tuple[State, ...]
    window: Int[Array, "B R"]
    num_steps: Int[Array, ""]
    most: Int[Array, "B"] | None = None  # of each row, where some have fewer


def take_passes(
    drafter: Drafter,
    size: int,
    params: tuple[Params, Params],
    caches: Caches,
    window: Int[Array, "B R"],
    memory: Memory,
    given: Given,
) -> Passes:
    """Takes up to `size` passes, until all rows are done.

    `params` are those of the model, and of a draft model.
    """
    batch, width = window.shape[0], drafter.width

    def running(carry: Passes):
        is_over = carry.memory.done.all() | ~carry.memory.finite.all()
        return (carry.num_passes < size) & ~is_over

    def step(carry: Passes):
        caches, window, memory, taken = take_pass(
            drafter, params, carry.caches, carry.window, carry.memory, given
        )
        kept = jax.tree.map(
            lambda x, new: x.at[carry.num_passes].set(new), carry.taken, taken
        )
        return Passes(caches, window, memory, kept, carry.num_passes + 1)

    tokens = jnp.full((size, batch, width), PAD, jnp.int32)
    nothing = Taken(tokens, jnp.zeros((size, batch), jnp.int32))
    begun = Passes(caches, window, memory, nothing, jnp.int32(0))
    return jax.lax.while_loop(running, step, begun)


def take_pass(
    drafter: Drafter,
    params: tuple[Params, Params],
    caches: Caches,
    window: Int[Array, "B R"],
    memory: Memory,
    given: Given,
) -> tuple[Caches, Int[Array, "B R"], Memory, Taken]:
    """Drafts, checks, and takes what holds with the token behind it."""
    width, own = drafter.width, params[0]
    # A draft ends before the row does, so that all that it takes is in its cache.
    left = given.most - memory.chosen - 1
    drafts = jnp.where(memory.done, 0, jnp.minimum(memory.next_draft, left))
    caches, drafted = propose(drafter, params, caches, window, memory, given, drafts)
    if drafted.most is not None:
        drafts = jnp.minimum(drafts, drafted.most)
    newest = window[:, -1:]
    tokens = jnp.concatenate([newest, drafted.tokens[:, : width - 1]], axis=1)
    read = jnp.where(memory.done, 0, drafts + 1)
    target, hidden, heads = draft_states.read_draft(
        drafter, own, caches.target, tokens, read
    )
    logits = drafter.decoder.logits(own, hidden)
    decided = decide(logits, drafted.logits, tokens, drafts, memory, given)
    held = jnp.where(memory.done, 0, decided.accepted + 1)
    caches = draft_states.settle(
        drafter,
        caches._replace(target=target),
        heads,
        drafted.num_steps,
        read,
        held,
    )
    taken, memory = remember(logits, decided, tokens, drafts, held, memory, given)
    window = _pushed(window, taken.tokens, taken.numbers)
    if isinstance(caches.draft, Text):
        text = lookup.extended(caches.draft, *taken)
        caches = caches._replace(draft=text)
    return caches, window, memory, taken


def propose(
    drafter: Drafter,
    params: tuple[Params, Params],
    caches: Caches,
    window: Int[Array, "B R"],
    memory: Memory,
    given: Given,
    drafts: Int[Array, "B"],
) -> tuple[Caches, Draft]:
    """Drafts tokens behind each row's newest.

    A draft model feeds its last one too: it cannot be told what that was.
    """
    width, (own, others) = drafter.width, params
    decoder, states, method = drafter.decoder, caches.draft, drafter.method
    if isinstance(states, Text) or isinstance(method, Lookup):
        return caches, looked_up(drafter, caches, window, given)
    count, run = drafts.max(), functools.partial(draft, width=width, given=given)
    if drafter.other is not None and states is not None:
        decoder, count = drafter.other, count + 1
        drafted = run(decoder, method, others, states, window, memory, count)
        return caches._replace(draft=drafted.states), drafted
    if states is not None:
        return caches, run(decoder, method, own, states, window, memory, count)
    drafted = run(decoder, method, own, caches.target, window, memory, count)
    back = jnp.full_like(drafts, count)
    target = speculative.rewind(method, drafted.states, back, width)
    return Caches(target, None), drafted


def looked_up(
    drafter: Drafter, caches: Caches, window: Int[Array, "B R"], given: Given
) -> Draft:
    """Finds each row's draft in its own text: fewer tokens, or none, in some rows."""
    text, method = caches.draft, drafter.method
    if not (isinstance(text, Text) and isinstance(method, Lookup)):
        raise TypeError(f"{method} drafts from no text.")
    tokens, most = lookup.find(method, text, drafter.width)
    logits = None
    if given.keys is not None:
        logits = lookup.certain(tokens, drafter.decoder.vocab_size)
    return Draft(tokens, logits, None, (), window, jnp.int32(0), most)


def draft(
    decoder: DecoderLM,
    method: Method,
    params: Params,
    states: tuple[State, ...],
    window: Int[Array, "B R"],
    memory: Memory,
    count: Int[Array, ""],
    *,
    width: int,
    given: Given,
) -> Draft:
    """Takes `count` steps, at most `width`, each on the token that the last drew."""
    batch, keys = window.shape[0], None
    logits = None
    if given.keys is not None:
        keys = speculative.place_keys(given.keys, memory.chosen, width)
        logits = jnp.zeros((batch, width, decoder.vocab_size), jnp.float32)
    tokens = jnp.full((batch, width), PAD, jnp.int32)

    def step(carry: Draft):
        states, hidden = decoder.decode_step(params, carry.states, carry.window, method)
        found = decoder.logits(params, hidden[:, -1])
        found = filter_logits(found, carry.seen, given.sampling)
        kept = carry.logits
        if keys is None or kept is None:
            new = jnp.argmax(found, axis=-1).astype(jnp.int32)
        else:
            new = speculative.draw(keys[:, carry.num_steps], found)
            kept = kept.at[:, carry.num_steps].set(found)
        return Draft(
            carry.tokens.at[:, carry.num_steps].set(new),
            kept,
            _marked(carry.seen, new[:, None], jnp.ones((batch, 1), bool)),
            states,
            loop.pushed(carry.window, new),
            carry.num_steps + 1,
        )

    seen = None if memory.seen is None else jnp.asarray(memory.seen)
    begun = Draft(tokens, logits, seen, states, window, jnp.int32(0))
    return jax.lax.while_loop(lambda carry: carry.num_steps < count, step, begun)


def decide(
    logits: Float[Array, "B T V"],
    drafted_by: Float[Array, "B T V"] | None,
    tokens: Int[Array, "B T"],
    drafts: Int[Array, "B"],
    memory: Memory,
    given: Given,
) -> speculative.Decided:
    """Decides how much of each draft holds, by logits filtered as those of a step."""
    if memory.seen is not None:
        logits = _penalised(logits, tokens, memory.seen, given.sampling)
    if given.keys is None or drafted_by is None:
        return speculative.decide_greedily(logits, tokens, drafts)
    batch, width, vocab_size = logits.shape
    others = given.sampling._replace(repetition_penalty=None)
    flat = filter_logits(logits.reshape(-1, vocab_size), None, others)
    logits = flat.reshape(batch, width, vocab_size)
    keys = speculative.place_keys(given.keys, memory.chosen, width)
    drafted_by = drafted_by[:, : width - 1]
    return speculative.decide_by_chance(keys, logits, drafted_by, tokens, drafts)


def _penalised(logits, tokens, seen, sampling: Any):
    """Applies a repetition penalty, of a draft's own tokens too."""
    only = sampling._replace(temperature=None, top_k=None, top_p=None, min_p=None)

    def one(seen, at):
        logits, token = at
        seen = _marked(seen, token[:, None], jnp.ones((len(token), 1), bool))
        return seen, filter_logits(logits, seen, only)

    # The first of them is marked already.
    _, found = jax.lax.scan(one, seen, (logits.swapaxes(0, 1), tokens.T))
    return found.swapaxes(0, 1)


def remember(
    logits: Float[Array, "B T V"],
    decided: speculative.Decided,
    tokens: Int[Array, "B T"],
    drafts: Int[Array, "B"],
    held: Int[Array, "B"],
    memory: Memory,
    given: Given,
) -> tuple[Taken, Memory]:
    """Returns the tokens that rows take of a pass, and the memory then."""
    width = tokens.shape[1]
    index = jnp.arange(width, dtype=jnp.int32)
    accepted = decided.accepted[:, None]
    later = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    told = jnp.where(index < accepted, later, decided.next_token[:, None])
    ends = (told[..., None] == given.eos_ids).any(-1) & (index < held[:, None])
    # Nothing behind a token that ends the row.
    first = ends.argmax(-1).astype(jnp.int32)
    taken = jnp.where(ends.any(-1), first + 1, held)
    is_taken = index < taken[:, None]
    finite = (is_finite(logits) | (index > drafts[:, None])).all(-1) | memory.done
    chosen = memory.chosen + taken
    is_whole = decided.accepted == drafts
    next_draft = jnp.where(is_whole, drafts + 2, drafts - 1)
    next_draft = jnp.where(drafts > 0, next_draft, memory.next_draft)
    counts = Counts(
        memory.counts.drafted + drafts,
        memory.counts.accepted + jnp.minimum(decided.accepted, taken),
        memory.counts.passes + (~memory.done).astype(jnp.int32),
    )
    after = Memory(
        chosen,
        memory.done | ends.any(-1) | (chosen >= given.most),
        finite,
        _marked(memory.seen, told, is_taken),
        jnp.clip(next_draft, 1, width - 1),
        counts,
    )
    return Taken(jnp.where(is_taken, told, PAD), taken), after


def _marked(seen, tokens, is_new):
    """Marks each row's new tokens; None stays None."""
    if seen is None:
        return None
    tokens = jnp.where(is_new, tokens, seen.shape[1])  # beyond the end: dropped
    rows = jnp.arange(len(tokens))[:, None]
    return seen.at[rows, tokens].set(True, mode="drop")


def _pushed(window, tokens, count):
    """Returns the newest tokens behind the first `count` of those given."""
    both = jnp.concatenate([window, tokens], axis=1)
    index = count[:, None] + jnp.arange(window.shape[1], dtype=jnp.int32)
    return jnp.take_along_axis(both, index, axis=1)


# A program that uses its caches up.
run = jax.jit(take_passes, static_argnums=(0, 1), donate_argnums=3)
