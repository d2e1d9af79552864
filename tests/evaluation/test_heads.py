"""Heads whose attention is known exactly have the known numbers."""

import dataclasses
import json
import math
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ByteTokenizer, PairTokenizer, dense, tiny_model

from kvjax.evaluation import heads
from kvjax.interface import CacheSpec, LanguageModel
from kvjax.report.figures import heads as figures_heads
from kvjax.rope import Rope

# No digit, so that a pair of digits is the needle's or the answer's.
TEXT = "".join(f"{'abcdefgh'[i % 8] * (i % 5 + 2)} and so on\n" for i in range(120))
SIGNS = np.random.default_rng(0).choice([-1.0, 1.0], (3, 512, 64)).astype(np.float32)
SHARP = np.float32(4.0)  # 64 * 4 for a match, far less for anything else
SINK, PREVIOUS, UNIFORM, COPIES = range(4)


@dataclasses.dataclass(frozen=True)
class Made:
    """Two layers of four heads that attend to what their names say.

    The second layer has the heads in another order: its KV heads are swapped.
    """

    alpha: float = 1.0
    context: int = 256
    num_layers: int = 2
    vocab_size: int = 260

    def cache_spec(self, batch, capacity, max_new_tokens=0, layer=0):
        return CacheSpec(
            batch=batch,
            num_q_heads=4,
            num_kv_heads=2,
            head_dim=64,
            capacity=capacity,
            dtype=jnp.float32,
            rope=lambda x, positions, length=None: x,
            max_new_tokens=max_new_tokens,
            layer=layer,
            sm_scale=1.0,
            alpha=self.alpha,
        )

    def hidden(self, params, tokens, attention):
        places, first, second = jnp.asarray(SIGNS)
        (row,) = tokens
        length = len(row)
        at = places[:length]
        pair = first[row] * second[jnp.roll(row, 1)]  # this token after the last one
        following = first[jnp.roll(row, -1)] * second[row]
        queries = [
            jnp.broadcast_to(at[0], at.shape),
            jnp.roll(at, 1, axis=0),
            jnp.zeros_like(at),
            following,
        ]
        q = SHARP * jnp.stack(queries)[None]
        k = jnp.stack([at, pair])[None]
        v = jnp.zeros_like(k)
        attention(0, q, k, v)
        order = jnp.array([UNIFORM, COPIES, SINK, PREVIOUS])
        return attention(1, q[:, order], k[:, ::-1], v)


def made(**options):
    return LanguageModel(Made(**options), {}, ByteTokenizer(), name="made")


def both_layers(values):
    swapped = [values[i] for i in (UNIFORM, COPIES, SINK, PREVIOUS)]
    return np.array([values, swapped])


def see(model, **options):
    return heads.inspect(
        model, TEXT, **({"context": 200, "windows": 2, "prompts": 3} | options)
    )


@pytest.fixture(scope="module")
def softmax():
    return see(made())


def looked_at(context):
    start = context // 2
    number = min(heads.QUERIES, context - start)
    return np.linspace(start, context - 1, number).astype(int)


def test_sink_and_previous_token_mass(softmax):
    visible = looked_at(200) + 1
    uniform = (1 / visible).mean()
    copies = softmax.sink[0, COPIES]
    expected = both_layers([1, 0, uniform, copies])
    np.testing.assert_allclose(softmax.sink, expected, atol=1e-6)
    assert copies < 0.1
    before = softmax.previous[0, COPIES]
    expected = both_layers([0, 1, uniform, before])
    np.testing.assert_allclose(softmax.previous, expected, atol=1e-6)


def test_entropy_is_in_bits(softmax):
    uniform = np.log2(looked_at(200) + 1).mean()
    assert softmax.entropy[:, [SINK, PREVIOUS]][0] == pytest.approx(0, abs=1e-4)
    assert softmax.entropy[0, UNIFORM] == pytest.approx(uniform, rel=1e-5)
    assert softmax.entropy[1, 0] == pytest.approx(uniform, rel=1e-5)


def test_support_counts_keys_and_effective_support_those_of_most_mass(softmax):
    visible = looked_at(200) + 1
    assert softmax.effective_support[0, SINK] == 1
    assert softmax.effective_support[0, PREVIOUS] == 1
    needed = np.ceil(heads.MASS * visible).mean()
    assert softmax.effective_support[0, UNIFORM] == pytest.approx(needed, abs=0.1)
    assert softmax.support[0, UNIFORM] == visible.mean()


def test_the_copying_head_is_the_retrieval_head(softmax):
    assert softmax.answers == 15
    np.testing.assert_array_equal(softmax.retrieval, both_layers([0, 0, 0, 1]))
    uniform = softmax.needle_mass[0, UNIFORM]
    expected = both_layers([0, 0, uniform, 1])
    np.testing.assert_allclose(softmax.needle_mass, expected, atol=1e-6)
    # The needle's five digits and ". Remember it." and its line's end, of about 190.
    assert uniform == pytest.approx((5 + len(". Remember it.\n")) / 192, rel=0.05)


def test_a_copy_that_is_off_by_one_is_no_retrieval_and_still_on_the_needle():
    class Late(Made):
        def hidden(self, params, tokens, attention):
            def late(layer, q, k, v):
                return attention(layer, q, jnp.roll(k, 1, axis=2), v)

            return super().hidden(params, tokens, late)

    result = see(made()._replace(decoder=Late()))
    assert result.retrieval[0, COPIES] == 0
    assert result.needle_mass[0, COPIES] == pytest.approx(1, abs=1e-5)


def test_the_maps_are_of_the_heads_that_are_most_so(softmax):
    shown = [(one.label, one.layer, one.head) for one in softmax.maps]
    assert shown == [
        ("most retrieval-like", 0, COPIES),
        ("most sink-like", 0, SINK),
        ("most local", 0, PREVIOUS),
    ]
    length = len(softmax.maps[0].weights)
    assert length <= heads.MAP_TOKENS
    for one in softmax.maps:
        assert one.score == pytest.approx(1, abs=1e-5)
        assert one.weights.shape == (length, length)
        np.testing.assert_allclose(one.weights.sum(1), 1, rtol=1e-5)
        assert (np.triu(one.weights, 1) == 0).all()
    np.testing.assert_allclose(softmax.maps[1].weights[:, 0], 1, atol=1e-6)
    diagonal = np.diagonal(softmax.maps[2].weights, -1)
    np.testing.assert_allclose(diagonal, 1, atol=1e-6)


def test_entmax_has_exact_zeros():
    result = see(made(alpha=1.5))
    visible = looked_at(200) + 1
    assert result.alpha == 1.5
    # A logit that leads by 2 or more has all the weight; equal ones share it.
    for measure, expected in (
        (result.sink, [1, 0, (1 / visible).mean()]),
        (result.previous, [0, 1, (1 / visible).mean()]),
        (result.entropy, [0, 0, np.log2(visible).mean()]),
        (result.support, [1, 1, visible.mean()]),
    ):
        np.testing.assert_allclose(measure[0, :COPIES], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(result.retrieval, both_layers([0, 0, 0, 1]))
    assert result.maps[1].weights[5:, 1:].max() == 0


def test_entmax_weights_solve_their_equation():
    # In float64, by bisection: p_i = max(z_i - tau, 0)^2 with z = s / 2 sums to 1.
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 5, 7)).astype(np.float32)
    visible = np.tri(5, 7, 2, dtype=bool)
    found = heads._normalise(jnp.asarray(logits), jnp.asarray(visible), 1.5)
    z = np.where(visible, logits.astype(np.float64) / 2, -np.inf)
    low, high = z.max(-1, keepdims=True) - 1, z.max(-1, keepdims=True)
    for _ in range(80):
        tau = (low + high) / 2
        above = (np.maximum(z - tau, 0) ** 2).sum(-1, keepdims=True) > 1
        low, high = np.where(above, tau, low), np.where(above, high, tau)
    np.testing.assert_allclose(found, np.maximum(z - low, 0) ** 2, atol=2e-5)


def test_a_summary_names_the_heads(softmax):
    said = heads.summary(softmax)
    assert said[0].startswith(
        "made (softmax): 2 windows of 200 tokens of text, 15 answer"
    )
    found = {line[:20].strip(): line[20:] for line in said[1:]}
    assert found["retrieval"].startswith("layer  0, head  3: source has the most")
    assert "100% of the time" in found["retrieval"]
    assert found["sink"].startswith("layer  0, head  0: 100%")
    assert found["local"].startswith("layer  0, head  1: 100%")
    assert found["highest entropy"].startswith("layer  0, head  2: 7.2")
    assert found["lowest entropy"].endswith(": 0.00 bits")
    assert f"{softmax.support.mean():.1f} keys of non-zero" in said[-1]


def test_a_result_is_json(softmax):
    document = json.loads(json.dumps(heads.as_dict(softmax), allow_nan=False))
    assert document["retrieval"] == softmax.retrieval.tolist()
    assert document["alpha"] == 1
    assert "maps" not in document


def test_a_real_model_is_seen_with_its_own_weights_in_every_layer():
    model = tiny_model(context=256)
    tokens = jnp.asarray(np.array([ByteTokenizer().encode(TEXT[:150])], np.int32))
    found = np.asarray(heads._all_weights(model.decoder, model.params, tokens))
    expected = []

    def attention(layer, q, k, v):
        # In float64; the second layer sees the first one's output.
        positions = jnp.arange(q.shape[2], dtype=jnp.int32)[None]
        rope = Rope(q.shape[3])
        wide = [np.asarray(rope(x, positions), np.float64) for x in (q, k)]
        logits = np.einsum("bhtd,bhsd->bhts", wide[0], wide[1].repeat(2, axis=1))
        logits = np.exp(logits / math.sqrt(q.shape[3])) * np.tri(logits.shape[2])
        expected.append((logits / logits.sum(-1, keepdims=True))[0])
        return dense(layer, q, k, v)

    model.decoder.hidden(model.params, tokens, attention)
    np.testing.assert_allclose(found, np.stack(expected), atol=2e-4)


def test_blocks_of_queries_change_nothing(monkeypatch):
    model = tiny_model(context=256)
    one = see(model)
    monkeypatch.setattr(heads, "BLOCK", 17)
    heads._look.clear_cache()
    heads._all_weights.clear_cache()
    other = see(model)
    for name in ("sink", "entropy", "needle_mass"):
        np.testing.assert_allclose(
            getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5
        )


def test_progress_and_sizes_are_reported(softmax):
    seen = []
    result = see(made(), progress=seen.append)
    assert seen == pytest.approx(np.arange(1, 6) / 5)
    assert (result.context, result.windows, result.alpha) == (200, 2, 1.0)
    assert result.model == "made"
    np.testing.assert_array_equal(result.sink, softmax.sink)


def test_an_answer_in_other_tokens_than_its_needle_is_an_error():
    with pytest.raises(ValueError, match="in other tokens in the text than as an"):
        see(made()._replace(tokenizer=PairTokenizer()))


def test_a_context_beyond_the_models_is_an_error():
    with pytest.raises(ValueError, match="context=300 exceeds the 256 tokens"):
        see(made(), context=300)


def test_a_text_that_is_too_short_for_the_windows_is_an_error():
    with pytest.raises(ValueError, match=r"windows=99 windows of .*: lower windows to"):
        see(made(), windows=99)


def test_the_figure_shows_every_number_and_three_maps(softmax, tmp_path):
    path = tmp_path / "heads.svg"
    figure = figures_heads.figure(softmax, path)
    top, bottom = figure.subfigs
    shown = (
        softmax.sink,
        softmax.entropy,
        softmax.effective_support,
        softmax.retrieval,
        softmax.needle_mass,
    )
    assert len(top.axes) == len(shown)
    for axis, values in zip(top.axes, shown, strict=True):
        cells = np.asarray(axis.collections[0].get_array()).reshape(values.shape)
        np.testing.assert_array_equal(cells, values)
        assert len(axis.texts) == 8
        assert axis.get_ylim() == (2, 0)  # the first layer on top
    assert top.axes[0].texts[0].get_text() == "1.00"  # head 0 of layer 0 is a sink
    assert "effective support" in top.axes[2].get_title()
    maps = [axis for axis in bottom.axes if axis.images]
    assert [axis.get_title() for axis in maps] == [
        "most retrieval-like (1.00): layer 0, head 3",
        "most sink-like (1.00): layer 0, head 0",
        "most local (1.00): layer 0, head 1",
    ]
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_a_figure_of_many_heads_leaves_the_numbers_out(softmax, tmp_path):
    many = {
        name: np.tile(value, (1, 8))
        for name, value in softmax._asdict().items()
        if isinstance(value, np.ndarray)
    }
    path = tmp_path / "many.png"
    figure = figures_heads.figure(softmax._replace(**many), path)
    axis = figure.subfigs[0].axes[0]
    assert not axis.texts
    assert len(axis.get_xticklabels()) <= figures_heads.MOST_LABELLED
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_figure_of_an_entmax_model_says_so(softmax):
    figure = figures_heads.figure(softmax._replace(alpha=1.5))
    assert "entmax, alpha = 1.5" in figure.get_suptitle()
    assert "non-zero" in figure.subfigs[0].axes[2].get_title()
