"""What every method promises, over the registry: to register is to be tested.

Every buffer starts poisoned (`conftest.py`) and padding is huge, so that each
comparison also shows that nothing unwritten and nothing padded is read.
"""

import dataclasses
import functools
import inspect

import drive
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kvjax import accounting, registry
from kvjax.attention import partials
from kvjax.interface import CacheSpec, Diagnostics, Method, Traffic
from kvjax.rope import Rope
from kvjax.stores import buffers

# Small legal values, by the name of the option. An option with a large default that is
# missing here fails `test_has_small_options`, so that no method is tested idle.
SMALL = {"budget": 8, "page_size": 4, "window": 4, "kernel": 3, "num_sinks": 2}
SMALL |= {"stride": 4, "tail": 1, "features": 2, "calibration": 6}
LARGEST_DEFAULT = 8
SPECS = [*registry.names(), *(f"{name}+quest" for name in registry.transforms())]

# Lengths 1, page - 1, page, page + 1, and two that overflow the budget.
PROMPTS = (1, 3, 4, 5, 21, 18)
STEPS = 6
LAYER = 7  # beyond what `dense_layers` leaves dense by default


def spelled(spec: str, **overrides) -> str:
    """The spec string with small options, or with `overrides` where they apply."""
    parts = []
    for name in spec.split("+"):
        values = SMALL | overrides
        given = {key: values[key] for key in registry.options(name) if key in values}
        parts.append(f"{name}:" + ",".join(f"{k}={v}" for k, v in given.items()))
    return "+".join(parts)


def alpha_of(spec: str) -> float:
    """Of a model that the method takes: softmax's 1 if it can."""
    name = spec.split("+")[-1].partition(":")[0]
    return 1.0 if partials.suits(registry.get(name), 1.0) else 1.5


class Case:
    """One method on one stream, compiled once for all tests of a worker."""

    def __init__(self, text: str):
        self.method: Method = registry.parse(text)
        self.stream = drive.make_stream(PROMPTS, STEPS, head_dim=6)
        self.spec: CacheSpec = drive.make_spec(
            self.stream, layer=LAYER, alpha=alpha_of(text)
        )
        self.jitted_prefill = jax.jit(self.method.prefill)
        self.jitted_finish = jax.jit(self.method.finish)

    def prefill(self, stream=None, chunks=None):
        """All chunks padded to the longest prompt: one shape, one compilation."""
        stream = self.stream if stream is None else stream
        state, outs = self.method.init(self.spec), []
        start = np.zeros(self.spec.batch, int)
        chunks = [stream.prompts] if chunks is None else chunks
        for lengths in chunks:
            inputs = drive.chunk(stream, start, lengths, size=max(PROMPTS))
            state, out = self.jitted_prefill(state, *inputs)
            outs.append([out[b, :, :n] for b, n in enumerate(lengths)])
            start += np.asarray(lengths)
        assert tuple(start) == stream.prompts
        rows = [np.concatenate(row, axis=1) for row in zip(*outs, strict=True)]
        return state, rows

    def step_inputs(self, stream=None):
        stream = self.stream if stream is None else stream
        return drive.step_inputs(stream, rows=self.method.rows)

    @functools.cached_property
    def compiled_step(self):
        """One donated step, compiled ahead of time: it can never compile again."""
        state = jax.eval_shape(lambda: self.method.finish(self.method.init(self.spec)))
        inputs = [x[0] for x in self.step_inputs()]
        jitted = jax.jit(functools.partial(drive.step, self.method), donate_argnums=0)
        return jitted.lower(state, inputs).compile()

    def decode(self, state, stream=None):
        """All steps one by one; the state given is consumed."""
        inputs, results = self.step_inputs(stream), []
        for i in range(STEPS):
            state, result = self.compiled_step(state, [x[i] for x in inputs])
            results.append(result)
        return state, jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    def run(self, stream=None, chunks=None):
        state, prompt_out = self.prefill(stream, chunks)
        state, (out, diagnostics) = self.decode(self.jitted_finish(state), stream)
        return drive.Run(prompt_out, out[:, :, :, -1], diagnostics, state)

    @functools.cached_property
    def baseline(self):
        return self.run()


@functools.cache
def case_of(text: str) -> Case:
    return Case(text)


@pytest.fixture(params=SPECS)
def case(request) -> Case:
    return case_of(spelled(request.param))


def _same(actual, expected):
    """Equal positions, and floats equal to rounding."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if np.issubdtype(np.asarray(b).dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(a, b)


# --- shapes and names


@pytest.mark.parametrize("spec", SPECS)
def test_has_small_options(spec):
    for name in spec.split("+"):
        for key, option in registry.options(name).items():
            is_large = (
                isinstance(option.default, int) and option.default > LARGEST_DEFAULT
            )
            assert key in SMALL or not is_large, (
                f"{name}: give {key}={option.default} a small value in SMALL"
            )
    method = registry.parse(spelled(spec))
    rows = SMALL["window"] if spec.startswith("retro") else 1
    assert method.rows == rows


def test_arguments_have_the_same_names_everywhere(case):
    expected = {
        "init": ["spec", "weights"],
        "prefill": ["state", "q", "k", "v", "lengths"],
        "finish": ["state"],
        "append": ["state", "k", "v"],
        "inspect_step": ["state", "q"],
        "traffic": ["spec", "length"],
    }
    for field, names in expected.items():
        parameters = list(inspect.signature(getattr(case.method, field)).parameters)
        if field == "append":  # `contiguous.extend` also serves prefill
            parameters = parameters[1:3]
            names = names[1:]
        if field == "finish":
            names, parameters = names[1:], parameters[1:]
        assert parameters == names, field
    traffic = case.method.traffic(case.spec, 20)
    assert isinstance(traffic, Traffic)
    assert all(isinstance(x, int) and x >= 0 for x in traffic)


def test_a_step_leaves_the_state_as_it_was(case):
    """Structure, shapes, dtypes: what `lax.scan` and a second call of jit need."""

    def types(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)

    def trace(function, *arguments):
        return jax.eval_shape(function, *arguments)

    method, stream = case.method, case.stream
    empty = trace(functools.partial(method.init, case.spec))
    inputs = drive.chunk(stream, [0] * len(PROMPTS), PROMPTS, size=21)
    filled, out = trace(method.prefill, empty, *inputs)
    assert types(filled) == types(empty)
    assert (out.shape, out.dtype) == (inputs[0].shape, inputs[0].dtype)
    finished = trace(method.finish, filled)
    q, k, v = (x[0] for x in case.step_inputs())
    stepped, (out, diagnostics) = trace(
        functools.partial(drive.step, method), finished, (q, k, v)
    )
    assert types(stepped) == types(finished)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert isinstance(diagnostics, Diagnostics)
    spec = case.spec
    assert diagnostics.lse.shape == (spec.batch, spec.num_q_heads, method.rows)
    assert diagnostics.lse.dtype == jnp.float32
    assert diagnostics.attended.shape[0] == spec.batch
    assert diagnostics.attended.shape[1] in (spec.num_kv_heads, spec.num_q_heads)
    assert diagnostics.attended.dtype == jnp.int32
    assert (diagnostics.refreshed.shape, diagnostics.refreshed.dtype) == (
        (spec.batch,),
        jnp.bool_,
    )
    assert (diagnostics.exact.shape, diagnostics.exact.dtype) == (
        (spec.batch, spec.num_q_heads),
        jnp.bool_,
    )


# --- what is computed


@pytest.mark.parametrize("spec", SPECS)
def test_is_full_attention_when_the_budget_covers_the_context(spec):
    """To the last slot; a budget above the capacity; all query heads on one KV head."""
    stream = drive.make_stream((1, 4, 15), 5, heads=(4, 1), seed=1)
    method = registry.parse(spelled(spec, budget=24))
    alpha = alpha_of(spec)
    cache_spec = drive.make_spec(stream, capacity=20, layer=LAYER, alpha=alpha)
    run = drive.run(method, cache_spec, stream)
    drive.assert_matches(run, stream, oracles.full, alpha=alpha)
    assert run.diagnostics.exact.all()


@pytest.mark.parametrize("spec", SPECS)
def test_is_not_exact_where_it_rotates_keys_as_full_attention_does_not(spec):
    """Under `dynamic` RoPE frequencies go with the length: what is rotated anew, beyond
    the original context, is another model, and must not be called exact."""
    stream = drive.make_stream((3, 12), 6, heads=(4, 1), seed=1)
    alpha = alpha_of(spec)
    rope = Rope(8, theta=100.0, kind="dynamic", factor=4.0, original_context=8)
    cache_spec = drive.make_spec(
        stream, capacity=20, layer=LAYER, alpha=alpha, rope=rope
    )
    chunks = [(3, 8), (0, 4)]
    run = drive.run(
        registry.parse(spelled(spec, budget=24)), cache_spec, stream, chunks
    )
    full = "full" if alpha == 1 else "entmax_full"
    expected = drive.run(registry.parse(full), cache_spec, stream, chunks)
    gap = np.abs(run.out - expected.out).max(-1)
    exact = run.diagnostics.exact
    assert (gap[exact] < 1e-5).all()
    assert exact[:5, 0].all()  # up to the original context


def test_a_prompt_is_exact_where_the_method_says_so(case):
    """Methods read prompts together by this word of theirs: both ways it must be true,
    at budgets below the prompts."""
    alpha, furthest = case.spec.alpha, 0.0
    for b, prompt in enumerate(PROMPTS):
        expected = oracles.full(case.stream.row(b), alpha=alpha).out[:prompt]
        gap = np.abs(case.baseline.prompt_out[b] - expected.swapaxes(0, 1))
        furthest = max(furthest, gap.max())
    assert case.method.exact_prompt == (furthest < 1e-4)


def _unrotated(x, positions, length=None):
    """A model without positions: re-numbering them cannot matter."""
    del positions, length
    return x


@pytest.mark.parametrize("spec", SPECS)
def test_output_is_attention_over_what_was_attended(spec):
    stream = drive.make_stream((1, 5, 23), 6, heads=(6, 2), seed=2)
    # What else is estimated (`lam`) is no attention over tokens.
    method = registry.parse(spelled(spec, lam=0.0))
    alpha = alpha_of(spec)
    cache_spec = drive.make_spec(stream, layer=LAYER, rope=_unrotated, alpha=alpha)
    run = drive.run(method, cache_spec, stream)
    drive.assert_consistent(run, stream, "float32", False, alpha)


@pytest.mark.parametrize("name", registry.names())
def test_a_method_made_for_another_attention_says_so(name):
    """Before it returns something else; and `full` takes every model."""
    stream = drive.make_stream((1, 5), 1)
    method, alpha = registry.parse(spelled(name)), alpha_of(name)
    fitting = drive.make_spec(stream, layer=LAYER, alpha=alpha)
    other = dataclasses.replace(fitting, alpha=1.5 if alpha == 1 else 1.0)
    if name == "full":
        drive.assert_matches(
            drive.run(method, other, stream), stream, oracles.full, alpha=1.5
        )
        return
    message = {
        "entmax_full": "entmax_full with alpha=None takes the model's alpha, .* is 1.0",
        "entmaxkv": "entmaxkv approximates entmax .* softmax .alpha=1.0.; use quest",
    }.get(name, f"{name} approximates softmax .* entmax with alpha=1.5; use entmaxkv")
    for wrapped in (method, registry.parse("dense_layers+" + spelled(name))):
        with pytest.raises(ValueError, match=message):
            wrapped.init(other)
    method.init(fitting)
    assert name in registry.names(alpha)
    assert name not in registry.names(other.alpha)


# --- rows, chunks, loops


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 3, 2, 5, 10, 0), (1, 0, 2, 0, 10, 9), (0, 0, 0, 0, 1, 9)],
        [(1, 3, 4, 5, 20, 18), (0, 0, 0, 0, 1, 0), (0,) * 6],
        [(0, 1, 1, 1, 1, 1)] * 3 + [(1, 0, 1, 2, 18, 15)],
    ],
    ids=["ragged", "late", "singles"],
)
def test_chunks_of_the_prompt_change_nothing(case, chunks):
    chunked = case.run(chunks=chunks)
    _same(chunked.prompt_out, case.baseline.prompt_out)
    _same(chunked.out, case.baseline.out)
    _same(chunked.diagnostics.attended, case.baseline.diagnostics.attended)


def test_rows_do_not_see_each_other(case):
    """All other rows hold other tokens and lengths: row 4 keeps every bit."""
    other = drive.make_stream((5, 1, 20, 3, 21, 2), STEPS, head_dim=6, seed=9)
    for mine, theirs in zip(case.stream[:3], other[:3], strict=True):
        theirs[4] = mine[4, :, : theirs.shape[2]]
    run = case.run(other)
    np.testing.assert_array_equal(run.prompt_out[4], case.baseline.prompt_out[4])
    np.testing.assert_array_equal(run.out[:, 4], case.baseline.out[:, 4])
    assert not np.array_equal(run.out[:, 5], case.baseline.out[:, 5])


def test_a_scan_equals_the_loop(case):
    state, _ = case.prefill()
    step = functools.partial(drive.step, case.method)
    scan = jax.jit(lambda state, inputs: jax.lax.scan(step, state, inputs))
    _, (out, diagnostics) = scan(case.jitted_finish(state), case.step_inputs())
    _same(out[:, :, :, -1], case.baseline.out)
    _same(diagnostics.attended, case.baseline.diagnostics.attended)


def test_jit_equals_eager(case):
    """`finish` and a step; `decode_step` is `inspect_step` without diagnostics."""
    state, _ = case.prefill()
    method = case.method
    q, k, v = (x[0] for x in case.step_inputs())
    eager = method.finish(state)
    eager, out, diagnostics = method.inspect_step(method.append(eager, k, v), q)
    _same(out[:, :, -1], case.baseline.out[0])
    _same(diagnostics.attended, case.baseline.diagnostics.attended[0])
    same, plain = method.decode_step(method.append(case.jitted_finish(state), k, v), q)
    assert jax.tree.structure(same) == jax.tree.structure(eager)
    _same(plain, out)


def test_64_bits_change_nothing(case):
    """As under JAX_ENABLE_X64: no integer and no float of ours gets wider by it."""
    with jax.enable_x64(True):
        state, prompt_out = case.prefill()
        inputs, outs, attended = case.step_inputs(), [], []
        state = case.jitted_finish(state)
        step = jax.jit(functools.partial(drive.step, case.method))
        for i in range(STEPS):
            state, (out, diagnostics) = step(state, [x[i] for x in inputs])
            outs.append(out[:, :, -1])
            attended.append(diagnostics.attended)
    _same(prompt_out, case.baseline.prompt_out)
    _same(np.stack(outs), case.baseline.out)
    _same(np.stack(attended), case.baseline.diagnostics.attended)
    for wide, leaf in zip(
        jax.tree.leaves(state), jax.tree.leaves(case.baseline.state), strict=True
    ):
        assert wide.dtype == leaf.dtype


# --- memory and devices


def test_bytes_are_known_before_anything_is_allocated(case):
    state, _ = case.prefill()
    assert accounting.prompt_bytes(case.method, case.spec) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(state)
    )
    finished = case.jitted_finish(state)
    assert accounting.state_bytes(case.method, case.spec) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(finished)
    )


def test_a_step_writes_in_place(case):
    """Donated, the state's memory is the new state's: not one leaf is copied."""
    held = accounting.state_bytes(case.method, case.spec)
    assert case.compiled_step.memory_analysis().alias_size_in_bytes == held


def test_sharded_over_two_devices_is_the_same(case):
    """Each device decodes its rows; what it holds stays where it is."""
    devices = np.array(jax.devices("cpu")[:2])
    mesh = jax.sharding.Mesh(devices, ("data",))

    def split(x):
        axes = ("data",) + (None,) * (x.ndim - 1)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    state, _ = case.prefill()
    state = jax.tree.map(split, case.jitted_finish(state))
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    q, k, v = (split(x[0]) for x in case.step_inputs())
    step = jax.jit(functools.partial(drive.step, case.method))
    state, (out, diagnostics) = step(state, (q, k, v))
    _same(out[:, :, -1], case.baseline.out[0])
    _same(diagnostics.attended, case.baseline.diagnostics.attended[0])
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(before), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_a_spec_is_static_and_a_state_is_arrays_only(case):
    state = case.method.init(case.spec)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert hash(dataclasses.replace(case.spec)) == hash(case.spec)
    assert buffers.num_bytes(state) == accounting.prompt_bytes(case.method, case.spec)
