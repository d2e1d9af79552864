"""What claims measure, on tiny models: against other code, or planted to show."""

import jax
import numpy as np
import pytest
from tiny import TEXT, tiny_model

import kvjax
from kvjax import accounting
from kvjax.decoding.generate import generate, prefill
from kvjax.decoding.scoring import score
from kvjax.evaluation import claims, fidelity
from kvjax.evaluation.claims import runner, session
from kvjax.evaluation.claims.measure import layers, texts
from kvjax.evaluation.claims.measure import steps as measure_steps
from kvjax.evaluation.claims.papers import refreshkv, topk_completion
from kvjax.evaluation.tasks import needles
from kvjax.interface import Diagnostics

MODEL = tiny_model(num_layers=2)
ONE_LAYER = tiny_model(num_layers=1)
SIZES = session.QUICK._replace(
    layer_context=96,
    layer_windows=2,
    layer_steps=4,
    share=0.3,
    context=64,
    windows=2,
    text_steps=8,
    examples=3,
)
LONG_TEXT = TEXT * 4


def toy(parse=kvjax.parse) -> session.Session:
    given = {"tiny": MODEL}
    return session.session(
        lambda name: given.get(name, ONE_LAYER), parse, LONG_TEXT, sizes=SIZES
    )


@pytest.fixture(scope="module")
def shared():
    return toy()


def test_layers_alone_cannot_read_a_prompt_twice(shared):
    with pytest.raises(
        ValueError, match=r"kvzip:budget=16.* twice, and one reading was"
    ):
        layers.run(shared, "tiny", "kvzip:budget=16")


def test_layers_alone_lose_what_side_by_side_says_they_lose(shared):
    """The same windows through the whole model, by the code of `kvjax compare`."""
    method = kvjax.quest(budget=16, page_size=4)
    found = layers.run(shared, "tiny", "quest:budget=16,page_size=4").found
    both = fidelity.side_by_side(kvjax.full(), method)
    windows = needles.windows(
        MODEL.tokenizer, LONG_TEXT, context=96, n=2, seed=session.SEED
    )
    before = [row[:-4] for row in windows]
    states = prefill(MODEL, both, before, max_new_tokens=4).states
    ahead = np.array([row[-4:] for row in windows], np.int32)
    states = jax.jit(fidelity.teacher_forced, static_argnums=(0, 1))(
        MODEL.decoder, both, MODEL.params, states, ahead
    )
    expected = fidelity.layers(states)
    for name in layers.Sums._fields:
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), atol=2e-5, err_msg=name
        )
    assert found.error.min() > 1e-3


def test_a_step_is_compared_head_by_head():
    weights = np.array([[[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 1.0, 0.0]]], np.float32)
    expected = np.array([[[3.0, 4.0], [1.0, 0.0]]], np.float32)
    actual = np.array([[[3.0, 3.0], [1.0, 0.0]]], np.float32)
    found = Diagnostics(
        attended=np.array([[[0, 2, -1]]], np.int32),
        lse=None,
        refreshed=np.array([True]),
        exact=np.array([[False, True]]),
    )
    sums = jax.jit(layers.compared)(weights, expected, actual, found)
    np.testing.assert_allclose(sums.error, [[0.2, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(sums.dropped, [[0.3, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(sums.support, [[2 / 3, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(sums.exact, [[0, 1]])
    assert sums.read.tolist() == [2]
    assert sums.refreshed.tolist() == [1]


def test_a_model_driven_by_given_tokens_says_what_scoring_says(shared):
    rows = texts.windows(shared, "one layer")
    found = texts.text(shared, "one layer", "streaming_llm:budget=16")
    expected = score(
        ONE_LAYER, kvjax.parse("streaming_llm:budget=16"), rows, prefill=64
    )
    np.testing.assert_allclose(
        found.log_probs, expected.log_probs[:, 63:], rtol=1e-4, atol=1e-4
    )
    # Scored on the way through the prompt, in chunks.
    read = measure_steps.read(
        ONE_LAYER,
        shared.method("streaming_llm:budget=16"),
        texts.shape(shared),
        [row[:64] for row in rows],
        scored=True,
    )
    np.testing.assert_allclose(
        read.log_probs, expected.log_probs[:, :63], rtol=1e-4, atol=1e-4
    )
    assert read.likeliest.shape == (2, 63)


def test_a_model_driven_greedily_says_what_generation_says(shared):
    method = shared.method("streaming_llm:budget=16")
    prompts = [
        row[: 50 + i] for i, row in enumerate(texts.windows(shared, "one layer"))
    ]
    prompts.append(prompts[0][:40])  # a batch that is not full
    found = measure_steps.drive(
        ONE_LAYER, method, texts.shape(shared), prompts, None, 8
    )
    expected = generate(ONE_LAYER, method, prompts, max_new_tokens=8, eos_ids=())
    assert found.tokens.tolist() == [one.tokens for one in expected]


def test_a_prompt_beyond_the_shape_is_refused(shared):
    shape = texts.shape(shared)
    with pytest.raises(ValueError, match="exceed"):
        measure_steps.drive(
            ONE_LAYER, shared.method("full"), shape, [[1] * 65], None, 4
        )
    with pytest.raises(ValueError, match="exceed"):
        measure_steps.drive(ONE_LAYER, shared.method("full"), shape, [[1] * 9], None, 9)


def test_planted_results_flip_the_verdict():
    """Retrieval that is exact has nothing to gain, and completion then loses."""
    specs = topk_completion._specs(toy(), SIZES.layer_context)

    def verdict(alone, completed):
        shared = toy()
        for spec, error in zip(specs, (alone, completed), strict=True):
            noise = 1e-3 * np.arange(8.0).reshape(1, 2, 4)
            sums = layers.Sums(error + noise, *[noise] * 3, *[noise[..., 0]] * 2)
            found = layers.Layers(sums, None, 1.0)
            shared.done["layers", session.SOFTMAX, spec] = found
        (row,) = runner.run(claims.named(["completion-error"]), shared)
        return row.verdict

    assert verdict(0.3, 0.2) == "reproduced"
    assert verdict(0.2, 0.3) == "not reproduced"
    assert verdict(0.2, 0.2) == "not reproduced"


def test_counts_need_no_run_of_a_model():
    names = ("completion-reads", "completion-state", "cascade-memory")
    names += ("refresh-bytes", "retro-bytes")
    rows = {row.claim.name: row for row in runner.run(claims.named(names), toy())}
    assert {row.verdict for row in rows.values()} == {"reproduced"}
    assert 1.0 < rows["retro-bytes"].found.value < 1.02
    assert 0.5 < rows["refresh-bytes"].found.value < 0.55
    # A summary that grew, or reads that did, would show.
    grown = kvjax.parse("topk_completion:budget=1024,charge=none,features=32")

    def parse(spec):
        return grown if "lam=0" not in spec else kvjax.parse("quest:budget=512")

    (row,) = runner.run(claims.named(["completion-reads"]), toy(parse))
    assert row.verdict == "not reproduced"


@pytest.mark.parametrize("steps", [2, 8])
def test_what_evicts_reads_as_many_bytes_as_what_refreshes(shared, steps):
    """Summed over the run: SnapKV's cache grows, a full step reads all there is."""
    decoder = shared.model("one layer").decoder
    spec = refreshkv._evicting(shared, "one layer", steps)
    budget = int(spec.removeprefix("snapkv:budget="))
    token = accounting.bytes_read(kvjax.full(), decoder, 1)
    method = kvjax.parse(refreshkv._ours(shared))
    ours = theirs = 0
    for step in range(1, steps + 1):
        length = SIZES.context + step
        ours += accounting.bytes_read(method, decoder, length)
        theirs += token * (budget + step)
    assert abs(theirs - ours) < steps * token


def test_growth_in_memory_would_show():
    (row,) = runner.run(
        claims.named(["cascade-memory"]), toy(lambda spec: kvjax.full())
    )
    assert row.verdict == "not reproduced"
    assert row.found.value > 10


def test_rank_correlation_has_an_interval():
    x = np.arange(16.0)
    found = topk_completion.rank_correlation(x, x**3, 16)
    assert found.value == pytest.approx(1.0)
    assert found.n == 16
    found = topk_completion.rank_correlation(x, np.cos(3 * x), 16)
    assert found.low < 0 < found.high
    # Bonett and Wright's variance: sqrt((1 + r^2 / 2) / (n - 3)) about atanh r.
    r = 0.6
    y = np.array([0, 1, 2, 9, 4, 5, 14, 7, 8, 3, 10, 11, 12, 13, 6, 15.0])
    found = topk_completion.rank_correlation(x, y, 16)
    r = found.value
    half = 1.959964 * np.sqrt((1 + r * r / 2) / 13)
    assert found.low == pytest.approx(np.tanh(np.arctanh(r) - half), rel=1e-5)
    # The same pairs in four layers say less, in three nothing.
    assert topk_completion.rank_correlation(x, y, 4).low < 0
    assert topk_completion.rank_correlation(x, x**3, 3)[1:4] == (-1.0, 1.0, 3)


def test_entropy_of_a_head_that_looks_everywhere_alike_is_1(shared):
    given = layers.inputs(shared, "tiny")
    flat = toy()
    flat.done["layers", "tiny"] = given._replace(q=0 * given.q)
    found = layers.entropies(flat, "tiny", num_sinks=2, tail=4)
    np.testing.assert_allclose(found, 1.0, rtol=1e-5)
    sharp = toy()
    sharp.done["layers", "tiny"] = given._replace(q=1e4 * given.q)
    assert layers.entropies(sharp, "tiny", num_sinks=2, tail=4).max() < 0.05
