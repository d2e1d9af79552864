"""Runs a method over random streams, as a model would; compares with an oracle."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.interface import CacheSpec, Diagnostics, Method, State
from kvjax.rope import Rope
from kvjax.testing.oracle import (
    Row,
    Trace,
    entmax_attention,
    rotate,
    softmax_attention,
)

NUM_LAYERS = 8  # of the model that a layer is said to be of
# What a padded token holds: any use of it shows.
PADDING = 1e4

# Largest relative error of one row, by dtype. Measured worst: 3e-6 and 1e-2.
ROW_TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}

Chunks = Sequence[Sequence[int]]  # `lengths (B,)` of every chunk of the prompt
REREAD = 6  # tokens of a prompt that a second reading takes at once


class ContractError(AssertionError):
    """A method does not do what every method does."""


class NothingToCheckError(Exception):
    """The machine, or the method, lacks what a check is about."""


def expect(holds: object, message: str) -> None:
    """Raises ContractError with the message unless something holds."""
    if not holds:
        raise ContractError(message)


def expect_same(actual: Any, expected: Any, what: str) -> None:
    """Raises unless positions are equal, and floats equal to rounding."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if np.issubdtype(np.asarray(b).dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=what)
        else:
            np.testing.assert_array_equal(a, b, err_msg=what)


class Stream(NamedTuple):
    """Un-rotated heads of `B` rows; row b has a prompt of `prompts[b]` tokens."""

    q: np.ndarray  # (B, Hq, T, D)
    k: np.ndarray  # (B, Hkv, T, D)
    v: np.ndarray  # (B, Hkv, T, D)
    prompts: tuple[int, ...]
    steps: int

    def row(self, b: int) -> Row:
        """Row `b` alone, for an oracle."""
        end = self.prompts[b] + self.steps
        return Row(*(x[b, :, :end] for x in self[:3]), prompt=self.prompts[b])


class Run(NamedTuple):
    """The results of a method: of the prompt one a row, of the rest one a step."""

    prompt_out: list[np.ndarray]  # per row (Hq, prompt, D)
    out: np.ndarray  # (steps, B, Hq, D), of the newest token
    diagnostics: Diagnostics  # fields with a leading axis of steps
    state: State


def make_stream(
    prompts: Sequence[int],
    steps: int,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    seed: int = 0,
    dtype: jax.typing.DTypeLike = "float32",
    sharpness: float = 2.0,
) -> Stream:
    """Draws random heads; `sharpness` scales the queries: some keys clearly win.

    Args:
        prompts: tokens of each row's prompt.
        steps: tokens generated after it.
        heads: query heads, key/value heads.
    """
    rng = np.random.default_rng(seed)
    batch, total = len(prompts), max(prompts) + steps
    num_q_heads, num_kv_heads = heads

    def draw(num_heads, scale=1.0):
        x = scale * rng.standard_normal((batch, num_heads, total, head_dim))
        return x.astype(jnp.dtype(dtype)).astype(np.float32)

    return Stream(
        draw(num_q_heads, sharpness),
        draw(num_kv_heads),
        draw(num_kv_heads),
        tuple(prompts),
        steps,
    )


def make_spec(
    stream: Stream,
    capacity: int | None = None,
    dtype: jax.typing.DTypeLike = "float32",
    **overrides: Any,
) -> CacheSpec:
    """Returns a spec that fits the stream, of odd capacity unless one is given."""
    batch, num_q_heads, total, head_dim = stream.q.shape
    fields = {
        "batch": batch,
        "num_q_heads": num_q_heads,
        "num_kv_heads": stream.k.shape[1],
        "head_dim": head_dim,
        "capacity": total + 1 - total % 2 if capacity is None else capacity,
        "dtype": dtype,
        "rope": Rope(head_dim),
        "max_new_tokens": stream.steps,
        "num_layers": NUM_LAYERS,
    }
    return CacheSpec(**(fields | overrides))


def chunk(
    stream: Stream,
    start: Any,
    lengths: Any,
    dtype: jax.typing.DTypeLike = "float32",
    *,
    size: int,
    padding: float = PADDING,
):
    """Returns tokens `[start[b], start[b] + lengths[b])` of rows, padded to `size`."""
    size = max(size, 1)
    arrays = []
    for x in stream[:3]:
        padded = np.full((*x.shape[:2], size, x.shape[3]), padding, np.float32)
        for b, (begin, count) in enumerate(zip(start, lengths, strict=True)):
            padded[b, :, :count] = x[b, :, begin : begin + count]
        arrays.append(jax.device_put(padded.astype(jnp.dtype(dtype))))
    return (*arrays, jax.device_put(np.asarray(lengths, np.int32)))


def one_layer(method: Method) -> Callable[..., tuple[State, jax.Array]]:
    """Returns `prefill(state, q, k, v, lengths)` of a layer with none below it."""

    def prefill(state, q, k, v, lengths):
        return method.prefill_layer(state, q, k, v, lengths)[:2]

    return prefill


def prefill(method: Method, spec: CacheSpec, stream: Stream, chunks=None):
    """Returns the state after one reading, and the prompt's outputs, an array a row.

    `chunks` lists `lengths (B,)` of each chunk; None means the prompt at once.
    """
    state, step, outs = method.init(spec), jax.jit(one_layer(method)), []
    for q, k, v, lengths in prompt_inputs(stream, chunks, spec.dtype):
        state, out = step(state, q, k, v, lengths)
        expect(
            (out.dtype, out.shape) == (q.dtype, q.shape),
            f"prefill returns {out.dtype}{out.shape} for queries {q.dtype}{q.shape}.",
        )
        outs.append(out)
    return state, _prompt_rows(stream, chunks, outs)


def reread(
    method: Method,
    state: State,
    stream: Stream,
    dtype: jax.typing.DTypeLike = "float32",
    prefill: Callable[..., Any] | None = None,
) -> State:
    """Returns the state after a second reading, if the method asks for one.

    A row's own prompt is read again, chunk by chunk, as if it were alone.

    Args:
        method: with `reread`, or without.
        state: before `finish`, of all the prompt.
        stream: whose prompts were read.
        dtype: of the heads.
        prefill: that of `method.reread`, compiled.
    """
    if method.reread is None:
        return state
    step = jax.jit(method.reread.prefill) if prefill is None else prefill
    for start, lengths in reread_chunks(stream):
        inputs = chunk(stream, start, lengths, dtype, size=REREAD)
        state, out = step(state, *inputs)
        wanted = inputs[0]
        expect(
            (out.dtype, out.shape) == (wanted.dtype, wanted.shape),
            f"the second reading returns {out.dtype}{out.shape} for queries "
            f"{wanted.dtype}{wanted.shape}.",
        )
    return state


def reread_chunks(stream: Stream):
    """Returns where the chunks of a second reading start, and their `lengths (B,)`."""
    prompts = np.asarray(stream.prompts)
    starts = range(0, max(stream.prompts), REREAD)
    return [
        (np.full(len(prompts), start), np.clip(prompts - start, 0, REREAD))
        for start in starts
    ]


def whole_granules(chunks: Chunks, granule: int) -> list[tuple[int, ...]]:
    """Moves the cuts of a prompt down to multiples of the granule, but for its end."""
    ends = np.cumsum(np.asarray(chunks), axis=0)
    moved = np.where(ends == ends[-1], ends, ends // granule * granule)
    lengths = np.diff(moved, axis=0, prepend=0)
    return [tuple(map(int, row)) for row in lengths]


def prompt_inputs(
    stream: Stream,
    chunks: Chunks | None = None,
    dtype: jax.typing.DTypeLike = "float32",
):
    """Returns q, k, v, lengths of each chunk, all padded to one size."""
    start, inputs = np.zeros(len(stream.prompts), int), []
    chunks = [stream.prompts] if chunks is None else chunks
    size = max(max(lengths) for lengths in chunks)
    for lengths in chunks:
        inputs.append(chunk(stream, start, lengths, dtype, size=size))
        start += np.asarray(lengths)
    if tuple(start) != stream.prompts:
        raise ValueError(f"{chunks=} must add up to the prompts, {stream.prompts}.")
    return inputs


def _prompt_rows(stream, chunks, outs):
    chunks = [stream.prompts] if chunks is None else chunks
    outs = [np.asarray(out).astype(np.float32) for out in outs]
    return [
        np.concatenate([x[b, :, : n[b]] for x, n in zip(outs, chunks, strict=True)], 1)
        for b in range(len(stream.prompts))
    ]


def step_inputs(stream: Stream, dtype: jax.typing.DTypeLike = "float32", rows: int = 1):
    """Returns q, k, v of the generated tokens, `(steps, B, H, rows, D)`.

    Each behind the generated tokens before it; rows without one are padding, also where
    a model would give the prompt's tokens again.
    """
    arrays = []
    for x in stream[:3]:
        shape = (stream.steps, *x.shape[:2], rows, x.shape[3])
        steps = np.full(shape, PADDING, np.float32)
        for b, n in enumerate(stream.prompts):
            for i in range(stream.steps):
                count = min(rows, i + 1)
                steps[i, b, :, rows - count :] = x[b, :, n + i + 1 - count : n + i + 1]
        arrays.append(jax.device_put(steps.astype(jnp.dtype(dtype))))
    return tuple(arrays)


def step(method: Method, state: State, inputs):
    """Appends one token, then attends: the body of a scan."""
    q, k, v = inputs
    state, out, diagnostics = method.inspect_step(method.append(state, k, v), q)
    return state, (out, diagnostics)


def run(method: Method, spec: CacheSpec, stream: Stream, chunks=None) -> Run:
    """Runs prompt, second reading, finish and all steps, jitted as decoding would."""
    state, prompt_out = prefill(method, spec, stream, chunks)
    state = reread(method, state, stream, spec.dtype)

    @jax.jit
    def decode(state, inputs):
        state = method.finish(state)
        return jax.lax.scan(lambda s, x: step(method, s, x), state, inputs)

    inputs = step_inputs(stream, spec.dtype, method.rows)
    state, (out, diagnostics) = decode(state, inputs)
    return Run(
        prompt_out,
        np.asarray(out)[:, :, :, -1].astype(np.float32),
        jax.tree.map(np.asarray, diagnostics),
        state,
    )


# --- comparing


def attended_positions(
    attended: np.ndarray | jax.Array, num_q_heads: int
) -> list[list[int]]:
    """Returns `(H, N)` of one row as a sorted list of positions per query head."""
    group = num_q_heads // attended.shape[0]
    lists = [sorted(int(j) for j in head if j >= 0) for head in attended]
    return [lists[h // group] for h in range(num_q_heads)]


def assert_rows_close(actual, expected, dtype="float32", what=""):
    """Raises unless each vector along the last axis is close, by relative error."""
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    expect(
        actual.shape == expected.shape,
        f"{what}: has shape {actual.shape} instead of {expected.shape}",
    )
    expect(np.isfinite(actual).all(), f"{what}: not finite")
    if actual.size == 0:
        return
    error = np.linalg.norm(actual - expected, axis=-1)
    error = error / np.maximum(np.linalg.norm(expected, axis=-1), 1e-2)
    worst = np.unravel_index(error.argmax(), error.shape)
    tolerance = ROW_TOLERANCE[str(jnp.dtype(dtype))]
    expect(
        error.max() <= tolerance,
        f"{what}: row {tuple(map(int, worst))} is off by {error.max():.3g}",
    )


def assert_matches(
    run: Run,
    stream: Stream,
    oracle: Callable[..., Trace],
    dtype: str = "float32",
    **options: Any,
) -> None:
    """Raises unless outputs, attended positions and lse are the oracle's, every one."""
    for b, prompt in enumerate(stream.prompts):
        trace: Trace = oracle(stream.row(b), **options)
        expected = trace.out[:prompt].swapaxes(0, 1)
        assert_rows_close(run.prompt_out[b], expected, dtype, f"prompt of row {b}")
        for i in range(stream.steps):
            where = f"row {b}, step {i}"
            attended = attended_positions(
                run.diagnostics.attended[i, b], stream.q.shape[1]
            )
            listed = trace.attended[prompt + i]
            expect(attended == listed, f"{where}: attended {attended}, not {listed}")
            assert_rows_close(run.out[i, b], trace.out[prompt + i], dtype, where)
            np.testing.assert_allclose(
                run.diagnostics.lse[i, b, :, -1],
                trace.lse[prompt + i],
                atol=2e-5 if dtype == "float32" else 5e-2,
                err_msg=where,
            )


def assert_consistent(
    run: Run, stream: Stream, dtype="float32", is_rotated=True, alpha=1.0
):
    """Raises unless outputs and lse are attention over exactly what `attended` lists.

    For keys rotated at their absolute positions, or not at all; which tokens were kept
    is not judged, except that no set can hold more mass than the whole.
    """

    def turn(x, position):
        return rotate(x, position) if is_rotated else x

    attend = softmax_attention
    if alpha != 1:
        attend = functools.partial(entmax_attention, alpha=alpha)
    num_q_heads = stream.q.shape[1]
    slack = 1e-4 if dtype == "float32" else 5e-2
    for b, prompt in enumerate(stream.prompts):
        row = stream.row(b)
        keys = np.array(
            [[turn(head[j], j) for j in range(row.num_tokens)] for head in row.k]
        )
        for i in range(stream.steps):
            t, where = prompt + i, f"row {b}, step {i}"
            heads = attended_positions(run.diagnostics.attended[i, b], num_q_heads)
            for h, kept in enumerate(heads):
                expect(kept, f"{where}: attended to nothing")
                expect(len(set(kept)) == len(kept), f"{where}: lists a token twice")
                expect(kept[-1] <= t, f"{where}: sees the future")
                kv = h // row.group
                query = turn(row.q[h, t], t)
                out, lse, _ = attend(query, keys[kv, kept], row.v[kv, kept])
                assert_rows_close(run.out[i, b, h], out, dtype, where)
                given = run.diagnostics.lse[i, b, h, -1]
                expect(abs(given - lse) < slack, f"{where}: lse {given}, not {lse}")
                everything = slice(t + 1)
                whole, most, _ = attend(
                    query, keys[kv, everything], row.v[kv, everything]
                )
                expect(given <= most + slack, f"{where}: more mass than there is")
                if run.diagnostics.exact[i, b, h]:
                    assert_rows_close(run.out[i, b, h], whole, dtype, where)
