"""Runs a method over random streams, as a model would; compares with the oracles."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from oracles import Row, Trace, entmax_attention, rotate, softmax_attention

from kvjax.interface import CacheSpec, Diagnostics, Method, State
from kvjax.rope import Rope

# What a padded token holds: any use of it shows.
PADDING = 1e4

# Largest relative error of one row, by dtype. Measured worst: 3e-6 and 1e-2.
ROW_TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


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
    """What a method gave: one entry a row for the prompt, one a step for the rest."""

    prompt_out: list[np.ndarray]  # per row (Hq, prompt, D)
    out: np.ndarray  # (steps, B, Hq, D), of the newest token
    diagnostics: Diagnostics  # fields with a leading axis of steps
    state: State


def make_stream(
    prompts, steps, *, heads=(4, 2), head_dim=8, seed=0, dtype="float32", sharpness=2.0
) -> Stream:
    """Random heads; `sharpness` scales the queries so that some keys clearly win."""
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


def make_spec(stream: Stream, capacity=None, dtype="float32", **overrides) -> CacheSpec:
    """A spec that fits the stream, with an odd capacity unless one is given."""
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
    }
    return CacheSpec(**(fields | overrides))


def chunk(stream: Stream, start, lengths, dtype="float32", *, size, padding=PADDING):
    """Tokens `[start[b], start[b] + lengths[b])` of each row, padded to `size`."""
    size = max(size, 1)
    arrays = []
    for x in stream[:3]:
        padded = np.full((*x.shape[:2], size, x.shape[3]), padding, np.float32)
        for b, (begin, count) in enumerate(zip(start, lengths, strict=True)):
            padded[b, :, :count] = x[b, :, begin : begin + count]
        arrays.append(jnp.asarray(padded.astype(jnp.dtype(dtype))))
    return (*arrays, jnp.asarray(lengths, jnp.int32))


def prefill(method: Method, spec: CacheSpec, stream: Stream, chunks=None):
    """The state before `finish`, and the prompt's outputs, one array a row.

    `chunks` lists `lengths (B,)` of each chunk; None means the prompt at once.
    """
    state, step, outs = method.init(spec), jax.jit(method.prefill), []
    for q, k, v, lengths in prompt_inputs(stream, chunks, spec.dtype):
        state, out = step(state, q, k, v, lengths)
        assert (out.dtype, out.shape) == (q.dtype, q.shape)
        outs.append(out)
    return state, _prompt_rows(stream, chunks, outs)


def prompt_inputs(stream: Stream, chunks=None, dtype="float32"):
    """q, k, v, lengths of each chunk, all padded to one size."""
    start, inputs = np.zeros(len(stream.prompts), int), []
    chunks = [stream.prompts] if chunks is None else chunks
    size = max(max(lengths) for lengths in chunks)
    for lengths in chunks:
        inputs.append(chunk(stream, start, lengths, dtype, size=size))
        start += np.asarray(lengths)
    assert tuple(start) == stream.prompts, "the chunks do not add up to the prompts"
    return inputs


def _prompt_rows(stream, chunks, outs):
    chunks = [stream.prompts] if chunks is None else chunks
    outs = [np.asarray(out).astype(np.float32) for out in outs]
    return [
        np.concatenate([x[b, :, : n[b]] for x, n in zip(outs, chunks, strict=True)], 1)
        for b in range(len(stream.prompts))
    ]


def step_inputs(stream: Stream, dtype="float32", rows=1):
    """q, k, v of the generated tokens, `(steps, B, H, rows, D)`.

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
        arrays.append(jnp.asarray(steps.astype(jnp.dtype(dtype))))
    return tuple(arrays)


def step(method: Method, state: State, inputs):
    """One token: append, then attend. The body of a scan."""
    q, k, v = inputs
    state, out, diagnostics = method.inspect_step(method.append(state, k, v), q)
    return state, (out, diagnostics)


def run(method: Method, spec: CacheSpec, stream: Stream, chunks=None) -> Run:
    """Prompt, finish and all steps, jitted as the decode loop would be."""

    state, prompt_out = prefill(method, spec, stream, chunks)

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


def attended_positions(attended: np.ndarray, num_q_heads: int) -> list[list[int]]:
    """`(H, N)` of one row, one sorted list of positions per query head."""
    group = num_q_heads // attended.shape[0]
    lists = [sorted(int(j) for j in head if j >= 0) for head in attended]
    return [lists[h // group] for h in range(num_q_heads)]


def assert_rows_close(actual, expected, dtype="float32", what=""):
    """Each vector along the last axis, by its own relative error."""
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert np.isfinite(actual).all(), f"{what}: not finite"
    if actual.size == 0:
        return
    error = np.linalg.norm(actual - expected, axis=-1)
    error = error / np.maximum(np.linalg.norm(expected, axis=-1), 1e-2)
    worst = np.unravel_index(error.argmax(), error.shape)
    tolerance = ROW_TOLERANCE[str(jnp.dtype(dtype))]
    assert error.max() <= tolerance, (
        f"{what}: row {tuple(map(int, worst))} is off by {error.max():.3g}"
    )


def assert_matches(run: Run, stream: Stream, oracle, dtype="float32", **options):
    """Outputs, attended positions and lse of every row and token equal the oracle's."""
    for b, prompt in enumerate(stream.prompts):
        trace: Trace = oracle(stream.row(b), **options)
        expected = trace.out[:prompt].swapaxes(0, 1)
        assert_rows_close(run.prompt_out[b], expected, dtype, f"prompt of row {b}")
        for i in range(stream.steps):
            where = f"row {b}, step {i}"
            attended = attended_positions(
                run.diagnostics.attended[i, b], stream.q.shape[1]
            )
            assert attended == trace.attended[prompt + i], where
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
    """Outputs and lse are the attention over exactly what `attended` lists.

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
                assert len(set(kept)) == len(kept) > 0, where
                assert kept[-1] <= t, f"{where}: sees the future"
                kv = h // row.group
                query = turn(row.q[h, t], t)
                out, lse, _ = attend(query, keys[kv, kept], row.v[kv, kept])
                assert_rows_close(run.out[i, b, h], out, dtype, where)
                given = run.diagnostics.lse[i, b, h, -1]
                assert abs(given - lse) < slack, where
                everything = slice(t + 1)
                whole, most, _ = attend(
                    query, keys[kv, everything], row.v[kv, everything]
                )
                assert given <= most + slack, f"{where}: more mass than there is"
                if run.diagnostics.exact[i, b, h]:
                    assert_rows_close(run.out[i, b, h], whole, dtype, where)
