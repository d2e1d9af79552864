"""Claims of the systems beside RefreshKV: against loops, planted, or from records."""

import json

import jax
import numpy as np
import pytest
from tiny import TEXT, tiny_model

import kvjax
from kvjax.evaluation import claims
from kvjax.evaluation.claims import runner, session
from kvjax.evaluation.claims.measure import asked, layers, texts
from kvjax.evaluation.claims.measure.steps import Driven
from kvjax.evaluation.claims.papers import critiprefill, hip, squeezed, subgen
from kvjax.interface import CacheSpec
from kvjax.methods.subgen import bound
from kvjax.rope import Rope

MODEL = tiny_model(num_layers=1)
SIZES = session.QUICK._replace(
    layer_context=160,
    layer_windows=2,
    layer_steps=4,
    context=128,
    windows=2,
    text_steps=32,
    examples=3,
    cache=32,
    cascade_stride=32,
    cascade_context=160,
    cascade_windows=2,
    thorough=True,
)


def toy(results=None, **changes) -> session.Session:
    return session.session(
        lambda name: MODEL,
        kvjax.parse,
        TEXT * 4,
        sizes=SIZES._replace(**changes),
        results=results,
    )


NOISE = 1e-3 * np.array([[-1.0, 1.0] * 4])  # of windows: what has none is not known


def judged(name, shared):
    (row,) = runner.run(claims.named([name]), shared)
    return row


@pytest.fixture(scope="module")
def shared():
    return toy()


# Squeezed Attention.


def test_what_is_fixed_is_counted_and_the_centroids_as_half():
    """Planted: of 146 fixed tokens some are listed by each of two KV heads."""
    verdicts = []
    for listed in (30.0, 146.0):
        shared, tail = toy(), 10
        dense = tail + 2.5  # of four steps, each of which has one more
        sums = layers.Sums(
            *[np.zeros((1, 8, 4))] * 4, 2 * (dense + listed + NOISE), None
        )
        spec = squeezed._spec(160, 0.7)
        assert spec == "squeezed:sparsity=0.7,budget=160,tail=10"
        shared.done["layers", session.SOFTMAX, spec] = layers.Layers(sums, None, 1.0)
        row = judged("squeezed-reads", shared)
        assert row.found.value == pytest.approx((listed + 7 / 2) / 146)
        verdicts.append(row.verdict)
    assert verdicts == ["reproduced", "not reproduced"]


def test_a_threshold_of_the_model_reads_what_it_says(shared):
    """The layer alone: about 30% of the fixed tokens, by the method itself."""
    found = judged("squeezed-reads", shared).found
    assert 0.15 < found.details["of them read"] < 0.5
    assert found.value - found.details["of them read"] == pytest.approx(7 / 2 / 146)


# HiP.


def test_the_papers_spelling_fits_the_model():
    spec = hip._spec(toy())
    assert spec == "refresh:stride=8+hip:budget=16,page_size=4,per=query"
    kvjax.parse(spec)
    deep = toy()._replace(models={session.SOFTMAX: "deep"})
    deep.done["model", "deep"] = tiny_model(num_layers=30)
    assert hip._spec(deep, stride=1).startswith("dense_layers:first=2+hip:")


# SubGen.


def greedy(x, count):
    """Radius of greedy centres over the spread, of vectors `(S, D)` in float64."""
    x = np.asarray(x, np.float64)
    near = np.full(len(x), np.inf)
    place = 0
    for _ in range(count):
        near = np.minimum(near, ((x - x[place]) ** 2).sum(-1))
        place = int(near.argmax())
    spread = np.sqrt(((x - x.mean(0)) ** 2).sum(-1).mean())
    return np.sqrt(near.max()) / spread


def test_spreads_are_those_of_loops(shared):
    spec = CacheSpec(1, 2, 2, 8, 24, "float32", Rope(8))
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((2, 2, 24, 8), np.float32) for _ in range(2))
    v[:, :, 5:] = v[:, :, :1]  # few values: they cluster
    given = layers.Inputs(k, k, jax.device_put(v))
    keys, values = np.array(subgen.spreads(spec, given._replace(k=jax.device_put(k))))
    places = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    turned = np.asarray(spec.rope(*map(jax.device_put, (k, places))))
    for head in np.ndindex(2, 2):
        assert keys[head] == pytest.approx(greedy(turned[head], 16), rel=1e-4)
    np.testing.assert_allclose(values, 0.0, atol=1e-3)
    # The tokens that are no candidates are none of the mean either.
    first = np.tile(np.arange(24) < 12, (2, 2, 1))
    run = jax.jit(bound.radius_over_spread, static_argnums=2)
    found = run(*map(jax.device_put, (k, first)), 3)
    for head in np.ndindex(2, 2):
        assert found[head] == pytest.approx(greedy(k[head][:12], 3), rel=1e-4)


def test_each_window_is_that_of_layers(shared):
    """The sign, and windows as samples: what `subgen-clusters` tells."""
    given = layers.inputs(shared, session.SOFTMAX)
    flat = toy()
    v = np.zeros(given.v.shape, np.float32)
    v[:, :, ::2] = 1.0  # two values: they cluster most
    flat.done["layers", session.SOFTMAX] = given._replace(v=jax.device_put(v))
    row = judged("subgen-clusters", flat)
    assert (row.found.n, row.verdict) == (2, "not reproduced")
    assert row.found.value == pytest.approx(-np.mean(row.found.details["keys"]))


# CritiPrefill.


def test_common_blocks_are_those_of_loops():
    spec = CacheSpec(1, 4, 2, 8, 160, "float32", Rope(8))
    rng = np.random.default_rng(1)
    shapes = (1, 4, 160, 8), (1, 2, 160, 8)
    q, k = (2 * rng.standard_normal(shape, np.float32) for shape in shapes)
    given = layers.Inputs(jax.device_put(q), jax.device_put(k), jax.device_put(k))
    places = np.arange(160, dtype=np.int32)[None]
    places = jax.device_put(places)
    turned = [np.asarray(spec.rope(x, places), np.float64)[0] for x in given[:2]]

    def best(head, place):  # one block of five: more than an eighth
        logits = turned[1][head // 2, :80] @ turned[0][head, place] * 8**-0.5
        weights = np.exp(logits - logits.max())
        return weights.reshape(5, 16).sum(1).argmax()

    def share(pairs):
        return np.mean([best(h, a) == best(h, b) for h in range(4) for a, b in pairs])

    near, far = critiprefill.common(spec, given)
    assert near == pytest.approx(share([(80 + i, 100 + i) for i in range(20)]))
    assert far == pytest.approx(share([(80 + i, 120 + i) for i in range(40)]))


def test_queries_nearby_are_held_against_those_far_apart(monkeypatch):
    both = [[0.9, 0.2], [0.8, 0.3]]
    monkeypatch.setattr(layers, "each_window", lambda *arguments: both)
    row = judged("criti-locality", toy())
    assert (row.found.value, row.verdict) == (pytest.approx(0.6), "direction only")
    assert row.found.details == pytest.approx({"in a segment": 0.85, "far apart": 0.25})


def test_few_layers_of_the_embedded_model_are_sparse():
    options = "segment=64,block=16,budget=16,dense_tokens=128,first="
    assert critiprefill._spec(toy(), 128) == f"critiprefill:{options}2+full"
    others = toy()._replace(models={session.SOFTMAX: "mine"})
    assert critiprefill._spec(others, 128) == f"critiprefill:{options}1+full"


# Answers and text.


def found_by(monkeypatch, **scores):
    """Plants what methods find, by the beginning of their specs."""

    def retrieved(shared, model, spec, *, question):
        asked_when.append(question)
        return np.array(scores[spec.split(":")[0].split("+")[-1]])

    asked_when = []
    monkeypatch.setattr(asked, "retrieved", retrieved)
    return asked_when


def test_what_is_found_is_held_against_what_another_finds(monkeypatch):
    more, less = [1.0] * 18 + [0.0] * 2, [0.0] * 15 + [1.0] * 5
    seen = found_by(monkeypatch, subgen=more, citrus=more, h2o=less, streaming_llm=less)
    for name in ("subgen-h2o", "subgen-streaming", "citrus-h2o"):
        row = judged(name, toy())
        assert (row.found.value, row.verdict) == (pytest.approx(0.65), "reproduced")
    assert set(seen) == {"seen"}
    seen.clear()
    assert judged("citrus-streaming-after", toy()).verdict == "reproduced"
    assert set(seen) == {"after"}
    found_by(monkeypatch, subgen=less, h2o=more)
    assert judged("subgen-h2o", toy()).found.value == pytest.approx(-0.65)


def test_nothing_can_be_lost_of_what_full_attention_does_not_find(monkeypatch):
    some, none = [1.0, 0.0] * 10, [0.0] * 20
    seen = found_by(monkeypatch, squeezed=none, full=some)
    row = judged("squeezed-answers-after", toy())
    assert (row.found.value, row.verdict) == (pytest.approx(-0.5), "not reproduced")
    assert set(seen) == {"after"}
    found_by(monkeypatch, squeezed=none, full=none)
    row = judged("squeezed-answers-after", toy())
    assert row.verdict == "not measured"
    assert "full attention finds 0% of the needles" in row.reason


def test_embedded_models_are_asked_what_they_were_trained_on(monkeypatch):
    tasks = []

    def scores(shared, model, task, method, *, question):
        tasks.append(task)
        return np.zeros(3)

    monkeypatch.setattr(asked, "asked_scores", scores)
    shared = toy()
    assert asked.retrieved(shared, "m", "full", question="seen").shape == (6,)
    asked.retrieved(shared._replace(models={}), "m", "full", question="seen")
    assert tuple(tasks) == (*asked.NEEDLES, *asked.RETRIEVAL)


def test_nats_lost_are_those_of_the_method():
    shared = toy()
    nats = {"full": 1.0, hip._spec(shared, stride=1): 1.01, hip._spec(shared): 1.5}
    for spec, each in nats.items():
        log_probs = np.array([[-9.0, -each, -each], [-9.0, -each - 1, -each - 1]])
        shared.done["text", session.SOFTMAX, spec] = Driven(None, log_probs, None, None)
    assert judged("hip-text", shared).found.value == pytest.approx(0.5)
    assert judged("hip-refresh", shared).found.value == pytest.approx(0.49)


def test_text_that_is_read_is_scored_under_the_method(shared):
    """Sparse segments lose something, what covers the text nothing."""
    spec = "critiprefill:segment=16,block=16,budget=16,first=0,dense_tokens={}+full"
    sparse, dense = spec.format(0), spec.format(160)
    found = texts.nats_above_while_read(shared, sparse)
    assert abs(found.value) > 1e-4
    same = texts.nats_above_while_read(shared, dense)
    assert same.value == pytest.approx(0.0, abs=1e-5)


# Counted, and from records.


def test_what_is_counted_needs_no_run():
    rows = {
        name: judged(name, toy())
        for name in ("squeezed-lookup-bytes", "subgen-memory", "citrus-memory")
    }
    assert (
        rows["subgen-memory"].verdict == rows["citrus-memory"].verdict == "reproduced"
    )
    assert rows["squeezed-lookup-bytes"].verdict == "direction only"
    assert 0.976 < rows["squeezed-lookup-bytes"].found.value < 1
    # As the method's own specification counts: .10 of the keys, .025 or less to choose.
    flat, two = rows["squeezed-lookup-bytes"].found.details["bytes"]
    full = 2 * 8 * 128 * 2 * 131_072
    assert 0.12 < two / full < flat / full < 0.14
    # 2.91 for 32 layers of which one is dense, by the same sums written out.
    assert critiprefill.times_fewer(toy(), 131_072) == pytest.approx(2.9, abs=0.1)


def write(folder, name, document):
    (folder / name).write_text(json.dumps(document))


def test_records_are_read_by_whom_they_are_of(tmp_path):
    shared = toy(tmp_path)
    about = {"device": "cpu", "cores": 2}
    steps = [
        {"part": "decode", "method": name, "length": length, "microseconds": time}
        for length, pair in ((32_768, (8.0, 4.0)), (65_536, (9.0, 1.0)))
        for name, time in zip(("full", "hip"), pair, strict=True)
    ]
    write(tmp_path, "2026-01-01-hip.json", {"entries": steps, **about})
    row = judged("hip-speed", shared)
    assert (row.found.value, row.found.when) == (2.0, "2026-01-01, 2 cores")
    times = {"part": "steps", "method": "squeezed", "times_as_fast_as_full": [5.0, 6.0]}
    entries = [times | {"keys": 64}, times | {"keys": 32, "times_as_fast_as_full": [9]}]
    write(tmp_path, "2026-01-01-squeezed.json", {"entries": entries, **about})
    assert judged("squeezed-speed", shared).found.value == 5.5
    rows = [{"length": 8, "layer_ratio": 9.0}, {"length": 16, "layer_ratio": 3.0}]
    write(tmp_path, "2026-01-01-critiprefill.json", {"device": "cpu", "rows": rows})
    row = judged("criti-gpu", shared)
    assert row.verdict == "not measured"
    assert "an 8B model takes 2.9 times fewer operations" in row.reason
    write(tmp_path, "2026-01-02-critiprefill.json", {"device": "A100", "rows": rows})
    row = judged("criti-gpu", shared)
    assert (row.found.value, row.found.when) == (3.0, "2026-01-02, A100")


def test_the_bound_is_that_of_the_model_that_is_asked_about(tmp_path):
    def entry(name, share):
        numbers = {"nats": [1.0], "least_nats": 4.0, "log_n": 7.6, "folded": 9}
        return {"model": name, "exponent_below_log_n": share, **numbers}

    entries = [entry("mine", 0.25), entry(session.SOFTMAX, 0.0)]
    write(tmp_path, "2026-01-01-subgen.json", {"entries": entries})
    shared = toy(tmp_path)
    row = judged("subgen-bound", shared)
    assert (row.found.value, row.verdict) == (0.0, "not reproduced")
    assert "The exponent is at least 8.0 nats, and log n 7.6." in row.reason
    mine = shared._replace(models={session.SOFTMAX: "mine"})
    assert judged("subgen-bound", mine).found.value == 0.25
    others = shared._replace(models={session.SOFTMAX: "theirs"})
    row = judged("subgen-bound", others)
    assert "benchmarks/subgen.py --model theirs --json FILE" in row.reason
