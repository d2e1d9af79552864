"""A method with small options on one random stream, compiled once for all checks."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kvjax import registry
from kvjax.attention import partials
from kvjax.interface import CacheSpec, Method
from kvjax.registry import built_in
from kvjax.rope import Rope
from kvjax.testing import oracle, streams
from kvjax.testing.streams import Chunks, Run, Stream

# Small legal values, by the name of the option. An option with a larger default that is
# missing here must be given one, so that no method is tested idle.
SMALL = {"budget": 8, "page_size": 4, "window": 4, "kernel": 3, "num_sinks": 2}
SMALL |= {"stride": 4, "tail": 1, "features": 2, "calibration": 6, "every": 4}
SMALL |= {"future": 6, "chunk": 4, "instruction": 2, "rounds": 2}
SMALL |= {"query_block": 3, "segment": 4, "block": 4, "dense_tokens": 4}
# Where arrays lie is no part of the contract: all on the device.
SMALL |= {"cache": 4, "memory": "device"}
LARGEST_DEFAULT = 8
# What transforms are tried around: the first that they take.
WRAPPED = ("quest", "snapkv")

# Lengths 1, page - 1, page, page + 1, and two that overflow the budget.
PROMPTS = (1, 3, 4, 5, 21, 18)
STEPS = 6
LAYER = 7  # beyond what `dense_layers` leaves dense by default; the last


class Subject:
    """A factory's method with small options, and what it gives on one stream."""

    def __init__(self, factory: Callable[..., Method], **small: Any):
        registry.check_factory(factory, getattr(factory, "__name__", repr(factory)))
        self.factory = factory
        self.options = _keyword_only(factory)
        self.small = small
        if unknown := small.keys() - self.options.keys():
            raise ValueError(
                f"{self.name} has no option {', '.join(sorted(unknown))}; known: "
                f"{', '.join(self.options) or 'none'}."
            )
        # The attention of a model that the method takes: softmax if it can.
        self.alpha = 1.0 if partials.suits(factory, 1.0) else 1.5

    @property
    def name(self) -> str:
        """The factory's name."""
        return getattr(self.factory, "__name__", repr(self.factory))

    @property
    def has_budget(self) -> bool:
        """An option says how many tokens are read: of it, or of what it wraps."""
        return "budget" in self.options or self._takes("method")

    def _takes(self, argument: str) -> bool:
        return argument in inspect.signature(self.factory).parameters

    def make(self, **overrides: Any) -> Method:
        """Returns the method with small options, but those it has of `overrides`."""
        given = _among(self.options, SMALL | self.small | overrides)
        if self._takes("dense"):
            given["dense"] = built_in.full()
        if not self._takes("method"):
            return self.factory(**given)
        # Made of a spec, as on the command line: a transform may make more of its kind.
        small = SMALL | overrides
        *others, wrapped = (registry.parse(name, **small) for name in WRAPPED)
        for method in others:
            with contextlib.suppress(ValueError):
                return self.factory(method=method, **given)
        return self.factory(method=wrapped, **given)

    def covering(self, capacity: int) -> Method:
        """Returns the method with a budget of more tokens than the capacity."""
        page = self.small.get("page_size", SMALL["page_size"])
        return self.make(budget=(capacity // page + 1) * page)

    @functools.cached_property
    def method(self) -> Method:
        """The method with small options."""
        return self.make()

    @functools.cached_property
    def stream(self) -> Stream:
        """Heads of six rows, whose lengths are those of :data:`PROMPTS`."""
        return _stream()

    @functools.cached_property
    def spec(self) -> CacheSpec:
        """A layer that holds the stream."""
        return streams.make_spec(self.stream, layer=LAYER, alpha=self.alpha)

    @functools.cached_property
    def jitted_prefill(self) -> Callable[..., Any]:
        """`prefill`, compiled once."""
        return jax.jit(streams.one_layer(self.method))

    @functools.cached_property
    def jitted_reread(self) -> Callable[..., Any] | None:
        """The second reading, compiled once; None of methods that have none."""
        again = self.method.reread
        return None if again is None else jax.jit(again.prefill)

    @functools.cached_property
    def jitted_finish(self) -> Callable[..., Any]:
        """`finish`, compiled once."""
        return jax.jit(self.method.finish)

    def prefill(self, stream: Stream | None = None, chunks: Chunks | None = None):
        """Reads the prompts as often as the method asks for, up to `finish`.

        Every chunk is padded to the longest: one compilation.
        """
        stream = self.stream if stream is None else stream
        state, outs = self.method.init(self.spec), []
        start = np.zeros(self.spec.batch, int)
        for lengths in [stream.prompts] if chunks is None else chunks:
            inputs = streams.chunk(stream, start, lengths, size=max(PROMPTS))
            state, out = self.jitted_prefill(state, *inputs)
            out = np.asarray(out)
            outs.append([out[b, :, :n] for b, n in enumerate(lengths)])
            start += np.asarray(lengths)
        rows = [np.concatenate(row, axis=1) for row in zip(*outs, strict=True)]
        again = self.jitted_reread
        return streams.reread(self.method, state, stream, prefill=again), rows

    def step_inputs(self, stream: Stream | None = None):
        """Returns q, k, v of the generated tokens."""
        stream = self.stream if stream is None else stream
        return streams.step_inputs(stream, rows=self.method.rows)

    @functools.cached_property
    def compiled_step(self) -> Any:
        """One donated step, compiled ahead of time: it can never compile again."""
        state = jax.eval_shape(lambda: self.method.finish(self.method.init(self.spec)))
        inputs = [x[0] for x in self.step_inputs()]
        step = functools.partial(streams.step, self.method)
        return jax.jit(step, donate_argnums=0).lower(state, inputs).compile()

    def decode(self, state: Any, stream: Stream | None = None):
        """Takes all steps one by one; the state given is consumed."""
        inputs, results = self.step_inputs(stream), []
        for i in range(STEPS):
            state, result = self.compiled_step(state, [x[i] for x in inputs])
            results.append(result)
        return state, jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    def run(self, stream: Stream | None = None, chunks: Chunks | None = None) -> Run:
        """Runs prompt, finish and all steps."""
        state, prompt_out = self.prefill(stream, chunks)
        state, (out, diagnostics) = self.decode(self.jitted_finish(state), stream)
        return Run(prompt_out, out[:, :, :, -1], diagnostics, state)

    @functools.cached_property
    def baseline(self) -> Run:
        """The run that others are compared with."""
        return self.run()


def _stream() -> Stream:
    return streams.make_stream(PROMPTS, STEPS, head_dim=6)


@functools.cache
def attended_in_full(alpha: float) -> tuple[oracle.Trace, ...]:
    """Returns the traces of the rows of :attr:`Subject.stream` under full attention."""
    rows = map(_stream().row, range(len(PROMPTS)))
    return tuple(oracle.full(row, alpha=alpha) for row in rows)


@functools.lru_cache(maxsize=4)  # that of `full` is asked for again and again
def turning_run(method: Method, alpha: float) -> Run:
    """Runs a method under a rotation that changes once eight tokens are there."""
    stream = streams.make_stream((3, 12), 6, heads=(4, 1), seed=1)
    rope = Rope(8, theta=100.0, kind="dynamic", factor=4.0, original_context=8)
    spec = streams.make_spec(stream, capacity=20, layer=LAYER, alpha=alpha, rope=rope)
    return streams.run(method, spec, stream, chunks=[(3, 8), (0, 4)])


def _keyword_only(factory: Callable[..., Method]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _among(options: dict[str, inspect.Parameter], values: dict[str, Any]) -> dict:
    return {key: values[key] for key in options if key in values}
