"""All steps at once equal the decode loop, gradients those of a masked softmax."""

import dataclasses

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from tiny import tiny_model

import kvjax
from kvjax.decoding.scoring import score
from kvjax.methods.refreshkv.method import refreshkv
from kvjax.rope import Rope
from kvjax.training import step
from kvjax.training.attention import causal_attention
from kvjax.training.batch import Batch
from kvjax.training.config import RefreshKV
from kvjax.training.refreshkv import refresh_attention

PROMPT, STEPS = 12, 25
STREAM = drive.make_stream((PROMPT, PROMPT), STEPS, heads=(4, 2), seed=11)
ROPE = Rope(8)


def attend(q, k, v, **options):
    return jax.jit(refresh_attention(ROPE, prompt=PROMPT, **options), static_argnums=0)(
        0, q, k, v
    )


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 6, "stride": 4, "self_mode": "snapkv"},
        {"budget": 5, "stride": 9, "kernel": 3},
        {"budget": 6, "stride": 1},
        {"budget": 7, "stride": 2, "schedule": "qc", "threshold": 0.1},
        {"budget": 9, "stride": 3, "schedule": "qc", "threshold": -1.0, "kernel": 1},
        {"budget": 60, "stride": 5, "schedule": "qc", "threshold": 0.1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_all_steps_at_once_equal_the_decode_loop(options):
    options = {"schedule": "fixed", "qc_rope": "post"} | options
    run = drive.run(refreshkv(**options), drive.make_spec(STREAM), STREAM)
    out = np.asarray(attend(*STREAM[:3], **options))
    for b in range(2):
        drive.assert_rows_close(out[b, :, :PROMPT], run.prompt_out[b])
        drive.assert_rows_close(out[b, :, PROMPT:].swapaxes(0, 1), run.out[:, b])
    if options["schedule"] == "qc" and options["threshold"] == 0.1:
        refreshed = run.diagnostics.refreshed
        assert (refreshed.any(1) & ~refreshed.all(1)).any()  # rows that part


def masked(options, chosen_of, q, k, v):
    """Dense attention under the mask of the paper's training, from its definition."""
    length = q.shape[2]
    where = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    q, k = ROPE(q, where), ROPE(k, where)
    scores = jnp.einsum("bhtd,bhsd->bhts", q, jnp.repeat(k, 2, 1)) * 8**-0.5
    mask = np.tril(np.ones((2, 4, length, length), bool))
    first, stride = PROMPT - 1, options["stride"]
    for t in range(PROMPT, length):
        anchor = first + (t - first) // stride * stride
        if t == anchor:
            continue
        for b in range(2):
            for h in range(4):
                mask[b, h, t, : anchor + 1] = False
                mask[b, h, t, sorted(chosen_of(b, h // 2, anchor))] = True
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bhsd->bhtd", weights, jnp.repeat(v, 2, 1))


def top_of(b, kv, anchor, size):
    """The best by the larger weight of the two heads, no pooling, in float64."""
    best = np.zeros(anchor + 1)
    for h in (2 * kv, 2 * kv + 1):
        query = drive.rotate(STREAM.q[b, h, anchor], anchor)
        keys = np.array(
            [drive.rotate(STREAM.k[b, kv, j], j) for j in range(anchor + 1)]
        )
        logits = keys @ query * 8**-0.5
        weights = np.exp(logits - logits.max())
        best = np.maximum(best, weights / weights.sum())
    return np.argsort(-best, kind="stable")[:size]


def assert_gradients_close(found, wanted):
    """Sums of many terms that cancel: by the largest, in float32."""
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=5e-6 * scale)


def test_value_and_gradients_equal_masked_dense_attention():
    """As the paper trains: the whole selection, and all tokens since; one mask."""
    options = {"budget": 6, "stride": 7, "kernel": 1, "eviction": "none"}
    known = {}

    def chosen_of(b, kv, anchor):
        if (b, kv, anchor) not in known:
            known[b, kv, anchor] = top_of(b, kv, anchor, 5)
        return known[b, kv, anchor]

    probe = np.random.default_rng(0).standard_normal(STREAM.q.shape).astype("float32")

    def loss(attention):
        return jax.jit(
            jax.value_and_grad(
                lambda q, k, v: (attention(q, k, v) * probe).sum(), argnums=(0, 1, 2)
            )
        )

    ours = loss(lambda *x: refresh_attention(ROPE, prompt=PROMPT, **options)(0, *x))
    plain = loss(lambda *x: masked(options, chosen_of, *x))
    arrays = [jnp.asarray(x) for x in STREAM[:3]]
    value, gradients = ours(*arrays)
    expected_value, expected = plain(*arrays)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        assert_gradients_close(found, wanted)


def test_a_budget_for_everything_is_full_attention_with_its_gradient():
    arrays = [jnp.asarray(x) for x in STREAM[:3]]

    def gradient(attention):
        return jax.jit(
            jax.grad(lambda *x: (attention(0, *x) ** 2).sum(), argnums=(0, 1, 2))
        )(*arrays)

    sparse = refresh_attention(
        ROPE, prompt=PROMPT, budget=64, stride=5, schedule="qc", threshold=0.1
    )
    for found, wanted in zip(
        gradient(sparse), gradient(causal_attention(ROPE)), strict=True
    ):
        assert_gradients_close(found, wanted)


@pytest.mark.parametrize(
    ("eviction", "stride", "least"),
    [("none", 9, 31), ("none", 5, 33), ("exact", 9, 37)],
)
def test_a_budget_that_leaves_nothing_out_is_refused(eviction, stride, least):
    """One token less is another attention, and the largest budget that is trained."""
    setting = {"eviction": eviction, "stride": stride}
    full = causal_attention(ROPE)(0, *map(jnp.asarray, STREAM[:3]))
    for budget, is_full in ((least, True), (least - 1, False)):
        out = attend(*STREAM[:3], budget=budget, **setting)
        assert (np.abs(out - full).max() < 2e-6) == is_full
        config = RefreshKV(decoded=STEPS, budget=budget, **setting)
        if not is_full:
            config.check_budget(PROMPT + STEPS)
            continue
        with pytest.raises(
            ValueError,
            match=f"budget={least} must be below {least}, or nothing is left out of "
            f"rows of 37 tokens .* give --set refreshkv.budget={least // 4}, or longer",
        ):
            config.check_budget(PROMPT + STEPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 0, "budget": 4}, "prompt=0 must be at least 1 token"),
        ({"prompt": 4, "budget": 1}, "budget=1 must be at least 2 tokens"),
        ({"prompt": 4, "budget": 4, "schedule": "never"}, "must be 'fixed' or 'qc'"),
        ({"prompt": 4, "budget": 4, "eviction": "some"}, "must be one of exact, none"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        refresh_attention(ROPE, **options)


def test_a_row_must_be_longer_than_its_prompt():
    with pytest.raises(ValueError, match="rows of 37 tokens must be longer than"):
        refresh_attention(ROPE, prompt=37, budget=4)(0, *map(jnp.asarray, STREAM[:3]))


def test_memory_is_linear_in_the_length():
    """Of the gradient, compiled and not run; every weight at once would be 16 times."""

    def temporaries(length):
        attention = refresh_attention(
            ROPE, prompt=length // 2, budget=64, stride=8, schedule="qc"
        )
        gradient = jax.grad(lambda *x: attention(0, *x).sum(), argnums=(0, 1, 2))
        q = jax.ShapeDtypeStruct((1, 4, length, 8), jnp.float32)
        k = jax.ShapeDtypeStruct((1, 2, length, 8), jnp.float32)
        compiled = jax.jit(gradient).lower(q, k, k).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 4.4 * temporaries(2048)


# --- of a model


def batch_of(tokens):
    tokens = jnp.asarray(tokens, jnp.int32)
    ones = jnp.ones(tokens[:, 1:].shape, jnp.float32)
    return Batch(
        tokens[:, :-1], tokens[:, 1:], ones, ones > 0, tokens[:, 1:] * 0, None, None
    )


@pytest.mark.parametrize("schedule", ["fixed", "qc"])
def test_the_loss_is_that_of_decoding(schedule):
    """Every layer and token of a model: trained on what `score` then measures."""
    model = tiny_model(deviation=0.1)
    tokens = np.random.default_rng(3).integers(0, 260, (2, 48))
    options = {"budget": 7, "stride": 3, "schedule": schedule, "threshold": 0.3}
    setting = RefreshKV(decoded=25, eviction="exact", **options)
    nats, _ = jax.jit(step.token_losses, static_argnums=0, static_argnames="setting")(
        model.decoder, model.params, batch_of(tokens), setting=setting
    )
    scores = score(model, kvjax.refreshkv(**options), tokens.tolist(), prefill=22)
    np.testing.assert_allclose(-nats, scores.log_probs, atol=3e-5)
    full = score(model, kvjax.full(), tokens.tolist(), prefill=22).log_probs
    assert np.abs(scores.log_probs - full)[:, 24:].max() > 1e-3


def test_packed_rows_and_entmax_are_refused():
    decoder = toys.decoder()
    batch = batch_of(np.zeros((1, 9)))
    packed = batch._replace(segments=jnp.ones_like(batch.tokens))
    entmax = dataclasses.replace(decoder.config, attention_alpha=1.5)
    for other, bad in ((decoder, packed), (type(decoder)(entmax), batch)):
        with pytest.raises(ValueError, match="rows of one sequence and softmax"):
            step.token_losses(other, decoder.init(0), bad, setting=RefreshKV(decoded=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("refreshkv.decoded=16", "refreshkv.decoded=16 must be below every length"),
        (
            "refreshkv.decoded=4",
            "one sequence, and stages.1.*--set stages.1.shortest=null",
        ),
        ("refreshkv.budgets=4", "unknown key refreshkv.budgets; did you mean"),
        ("refreshkv.budget=1", "refreshkv.budget=1: Input should be greater"),
    ],
)
def test_a_config_that_cannot_be_trained_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        toys.config(changes)
