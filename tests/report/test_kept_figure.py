"""The picture shows what the methods attend to."""

import numpy as np
import oracles
import pytest
from tiny import TEXT, tiny_model

from kvjax.evaluation import kept_tokens
from kvjax.methods.cascade.method import cascade
from kvjax.methods.streaming_llm import streaming_llm
from kvjax.report.figures import kept


def test_what_is_held_and_what_is_drawn(tmp_path):
    model = tiny_model(num_layers=1)
    tokens = model.tokenizer.encode(TEXT)[:96]
    # Pushes alone: what one ring keeps needs no score.
    method = cascade(budget=16, num_sinks=3, num_cascades=1, stride=8)
    found = kept_tokens.kept(model, method, tokens, every=24, name="cascade")
    assert found.times == [24, 48, 72, 96]
    for time, held in zip(found.times, found.positions, strict=True):
        loop = oracles.CascadeRings(3, 1, 12)
        for token in range(time - 1):
            loop.insert(token, 0.0)
        assert held.tolist() == [*loop.kept(), time - 1]

    windows = [np.array([0, 1, *range(time - 14, time)]) for time in found.times]
    streaming = found._replace(name="streaming_llm", positions=windows)
    drawn = kept.density(streaming, 48)  # two tokens a column
    assert drawn.shape == (4, 48)
    assert drawn.mask[0].tolist() == [False] * 12 + [True] * 36
    assert drawn[3].tolist() == [1.0] + [0.0] * 40 + [1.0] * 7
    sheet = kept.figure([streaming, found], tmp_path / "kept.png")
    assert [axis.get_title() for axis in sheet.axes] == [
        "streaming_llm: 16 of 96 tokens",
        "cascade: 16 of 96 tokens",
    ]
    assert (tmp_path / "kept.png").stat().st_size > 5_000


def test_mistakes():
    model = tiny_model(num_layers=1)
    method = streaming_llm(budget=16)
    for options, message in [
        ({"every": 0}, r"every=0 must be in \[1, 4\]"),
        ({"every": 5}, r"every=5 must be in \[1, 4\]"),
        ({"every": 2, "layer": 1}, "layer=1: the model has 1 layers"),
        ({"every": 2, "head": 2}, "head=2: the model has 2 KV heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            kept_tokens.kept(model, method, [1, 2, 3, 4], **options)
    with pytest.raises(ValueError, match="results is empty"):
        kept.figure([])
