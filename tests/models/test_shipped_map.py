"""The map that ships with an embedded model: whose it is, and what it is good for."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import models
from kvjax import registry
from kvjax.files import arrays
from kvjax.methods.topk_completion import feature_maps, map_files
from kvjax.training.feature_maps import distill
from models import embedded

MOST_BYTES = 4_000_000


@pytest.fixture(scope="module")
def model():
    return models.load(embedded.DEFAULT, dtype="float32")


def test_the_map_is_of_the_model_and_small(model):
    file = map_files.load(embedded.DEFAULT)
    path = embedded.path(embedded.DEFAULT) / map_files.SHIPPED
    assert path.stat().st_size < MOST_BYTES
    assert file.about["model"] == embedded.DEFAULT
    assert file.about["weights"] == arrays.digest(model.params)
    assert file.trained_length == 4096
    assert file.num_layers == model.decoder.num_layers
    spec = model.decoder.cache_spec(1, 64)
    for index in range(file.num_layers):
        map_files.check(file, *file.layer(index), spec)


def test_one_percent_of_its_length_holds_it(model):
    """Its matrices count as what they are, 16 bits: a step reads no more."""
    spec = model.decoder.cache_spec(1, 4096)
    spec = dataclasses.replace(spec, max_new_tokens=0)
    read = {}
    for options in ("lam=0", f"feature_map={embedded.DEFAULT}"):
        method = registry.parse(f"topk_completion:budget=41,{options}")
        read[options] = method.traffic(spec, 4096)
    alone, learned = read.values()
    matrices, biases, token = 3 * 704, 3 * 33, 2 * 64 * 4
    summary = 8 * 64 + 2 * 8
    extra = 2 * (2 * matrices + 4 * biases + 4 * summary)
    assert learned.metadata - alone.metadata == extra
    # 21 tokens beside sinks and tail; or 4 outliers and what the rest has room for.
    assert alone.kv == 2 * 41 * token
    assert learned.kv == 2 * (41 - math.ceil(extra / 2 / token)) * token


def test_a_model_without_a_map_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"'embedded-entmax' .*an embedded model with"):
        registry.parse("topk_completion:feature_map=embedded-entmax")


def test_it_lowers_the_error_on_text_that_no_model_has_seen(model):
    """Of every head that estimates; in the mean to less than half of selection's."""
    num_queries, num_sinks, tail, retrieved = 8, 4, 16, 20
    tokens = model.tokenizer.encode(embedded.heldout_text())[5000:6024]
    rows = np.array([tokens], np.int32)
    seen = distill.trace(model.decoder, model.params, rows, num_queries)
    file = map_files.load(embedded.DEFAULT)
    ell = feature_maps.mlp_features(file.weights.keys, seen.k)
    g = feature_maps.mlp_features(file.weights.queries, seen.q)
    k, v, q, ell, g = (np.float64(x) for x in (*seen, ell, g))

    scale = model.decoder.cache_spec(1, 1).sm_scale
    logits = scale * np.einsum("lhgqd,lhsd->lhgqs", q, k)
    estimate = jax.nn.logsumexp(
        g[..., None, :] + ell[:, :, None, None].astype(np.float32), axis=-1
    )
    slots, prompt = np.arange(len(tokens)), len(tokens) - num_queries
    visible = slots <= prompt + np.arange(num_queries)[:, None]
    middle = (slots >= num_sinks) & (slots < prompt - tail)
    ranked = np.sort(np.where(middle, logits, -np.inf), axis=-1)
    left = middle & (logits < ranked[..., -retrieved, None])

    def attention(weights):
        out = np.einsum("lhgqs,lhsd->lhgqd", weights, v)
        return out / weights.sum(-1, keepdims=True)

    exact = np.where(visible, np.exp(logits), 0)
    full = attention(exact)
    gain = file.gain.reshape(exact.shape[:3])[..., None, None]
    errors = []
    for rest in (0, gain * np.exp(np.float64(estimate))):
        gap = attention(np.where(left, rest, exact)) - full
        share = np.linalg.norm(gap, axis=-1) / np.linalg.norm(full, axis=-1)
        errors.append(share.mean(-1))
    alone, completed = errors
    assert alone.mean() > 0.1
    assert completed.mean() < 0.5 * alone.mean(), (completed.mean(), alone.mean())
    # Layer 0 looks at the newest tokens: nothing is left to estimate.
    assert alone[0].max() < 1e-6
    assert (file.gain[1:] == 1).all()
    assert (completed < alone)[1:].all(), (completed, alone)
