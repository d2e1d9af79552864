"""Full attention is exact, over every length, grouping and dtype."""

import drive
import numpy as np
import oracles
import pytest

from kvjax.methods.full import full
from pallas_kernels.entmax import reference


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)], ids=["G1", "G4", "G3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_float64_loops(heads, dtype):
    stream = drive.make_stream((1, 7, 16), 4, heads=heads, dtype=dtype)
    run = drive.run(full(), drive.make_spec(stream, dtype=dtype), stream)
    drive.assert_matches(run, stream, oracles.full, dtype)


def test_reads_to_the_last_slot():
    stream = drive.make_stream((12, 3), 4)
    run = drive.run(full(), drive.make_spec(stream, capacity=16), stream)
    drive.assert_matches(run, stream, oracles.full)
    assert run.diagnostics.refreshed.all()


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("chunks", [None, [(1, 5, 3), (0, 2, 13)]], ids=["one", "two"])
def test_entmax_equals_float64_loops(alpha, chunks):
    stream = drive.make_stream((1, 7, 16), 4, heads=(4, 2))
    spec = drive.make_spec(stream, alpha=alpha)
    run = drive.run(full(), spec, stream, chunks)
    drive.assert_matches(run, stream, oracles.full, alpha=alpha)
    weights = oracles.full(stream.row(2)), oracles.full(stream.row(2), alpha)
    assert np.abs(weights[0].out - weights[1].out).max() > 0.1  # not softmax


def test_entmax_prompts_go_in_parts(monkeypatch):
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 3 * 4 * 21 * 5 + 1)
    stream = drive.make_stream((1, 7, 16), 4, heads=(4, 2))
    spec = drive.make_spec(stream, capacity=21, alpha=1.5)
    run = drive.run(full(), spec, stream)
    drive.assert_matches(run, stream, oracles.full, alpha=1.5)


def test_long_prompts_take_the_blocked_path():
    """More than 64 rows a head over more than 1,024 slots: the online softmax."""
    stream = drive.make_stream((70, 1100), 1, heads=(2, 1), head_dim=4)
    spec = drive.make_spec(stream)
    chunks = [(70, 500), (0, 530), (0, 70)]
    run = drive.run(full(), spec, stream, chunks)
    reference = [
        _causal(stream.row(b), stream.prompts[b]) for b in range(len(stream.prompts))
    ]
    for actual, expected in zip(run.prompt_out, reference, strict=True):
        drive.assert_rows_close(actual, expected)


def _causal(row, prompt):
    """Causal attention by matrices, since a thousand tokens are too many for loops."""
    positions = np.arange(prompt)
    half = row.q.shape[-1] // 2
    angle = positions[:, None] * row.theta ** (-np.arange(half) / half)
    outs = []
    for h in range(row.q.shape[0]):
        kv = h // row.group
        q, k = (
            np.concatenate(
                [
                    x[:, :half] * np.cos(angle) - x[:, half:] * np.sin(angle),
                    x[:, half:] * np.cos(angle) + x[:, :half] * np.sin(angle),
                ],
                -1,
            )
            for x in (
                row.q[h, :prompt].astype(np.float64),
                row.k[kv, :prompt].astype(np.float64),
            )
        )
        logits = q @ k.T * row.q.shape[-1] ** -0.5
        logits[positions[:, None] < positions] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        outs.append(
            weights / weights.sum(-1, keepdims=True) @ row.v[kv, :prompt].astype(float)
        )
    return np.array(outs)
