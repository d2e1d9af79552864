"""Claims judged by recorded runs: what is read, and what is not measured without."""

import json
import re

import pytest

import kvjax
from kvjax.evaluation import claims
from kvjax.evaluation.claims import recorded, runner, session
from kvjax.evaluation.claims.claim import NotMeasuredError
from kvjax.evaluation.claims.papers import entmaxkv


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()

    def write(name, document):
        (folder / name).write_text(json.dumps(document))
        return folder

    return write


def reading(folder=None) -> session.Session:
    return session.session(kvjax.parse, kvjax.parse, "", quick=True, results=folder)


def test_the_newest_recorded_run_that_has_it_is_read(results):
    results("2026-01-01-toy.json", {"entries": [{"part": "a", "x": 1}]})
    results("2026-01-03-toy.json", {"entries": [{"part": "b", "x": 3}]})
    about = {"device": "cpu", "cores": 2}
    folder = results(
        "2026-01-02-toy.json", {"entries": [{"part": "a", "x": 2}], **about}
    )
    (found,) = recorded.entries(folder, "*-toy.json", "a")
    assert found.data["x"] == 2
    assert found.when == "2026-01-02, 2 cores"
    with pytest.raises(NotMeasuredError, match="part='c'"):
        recorded.entries(folder, "*-toy.json", "c")
    with pytest.raises(NotMeasuredError):
        recorded.entries(folder / "nowhere", "*-toy.json", "a")


def test_without_recorded_runs_what_needs_them_is_not_measured(tmp_path):
    shared = reading(tmp_path)
    names = ("entmax-gpu-softmax", "entmax-gpu-entmax", "refresh-training")
    names += ("refresh-training-text", "entmax-speed-softmax")
    names += ("refresh-speed", "retro-answers", "retro-time", "retro-window")
    names += ("retro-keys-window", "hip-speed", "squeezed-speed", "criti-gpu")
    names += ("subgen-bound",)
    rows = runner.run(claims.named([*names, "completion-text"]), shared)
    assert {row.verdict for row in rows} == {"not measured"}
    assert all(row.reason for row in rows)


def test_what_quick_leaves_out_says_so():
    names = ["cascade-perplexity", "entmax-text", "entmax-certificate"]
    names += ["squeezed-text", "squeezed-answers", "hip-text", "hip-refresh"]
    names += ["citrus-shared", "citrus-text", "criti-text"]
    names += ["refresh-attention-only", *(f"cascade-recall-{i}" for i in (1, 2, 4))]
    for row in runner.run(claims.named(names), reading()):
        assert row.verdict == "not measured"
        assert "--quick" in row.reason


def bench_document(backend, sparse):
    rows = [
        {"name": name, "context": context, "median": seconds}
        for context in (1024, 4096)
        for name, seconds in (
            ("full", 4.0 * context),
            ("entmax full", 6.0 * context),
            (entmaxkv.SPARSE, sparse),
        )
    ]
    manifest = {"arguments": ["bench", "kernels"], "backend": backend, "device": "H100"}
    return {"manifest": manifest, "rows": rows}


def test_speed_on_a_gpu_is_of_its_longest_context_and_of_a_gpu_alone(results):
    folder = results("2026-01-01-cpu.json", bench_document("cpu", 1.0))
    (row,) = runner.run(claims.named(["entmax-gpu-softmax"]), reading(folder))
    assert row.verdict == "not measured"
    folder = results("2026-01-02-gpu.json", bench_document("gpu", 4096.0))
    both = claims.named(["entmax-gpu-softmax", "entmax-gpu-entmax"])
    rows = runner.run(both, reading(folder))
    assert [row.found.value for row in rows] == [4.0, 6.0]
    assert [row.verdict for row in rows] == ["direction only"] * 2  # no spread
    assert rows[0].found.when == "2026-01-02, H100"
    (row,) = runner.run(claims.named(["entmax-speed-softmax"]), reading(folder))
    assert row.found.value == 4.0 * 4096  # of the CPU's file
    folder = results("2026-01-03-gpu.json", bench_document("gpu", 4.0 * 4096))
    (row,) = runner.run(both[:1], reading(folder))
    assert row.verdict == "not reproduced"


def test_training_is_judged_over_seeds_each_recipe_by_itself(results):
    def interval(mean):
        return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02, "n": 3}

    recorded_ = [
        {
            "part": "seeds",
            "source": source,
            "method": method,
            "training": training,
            "nats_above_control": interval(mean),
        }
        for training, source, method, mean in (
            ("the preset's mixture, rows of 1,024", "text", "full", 0.25),
            ("the preset's mixture, rows of 1,024", "text", "refreshkv:stride=5", 0.01),
            ("the preset's mixture, rows of 1,024", "chain", "refreshkv:stride=5", -9),
            ("text alone, rows of 512", "text", "full", 0.5),
            ("text alone, rows of 512", "text", "refreshkv:stride=5", -0.03),
        )
    ]
    folder = results("2026-01-01-refreshkv.json", {"entries": recorded_})
    mixture, alone = runner.run(
        claims.named(["refresh-training", "refresh-training-text"]), reading(folder)
    )
    assert mixture.found[:4] == pytest.approx((-0.01, -0.03, 0.01, 3))
    assert mixture.verdict == "not reproduced"
    assert "0.250 nats [0.230, 0.270] above their controls" in mixture.reason
    assert alone.found[:4] == pytest.approx((0.03, 0.01, 0.05, 3))
    assert alone.verdict == "reproduced"
    assert "0.500 nats" in alone.reason
    # Without what full attention loses by it, a gain is not told.
    folder = results("2026-01-01-refreshkv.json", {"entries": recorded_[-1:]})
    (row,) = runner.run(claims.named(["refresh-training-text"]), reading(folder))
    assert row.verdict == "not measured"


def test_what_never_differs_has_an_interval_all_the_same(results):
    """Twenty ties do not prove that the twenty-first example is one too."""
    chain = {
        "part": "chain",
        "method": "retro 2",
        "links": 20,
        "new_tokens": 99,
        "above_quest": {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 20},
    }
    folder = results("2026-01-01-retro.json", {"entries": [chain]})
    (row,) = runner.run(claims.named(["retro-answers"]), reading(folder))
    assert row.verdict == "not reproduced"
    assert -0.2 < row.found.low < -0.1
    assert 0.1 < row.found.high < 0.2
    same = {"mean": 1.0, "scores": [1.0] * 8}
    folder = results(
        "2026-01-01-entmaxkv.json",
        {"context": 64, "passkey": {"topk 8": same, "dense": same}},
    )
    (row,) = runner.run(claims.named(["entmax-answers"]), reading(folder))
    assert row.verdict == "direction only"


WINDOWS = ("retro-window", "retro-keys-window")


def test_the_repositorys_recorded_runs_are_found():
    shared = reading()
    names = (
        "completion-text",
        "entmax-answers",
        "refresh-training",
        "refresh-training-text",
        "refresh-speed",
    )
    rows = runner.run(claims.named([*names, "retro-answers", *WINDOWS]), shared)
    assert "not measured" not in [row.verdict for row in rows]
    assert all(re.match(r"\d{4}-\d\d-\d\d, ", row.found.when) for row in rows)
