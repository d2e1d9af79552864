"""Retrieval heads by a method, streaming heads by sinks and a window."""

import json

import drive
import numpy as np
import oracles
import pytest

import kvjax
from kvjax import accounting
from kvjax.interface import Traffic
from kvjax.methods.duo import best_heads, duo
from kvjax.methods.full import full
from kvjax.methods.quest import quest
from kvjax.methods.tova import tova
from kvjax.stores.buffers import kv_bytes

NEAR = {"budget": 7, "num_sinks": 2}
# Four layers of four query heads; KV heads of two.
SCORES = [[0.1, 0.2, 0.9, 0.0], [0.3, 0.3, 0.2, 0.1], [0.0, 0.8, 0.7, 0.1], [0.0] * 4]


def scores_of(retrieval, heads):
    """One layer's scores, of which `retrieval` KV heads are the highest."""
    return [[float(kv in retrieval) for kv in range(heads)]]


@pytest.mark.parametrize(
    ("heads", "retrieval", "num_sinks"),
    [
        ((4, 2), {1}, 2),
        ((6, 3), {0, 2}, 0),
        ((3, 3), {2}, 1),  # an order that is not its own inverse
        ((4, 2), set(), 2),
        ((2, 1), {0}, 2),
    ],
)
def test_equals_float64_loops(heads, retrieval, num_sinks):
    """Rings that go round in the prompt and while decoding."""
    stream = drive.make_stream((1, 6, 8, 23), 12, heads=heads)
    options = NEAR | {"num_sinks": num_sinks}
    share = len(retrieval) / heads[1]
    method = duo(full(), heads=scores_of(retrieval, heads[1]), share=share, **options)
    spec = drive.make_spec(stream, num_layers=1)
    run = drive.run(method, spec, stream)
    drive.assert_matches(run, stream, oracles.duo, retrieval=retrieval, **options)


@pytest.mark.parametrize(
    "chunks",
    [[(3, 0, 8, 20), (3, 1, 5, 3)], [(1, 1, 1, 1), (5, 0, 12, 22)]],
    ids=["late", "first"],
)
def test_chunks_of_the_prompt_may_hold_sinks_and_rings(chunks):
    stream = drive.make_stream((6, 1, 13, 23), 3)
    method = duo(full(), heads=scores_of({1}, 2), **NEAR)
    run = drive.run(method, drive.make_spec(stream, num_layers=1), stream, chunks)
    drive.assert_matches(run, stream, oracles.duo, retrieval={1}, **NEAR)


def test_retrieval_heads_may_be_under_any_method():
    """Each head is the wrapped method's, or that of the window."""
    stream = drive.make_stream((20, 5), 6, heads=(4, 2))
    spec = drive.make_spec(stream, num_layers=1)
    run = drive.run(duo(tova(budget=5), heads=scores_of({0}, 2), **NEAR), spec, stream)
    drive.assert_consistent(run, stream)
    alone = drive.Stream(stream.q[:, :2], stream.k[:, :1], stream.v[:, :1], (20, 5), 6)
    first = drive.run(tova(budget=5), drive.make_spec(alone), alone)
    np.testing.assert_allclose(run.out[:, :, :2], first.out, atol=1e-6)
    # One that lists what every query head reads.
    query = quest(budget=8, page_size=4, per="query")
    run = drive.run(duo(query, heads=scores_of({1}, 2), **NEAR), spec, stream)
    assert run.diagnostics.attended.shape[2] == 4
    drive.assert_consistent(run, stream)


def test_a_kv_head_is_as_good_as_its_best_query_head():
    """The best of all layers together; ties go to the lower layer, the lower head."""
    scores = tuple(map(tuple, SCORES))
    assert best_heads(scores, 0.375, 2) == ((1,), (), (0, 1), ())
    assert best_heads(scores, 0.5, 2) == ((1,), (0,), (0, 1), ())
    assert best_heads(scores, 0.0, 2) == ((), (), (), ())
    assert best_heads(scores, 1.0, 2) == ((0, 1),) * 4
    assert best_heads(scores, 0.8, 2) == ((0, 1), (0, 1), (0, 1), ())
    # As many scores as KV heads.
    assert best_heads(scores, 0.25, 4) == ((2,), (0,), (1, 2), ())


def test_bytes_are_counted_head_by_head():
    stream = drive.make_stream((40,), 5, heads=(4, 2))
    method = duo(full(), heads=SCORES, share=0.5, **NEAR)
    for layer, count in enumerate((1, 1, 2, 0)):
        spec = drive.make_spec(stream, 64, layer=layer, num_layers=4)
        token = kv_bytes(spec, 1) // 2  # of one head
        read = count * 50 * token + (2 - count) * 7 * token
        assert method.traffic(spec, 50) == Traffic(read, 0)
        # Whose heads are which, and a clock for each kind.
        held = count * 64 * token + (2 - count) * 7 * token + 2 * 4
        held += 4 * ((count > 0) + (count < 2))
        assert accounting.state_bytes(method, spec) == held


def test_scores_come_from_the_file_of_kvjax_heads(tmp_path):
    file = tmp_path / "heads.json"
    other = [row[::-1] for row in SCORES]
    file.write_text(json.dumps({"needle_mass": SCORES, "retrieval": other}))
    stream = drive.make_stream((9,), 1)
    spec = drive.make_spec(stream, layer=1, num_layers=4)
    orders = [
        np.asarray(kvjax.parse(f"duo:heads={file}{more}+full").init(spec).order)
        for more in ("", ",score=retrieval")
    ]
    assert [order.tolist() for order in orders] == [[[0, 1]], [[1, 0]]]


def test_the_papers_numbers_by_default():
    """Half of the heads, without scores the first; 128 sinks, 256 of the newest."""
    stream = drive.make_stream((600,), 1)
    spec = drive.make_spec(stream, 1000)
    both = kv_bytes(spec, 1)
    assert duo(full()).traffic(spec, 1000).kv == (1000 + 384) * both // 2
    state = duo(full()).init(spec)
    assert state.streaming.k.shape[2] == 384
    assert state.order[0].tolist() == [0, 1]
    assert not duo(full()).exact_prompt
    assert duo(full(), share=1.0).exact_prompt


@pytest.mark.usefixtures("unchecked_shapes")
def test_mistakes_are_named(tmp_path):
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "odd.json").write_text('{"needle_mass": 3}')
    (tmp_path / "empty.json").write_text("")
    for options, message in (
        ({"share": 1.5}, "share=1.5 must be in .0, 1."),
        ({"share": float("nan")}, "share=nan must be in .0, 1."),
        ({"budget": 4, "num_sinks": 4}, r"num_sinks=4 must be in \[0, budget=4\)"),
        ({"num_sinks": -1}, r"num_sinks=-1 must be in \[0, budget=384\)"),
        ({"score": "sink"}, "score='sink' must be one of needle_mass, retrieval"),
        ({"heads": [[0.1], [0.1, 0.2]]}, r"heads has layers of \[1, 2\] scores"),
        ({"heads": []}, r"heads has layers of \[\] scores"),
        ({"heads": [[float("nan")]]}, "all must be finite"),
        (
            {"heads": str(tmp_path / "none.json")},
            "none.json' cannot be read .*; write it with: .* > .*none.json",
        ),
        ({"heads": str(tmp_path)}, r"is a folder.*; write it with: .* > heads.json$"),
        ({"heads": str(tmp_path / "empty.json")}, "empty.json' is no JSON .*; write"),
        ({"heads": str(tmp_path / "no.json")}, "has no scores 'needle_mass' .KeyError"),
        ({"heads": str(tmp_path / "odd.json")}, "has no scores 'needle_mass' .TypeErr"),
    ):
        with pytest.raises(ValueError, match=message):
            duo(full(), **options)
    with pytest.raises(ValueError, match=r"method.rows=2 must be 1"):
        duo(kvjax.parse("retro+quest"))
    stream = drive.make_stream((4,), 1)
    for scores, layers, message in (
        (
            [[0.1, 0.2, 0.3]],
            1,
            "scores of 3 heads, and the model has 4 query heads on 2",
        ),
        (SCORES, 3, "scores of 4 layers, and the model has 3"),
        (SCORES[:1], 0, "scores of 1 layers, and the model has more"),
    ):
        spec = drive.make_spec(stream, layer=int(layers == 0), num_layers=layers)
        with pytest.raises(ValueError, match=message):
            duo(full(), heads=scores).init(spec)
