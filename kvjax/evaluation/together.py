"""One prompt read for several methods: the model runs once, each method keeps its own.

Every method is given the queries, keys and values of the first one's run. For methods
of exact prompts (`Method.exact_prompt`) these are, to rounding, what their own run
would give them; a method of another kind leads, or reads alone.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from kvjax.decoding.options import Options
from kvjax.decoding.reader import Prefilled, prefill, read_whole, recent
from kvjax.interface import LanguageModel, Method


@functools.cache
def reader(methods: tuple[Method, ...]) -> Method:
    """A method that reads prompts for all `methods`; its state is theirs, a tuple.

    Its output is the first one's: what the others attend to while they read, XLA drops
    unless their states need it. It decodes nothing.

    Raises:
        ValueError: if some of them read a prompt again, each in another way.
    """
    ways = {(one.reread.chunk, one.reread.words) for one in methods if one.reread}
    if len(ways) > 1:
        raise ValueError(
            f"prompts are read again in {len(ways)} ways: read them apart."
        )

    def init(spec, weights=None):
        return tuple(method.init(spec, weights) for method in methods)

    def read_chunk(state, q, k, v, lengths):
        pairs = [
            method.prefill(own, q, k, v, lengths)
            for method, own in zip(methods, state, strict=True)
        ]
        return tuple(own for own, _ in pairs), pairs[0][1]

    again = next((one.reread for one in methods if one.reread), None)

    def read_again(state, q, k, v, lengths):
        states, outs = list(state), []
        for index, method in enumerate(methods):
            if method.reread:
                states[index], out = method.reread.prefill(
                    states[index], q, k, v, lengths
                )
                outs.append(out)
        return tuple(states), outs[0]

    def finish(state):
        pairs = zip(methods, state, strict=True)
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
    )


def read(
    model: LanguageModel,
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    **options: int,
) -> list[Prefilled]:
    """Reads the prompts for all methods; one :class:`Prefilled` a method, in order.

    `options` are those of :func:`kvjax.decoding.reader.prefill`.

    Raises:
        ValueError: as there.
    """
    both = prefill(model, reader(tuple(methods)), prompts, **options)
    return _apart(methods, both, prompts)


def read_checked(
    model: LanguageModel,
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    options: Options,
) -> list[Prefilled]:
    """Reads prompts as :func:`read` does, if others have checked that they fit."""
    both = read_whole(model, reader(tuple(methods)), prompts, options)
    return _apart(methods, both, prompts)


def _apart(
    methods: Sequence[Method], read: Prefilled, prompts: Sequence[Sequence[int]]
) -> list[Prefilled]:
    """Returns what was read for each method, from what was read for all."""
    return [
        read._replace(
            states=tuple(layer[index] for layer in read.states),
            recent=jnp.asarray(recent(prompts, method.rows)),
        )
        for index, method in enumerate(methods)
    ]
