"""Decode steps of a model: the right bytes, steps and ratios; no time is tested."""

import pytest
from tiny import tiny_model

from kvjax import accounting, registry
from kvjax.cost import bench_decode
from kvjax.stores.buffers import num_bytes

MODEL = tiny_model(num_layers=1)
SIZES = {"steps": 4, "repeats": 2, "copied": 4096}


def test_steps_are_counted_beside_what_they_must_read():
    specs = ["full", "streaming_llm:budget=16"]
    done = []
    rows = bench_decode.run(
        MODEL,
        specs,
        range(50),
        contexts=[96, 160],
        batch=2,
        progress=lambda name, share: done.append((name, share)),
        **SIZES,
    )
    assert [(row.method, row.context) for row in rows] == [
        (spec, context) for context in (96, 160) for spec in specs
    ]
    # All but the embedding, of which a step reads a line.
    weights = num_bytes(MODEL.params) - num_bytes(MODEL.params["embedding"])
    for row in rows:
        method = registry.parse(row.method)
        middle = row.context - 4
        cache = 2 * accounting.bytes_read(method, MODEL.decoder, middle, 13)
        assert row.cache_bytes == cache
        assert row.num_bytes == weights + cache
        assert row.low <= row.median <= row.high
        assert row.tokens_per_second == pytest.approx(2 / row.median)
        assert row.prompt_tokens_per_second > 0
    full, ring = rows[:2]
    assert full.times_full == 1
    assert ring.times_full == pytest.approx(full.median / ring.median)
    # One yardstick.
    assert full.floor / ring.floor == pytest.approx(full.num_bytes / ring.num_bytes)
    assert done[-1] == ("streaming_llm:budget=16, 160 tokens", 1.0)
    assert full.prompt_share == 1


@pytest.mark.parametrize("most", [None, 5000])
def test_what_is_copied_is_a_step_or_what_no_cache_holds(monkeypatch, most):
    class AskedError(Exception):
        pass

    def copies(num_bytes):
        raise AskedError(num_bytes)

    monkeypatch.setattr(bench_decode, "_copies", copies)
    if most is not None:
        monkeypatch.setattr(bench_decode, "MOST_COPIED", most)
    with pytest.raises(AskedError) as asked:
        bench_decode.run(MODEL, ["full"], [1, 2], contexts=[64], steps=4, repeats=2)
    step = bench_decode.weight_bytes(MODEL)
    step += accounting.bytes_read(registry.parse("full"), MODEL.decoder, 60, 13)
    assert asked.value.args == (most or step,)
    assert step > 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": [13]}, "context=13 must exceed the 13 tokens that are generated"),
        ({"contexts": [5000]}, "context=5000 exceeds the 4096 tokens"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"tokens": []}, "tokens is empty"),
    ],
)
def test_mistakes_come_before_the_work(change, message):
    options = {"tokens": [1, 2], "contexts": [64], **SIZES} | change
    tokens = options.pop("tokens")
    with pytest.raises(ValueError, match=message):
        bench_decode.run(MODEL, ["full"], tokens, **options)
