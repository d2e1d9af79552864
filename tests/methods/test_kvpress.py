"""The tokens that methods keep of a prompt, beside those that kvpress 0.5.5 keeps.

`tests/models/make_kvpress.py` recorded them, layer by layer and head by head. What is
not equal here is said in `docs/fidelity.md`.
"""

import json

import checkpoints
import jax.numpy as jnp
import make_kvpress
import numpy as np
import pytest
from make_kvpress import BUDGET, LENGTH
from tiny import ByteTokenizer

from kvjax import registry
from kvjax.decoding import reader
from kvjax.evaluation import together
from kvjax.interface import LanguageModel
from kvjax.methods import streaming_llm
from models import llama

OURS = {
    "snapkv": "window=8,kernel=5,pooling=mean,group_reduce=mean",
    "tova": "",
    "h2o": "group_reduce=mean",
    "knorm": "",
    "keydiff": "",
    "expected_attention": "num_sinks=4,future=512,epsilon=0.01",
}
EQUAL = ("snapkv", "knorm", "keydiff", "expected_attention")


@pytest.fixture(scope="module")
def theirs():
    with np.load(make_kvpress.GOLDENS) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Kept positions by method, `(L, Hkv, N)`; and what H2O counted, `(L, Hkv, S)`."""
    folder = checkpoints.write(tmp_path_factory.mktemp("kvpress"), make_kvpress.CONFIG)
    config = json.loads((folder / "config.json").read_text())
    decoder, params = llama.load(folder, config)
    methods = [
        registry.parse(f"{name}:{options}" if options else name, budget=BUDGET)
        for name, options in OURS.items()
    ]
    method = together.reader(tuple(methods))
    model = LanguageModel(decoder, params, ByteTokenizer())
    reading = reader.begin(decoder, method, 1, LENGTH, 0)
    parts = reader.chunks(decoder, [make_kvpress.prompt().tolist()], LENGTH)
    reading = reader.read(model, method, reading, parts)
    place = list(OURS).index("h2o")
    counted = [together.apart(layer)[place].scores[0] for layer in reading.states]
    layers = reader.finish_layers(method, reading.states)
    kept = {
        name: np.array([getattr(x, "kept", x).positions[0] for x in states])
        for name, states in zip(OURS, zip(*layers, strict=True), strict=True)
    }
    return kept, np.array(counted)[..., :LENGTH]


def test_the_goldens_are_of_the_release_that_is_named(theirs):
    assert theirs["versions"][0] == "kvpress 0.5.5"
    named = {"h2o": "observed"}
    for name in (*OURS, "streaming_llm"):
        kept = theirs[named.get(name, name)]
        assert kept.shape == (3, 2, BUDGET)


@pytest.mark.parametrize("name", EQUAL)
def test_the_same_tokens_stay_in_every_layer_and_head(name, ours, theirs):
    np.testing.assert_array_equal(ours[0][name], theirs[name])
    assert len(np.unique(theirs[name].reshape(-1, BUDGET), axis=0)) > 3  # not by rule


def test_of_tova_but_for_the_newest_which_kvpress_protects(ours, theirs):
    """Without it all that kvpress keeps is ours; where ours has it, all is equal."""
    for mine, heads in zip(ours[0]["tova"], theirs["tova"], strict=True):
        assert (heads == heads[0]).all()  # one set a layer
        assert LENGTH - 1 in heads[0]
        assert set(heads[0]) - {LENGTH - 1} <= set(mine[0])
        if LENGTH - 1 in mine[0]:
            np.testing.assert_array_equal(mine[0], heads[0])


def test_of_h2o_the_attention_received_which_kvpress_divides(ours, theirs):
    """Its observed attention is a mean over the queries that could attend, and protects
    nothing; H2O adds up, and half of its budget is recent."""
    queries = LENGTH - np.arange(LENGTH)
    means = ours[1] / queries
    best = np.sort(np.argsort(-means, axis=-1)[..., :BUDGET], axis=-1)
    np.testing.assert_array_equal(best, theirs["observed"])
    heaviest = np.argsort(-ours[1][..., : LENGTH - BUDGET // 2], axis=-1)
    recent = np.arange(LENGTH - BUDGET // 2, LENGTH)
    for mine, heavy in zip(
        ours[0]["h2o"].reshape(-1, BUDGET), heaviest.reshape(6, -1), strict=True
    ):
        assert set(mine) == {*heavy[: BUDGET // 2], *recent}


def test_of_streaming_llm_sinks_and_the_newest(theirs):
    options = streaming_llm.Options(BUDGET, 4)
    ring = streaming_llm.ring_positions(options, jnp.array([LENGTH], jnp.int32))
    mine = sorted([*range(4), *np.asarray(ring).ravel().tolist()])
    assert (theirs["streaming_llm"] == mine).all()
