"""One prompt read for several methods: the model runs once, each method keeps its own.

Every method is given the queries, keys and values of the first one's run. For methods
of exact prompts (`Method.exact_prompt`) these are, to rounding, what their own run
would give them; a method of another kind leads, or reads alone.

While they read, what several of them keep is there once: a cache of every token is the
same under each method that has one. That it is the same follows from the programs
(:mod:`kvjax.evaluation.value_numbers`), not from what a method says of itself.
"""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from kvjax.decoding.checks import check_model, check_prompts, token_rows
from kvjax.decoding.ending import finish_layer, settled
from kvjax.decoding.options import Options
from kvjax.decoding.reader import (
    Prefilled,
    Reading,
    chunk_tokens,
    read_unended,
    ready,
    reread,
)
from kvjax.evaluation.value_numbers import value_numbers
from kvjax.interface import (
    CacheSpec,
    Hooks,
    LanguageModel,
    Method,
    State,
    with_layer,
)
from kvjax.stores import buffers

_CHUNK = 16  # tokens of a chunk, where nobody says


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Owners:
    """The leaf of several states that has the array of each: itself, or one before it.

    Leaves that are None are counted.
    """

    places: tuple[int, ...]


class Joint(NamedTuple):
    """The states of several methods in one layer, with what is equal in them once."""

    owners: Owners
    states: tuple[State, ...]  # None where another leaf has the array


def _flat(states: tuple[State, ...]) -> tuple[list[Any], Any]:
    return jax.tree.flatten(states, is_leaf=lambda leaf: leaf is None)


def _joined(states: tuple[State, ...], owners: Owners) -> Joint:
    leaves, structure = _flat(states)
    pairs = enumerate(zip(leaves, owners.places, strict=True))
    own = [leaf if place == index else None for index, (leaf, place) in pairs]
    return Joint(owners, structure.unflatten(own))


def apart(joint: Joint) -> tuple[State, ...]:
    """Returns the states whole: some of their arrays are the same object."""
    leaves, structure = _flat(joint.states)
    return structure.unflatten([leaves[place] for place in joint.owners.places])


@functools.cache
def reader(
    methods: tuple[Method, ...], chunk_size: int = _CHUNK, is_told: bool = False
) -> Method:
    """A method that reads prompts for all `methods`; `finish` gives a tuple of theirs.

    Its output is the first one's: what the others attend to while they read, XLA drops
    unless their states need it. It decodes nothing. Its state is a :class:`Joint`.

    Args:
        chunk_size: tokens of the chunks that it will read, after which equal things
            are equal.
        is_told: the reader knows where questions begin, and so will a method that wants
            it, if it reads alone; else they are read as any text.

    Raises:
        ValueError: if some of them read a prompt again, each in another way; from
            `prefill`, if a chunk of another size leaves them different.
    """
    ways = {(one.reread.chunk, one.reread.words) for one in methods if one.reread}
    if len(ways) > 1:
        raise ValueError(
            f"prompts are read again in {len(ways)} ways: read them apart."
        )
    found: dict[Any, Owners] = {}  # by all that is static, and what is equal at first

    def init(spec, weights=None):
        def begun(weights):
            return tuple(method.init(spec, weights) for method in methods)

        states, numbers = _run(begun, weights, range(len(jax.tree.leaves(weights))))
        structure = jax.tree.structure(with_layer(states, 0))
        key = dataclasses.replace(spec, layer=0), structure, numbers
        if key not in found:
            found[key] = _owners(methods, spec, states, numbers, chunk_size)
        return _joined(states, found[key])

    def read_after(joint, q, k, v, lengths, below):
        states = apart(joint)
        pairs = zip(_flat(states)[0], joint.owners.places, strict=True)
        owners = [place for leaf, place in pairs if leaf is not None]
        chunk = q, k, v, lengths, below
        others = [("chunk", i) for i in range(len(jax.tree.leaves(chunk)))]
        read = functools.partial(_read, methods)
        (states, out, handed), numbers = _run(read, (states, chunk), [*owners, *others])
        # What is proved for chunks of one size is proved again for this one.
        if len(set(zip(owners, numbers, strict=False))) > len(set(owners)):
            raise ValueError(
                f"a chunk of {q.shape[2]} tokens parts what is equal in the states of "
                "these methods: read them apart."
            )
        return _joined(states, joint.owners), out, handed

    def read_chunk(joint, q, k, v, lengths):
        return read_after(joint, q, k, v, lengths, None)[:2]

    again = next((one.reread for one in methods if one.reread), None)

    def read_again(joint, q, k, v, lengths):
        states, outs = list(apart(joint)), []
        for index, method in enumerate(methods):
            if method.reread:
                states[index], out = method.reread.prefill(
                    states[index], q, k, v, lengths
                )
                outs.append(out)
        return _joined(tuple(states), joint.owners), outs[0]

    def finish(joint):
        pairs = zip(methods, apart(joint), strict=True)
        return tuple(method.finish(own) for method, own in pairs)

    def decode(*arguments: Any, **named: Any) -> Any:
        del arguments, named
        raise TypeError("methods that read together decode one by one.")

    return Method(
        init=init,
        prefill=read_chunk,
        finish=finish,
        append=decode,
        inspect_step=decode,
        traffic=decode,
        exact_prompt=methods[0].exact_prompt,
        renumbers=all(method.renumbers for method in methods),
        reread=again and again._replace(prefill=read_again),
        hooks=_hooks(methods, read_after, is_told),
        repeats=all(method.repeats for method in methods),
    )


def _hooks(methods: tuple[Method, ...], read_after: Any, is_told: bool) -> Hooks:
    """The calls that methods want while they read, on a :class:`Joint` of them.

    A method is told where a question begins if it reads alone.
    """
    asked = methods[0].hooks.asked
    if asked is None or not is_told or len(methods) > 1:
        return Hooks(granule=methods[0].hooks.granule, prefill_after=read_after)

    def joined(state: State) -> Joint:
        return _joined((state,), Owners(tuple(range(len(_flat((state,))[0])))))

    def probe(joint, q, k, v, lengths):
        state, out = asked.probe(*apart(joint), q, k, v, lengths)
        return joined(state), out

    def close(joint):
        return joined(asked.close(*apart(joint)))

    def settle(joint):
        return joined(asked.settle(*apart(joint)))

    return Hooks(asked=asked._replace(probe=probe, close=close, settle=settle))


def _read(methods, given):
    """Returns the states of all methods behind a chunk, and the first one's output.

    It alone knows what the layer below handed up, and hands something up itself.
    """
    states, (q, k, v, lengths, below) = given
    found = []
    for method, own in zip(methods, states, strict=True):
        chunk, handed = (own, q, k, v, lengths), None if found else below
        # JAX remembers what it traced of a jitted function: once, in whatever group.
        if method.hooks.prefill_after is None:
            found.append((*jax.jit(method.prefill)(*chunk), handed))
        else:
            found.append(jax.jit(method.hooks.prefill_after)(*chunk, handed))
    return tuple(own for own, *_ in found), *found[0][1:]


def _run(function, given, inputs) -> tuple[Any, tuple[int, ...]]:
    """Returns what the function gives, and a number for each array of it.

    Arrays of equal numbers are equal, if those of `given` are whose `inputs` are.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(given)
    arrays = core.jaxpr_as_fun(program)(*jax.tree.leaves(given))
    numbers = value_numbers(program, list(inputs))
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays), numbers


def _owners(
    methods: tuple[Method, ...],
    spec: CacheSpec,
    states: tuple[State, ...],
    numbers: Sequence[Hashable],
    chunk_size: int,
) -> Owners:
    """Finds which arrays of new states stay equal while a prompt is read.

    Args:
        numbers: of each array, equal where they are equal now.
    """
    size = min(chunk_size, spec.capacity)
    size = size if spec.copies is None else spec.copies.rows(size)

    def rows(heads):
        shape = spec.batch, heads, size, spec.head_dim
        return jax.ShapeDtypeStruct(shape, spec.dtype)

    keys = rows(spec.num_kv_heads)
    lengths = jax.ShapeDtypeStruct((spec.batch,), jnp.int32)
    given = with_layer(states, 0), (rows(spec.num_q_heads), keys, keys, lengths, None)
    program = jax.make_jaxpr(functools.partial(_read, methods))(given)
    # A second reading writes to some states alone, and so does who is told a question:
    # nothing is taken from them.
    alone = [
        method.reread is not None or method.hooks.asked is not None
        for method, own in zip(methods, states, strict=True)
        for _ in jax.tree.leaves(own)
    ]
    pairs = zip(numbers, alone, strict=True)
    kinds = [(i if one else -1, number) for i, (number, one) in enumerate(pairs)]
    others = [("chunk", i) for i in range(4)]
    while True:
        behind = value_numbers(program, [*kinds, *others])
        parted = list(zip(kinds, behind, strict=False))
        if len(set(parted)) == len(set(kinds)):
            break
        names = {kind: number for number, kind in enumerate(dict.fromkeys(parted))}
        kinds = [names[kind] for kind in parted]
    arrays = iter(kinds)
    places, first = [], {}
    for place, leaf in enumerate(_flat(states)[0]):
        owner = place if leaf is None else first.setdefault(next(arrays), place)
        places.append(owner)
    return Owners(tuple(places))


def kept(
    methods: Sequence[Method], specs: Sequence[CacheSpec]
) -> list[dict[tuple[int, int], int]]:
    """Returns the bytes of all arrays that each method keeps while it reads a prompt.

    On an accelerator those in the host's memory are left out.

    Args:
        specs: one a layer.

    Returns:
        For each method its arrays' bytes by their names; one name is one array, if the
        methods read together.
    """
    found: list[dict[tuple[int, int], int]] = [{} for _ in methods]
    both = reader(tuple(methods))
    is_cpu = jax.default_backend() == "cpu"

    def count() -> None:  # traced: types tell memories only there
        for layer, spec in enumerate(specs):
            joint = both.init(spec)
            owners = iter(joint.owners.places)
            for own, state in zip(found, apart(joint), strict=True):
                for leaf, owner in zip(_flat(state)[0], owners, strict=False):
                    if leaf is not None and (is_cpu or not buffers.in_host(leaf)):
                        own[layer, owner] = leaf.size * leaf.dtype.itemsize

    jax.eval_shape(count)
    return found


class Together:
    """Prompts that several methods have read: what each of them decodes from."""

    def __init__(
        self,
        methods: Sequence[Method],
        read: Reading,
        prompts: Sequence[Sequence[int]],
        specs: tuple[CacheSpec, ...],
    ) -> None:
        self._methods, self._read = methods, read
        self._prompts, self._specs = prompts, specs

    def take(self, place: int) -> Prefilled:
        """Returns the prompts as the method at a place ends them, to be used up.

        The arrays are its own: they can be taken as often as they are needed.
        """
        method, states = self._methods[place], []
        for layer, joint in enumerate(self._read.states):
            own = jax.tree.map(jnp.copy, apart(joint)[place])
            states.append(finish_layer(method, own, layer))
        finished = self._read._replace(states=settled(method, tuple(states)))
        return ready(method, finished, self._prompts, self._specs)

    def drop(self) -> None:
        """Frees what was read: nothing can be taken any more."""
        self._read = self._read._replace(states=())


def read(
    model: LanguageModel,
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    **options: Any,
) -> Together:
    """Reads the prompts for all methods.

    `options` are those of :func:`kvjax.decoding.reader.prefill`.

    Raises:
        ValueError: as there.
    """
    check_model(model, on_one_device="reading for several methods")
    prompts, chosen = token_rows(prompts), Options(**options)
    check_prompts(model, as_one(methods), prompts, chosen.max_new_tokens)
    return read_checked(model, methods, prompts, chosen)


def as_one(methods: Sequence[Method]) -> Method:
    """Returns a method that takes the prompts that all of these take."""
    return methods[0] if len(methods) == 1 else reader(tuple(methods))


def read_checked(
    model: LanguageModel,
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    options: Options,
) -> Together:
    """Reads prompts as :func:`read` does, if others have checked that they fit."""
    longest = max(options.longest, *map(len, prompts))
    granule = methods[0].hooks.granule
    size = chunk_tokens(model.decoder, longest, options.chunk_size, granule)
    method = reader(tuple(methods), size, options.instruction is not None)
    reading, specs = read_unended(model, method, prompts, options)
    reading = reread(model, method, reading, prompts, longest)
    return Together(methods, reading, prompts, specs)
