"""Feature maps are trained head by head against a frozen model, and runs resume."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import completion as oracle
from tiny import TEXT, tiny_model

from kvjax.evaluation import head_gains
from kvjax.methods.topk_completion import feature_maps, map_files
from kvjax.training.feature_maps import distill, networks

SETTINGS = networks.Settings(
    steps=40,
    lengths=(40,),
    features=4,
    width=6,
    hidden=5,
    queries=16,
    batch=4,
    loss="paper",
    kl_weight=0.5,
    tail=4,
    lr=4e-2,
    save_every=25,
    log_every=10,
)
TOKENS = np.array(list(TEXT.encode()), np.int32)[:56]  # one document
INITIAL = jax.jit(networks.initial, static_argnums=(1, 2, 3, 4, 5))
TOLERANCE = 2e-5  # of float32 sums of forty terms, against float64


def teacher_and_student(seed=0, size=12):
    rng = np.random.default_rng(seed)
    teacher = 3 * rng.standard_normal((2, 3, size))
    student = teacher + 1.5 * rng.standard_normal((2, 3, size))
    student[0, 0] += 4  # too much mass
    student[1, 2] = teacher[1, 2]
    return np.float32(teacher), np.float32(student)


def huber(x, delta):
    return x**2 / 2 if abs(x) <= delta else delta * (abs(x) - delta / 2)


def test_documents_begin_as_prompts_do():
    """What a tokenizer puts before a text stands there too: heads attend to it most."""
    text = np.arange(200, dtype=np.int32)
    for index in range(4):
        plain = distill.document(text, SETTINGS, index)
        begun = distill.document(text, SETTINGS, index, (900, 901))
        assert begun.shape == plain.shape
        assert begun[0, :2].tolist() == [900, 901]
        assert (begun[0, 2:] == plain[0, 2:]).all()
        assert (np.diff(plain[0]) == 1).all()


@pytest.mark.parametrize("weight", [0.99, 0.25])
def test_the_papers_loss_by_hand(weight):
    """KL at a temperature, top band, false positives, mass that is too much."""
    teacher, student = teacher_and_student()
    middle = np.arange(12) % 5 != 1
    settings = dataclasses.replace(
        SETTINGS, kl_weight=weight, band=2.5, huber=0.7, temperature=1.6
    )
    with jax.disable_jit():
        given = [jnp.asarray(x) for x in (student, teacher, middle)]
        found = np.asarray(networks.paper_loss(*given, settings))
    for index in np.ndindex(2, 3):
        s, shat = np.float64(teacher[index][middle]), np.float64(student[index][middle])
        r, rhat = s - s.max(), shat - s.max()
        p, q = oracle.softmax(r / 1.6), oracle.softmax(rhat / 1.6)
        kl = 1.6**2 * (p * np.log(p / q)).sum()
        in_band = r >= -2.5
        top = np.mean([huber(x, 0.7) for x in (rhat - r)[in_band]])
        rest = np.maximum(rhat[~in_band] + 2.5, 0)
        false = np.mean([huber(x, 0.7) for x in rest]) if len(rest) else 0.0
        over = np.log(np.exp(rhat).sum()) - np.log(np.exp(r).sum())
        others = top + 2 * false + 4 * huber(max(over, 0), 0.7)
        wanted = weight * kl + (1 - weight) * others
        assert abs(found[index] - wanted) < TOLERANCE * max(1, wanted)


@pytest.mark.parametrize("retrieved", [1, 3])
def test_the_output_loss_by_hand(retrieved):
    """The merged output of exact and estimated tokens, and the log of all the mass."""
    teacher, student = teacher_and_student(1)
    v = np.random.default_rng(2).standard_normal((12, 3)).astype(np.float32)
    middle = (np.arange(12) >= 2) & (np.arange(12) < 9)
    visible = np.broadcast_to(np.arange(12) < 11, teacher.shape)
    given = [jnp.asarray(x) for x in (student, teacher, v, middle, visible)]
    found = networks.output_loss(*given, jnp.int32(retrieved), SETTINGS)
    for index in np.ndindex(2, 3):
        s, shat = np.float64(teacher[index]), np.float64(student[index])
        best = sorted(np.flatnonzero(middle), key=lambda j: -s[j])[:retrieved]
        read = [j for j in range(11) if not middle[j] or j in best]
        left = [j for j in range(11) if j not in read]
        exact = np.exp(s[:11])
        truth = exact @ v[:11] / exact.sum()
        mass = np.exp(s[read]).sum() + np.exp(shat[left]).sum()
        out = (np.exp(s[read]) @ v[read] + np.exp(shat[left]) @ v[left]) / mass
        wanted = ((out - truth) ** 2).sum() / (truth**2).sum()
        wanted += 0.1 * math.log(mass / exact.sum()) ** 2
        assert abs(np.asarray(found)[index] - wanted) < TOLERANCE * max(1, wanted)


def test_the_student_is_the_map_that_is_used():
    """Standardised inputs folded into the networks; logits as feature_maps has them."""
    rng = np.random.default_rng(3)
    z = (5 + 2 * rng.standard_normal((7, 6))).astype(np.float32)
    nets = INITIAL(jax.random.key(0), SETTINGS, 1, 1, 2, 6)
    nets = jax.tree.map(lambda x: x + 0.3, nets)  # open gates, biases
    net = jax.tree.map(lambda x: x[0, 0], nets.keys)
    moments = networks.moments_of(jnp.asarray(z))
    scaled = (jnp.asarray(z) - moments.mean) / moments.deviation
    assert abs(float(scaled.std()) - 1) < 1e-5
    plain = networks.unstandardised(net, moments)
    wanted = [
        oracle.mlp(
            {k: np.float64(x) for k, x in plain._asdict().items()}, np.float64(r)
        )
        for r in z
    ]
    found = feature_maps.mlp_features(plain, jnp.asarray(z))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        found, feature_maps.mlp_features(net, scaled), rtol=1e-4, atol=1e-4
    )
    layer = feature_maps.Learned(plain, jax.tree.map(lambda x: x[0, 0], nets.queries))
    q = jnp.asarray(rng.standard_normal((2, 3, 6)), jnp.float32)
    shat = networks.log_weights(layer, q, jnp.asarray(z))
    g = np.float64(feature_maps.mlp_features(layer.queries, q))
    direct = np.log(np.exp(g[:, :, None] + np.float64(found)).sum(-1))
    np.testing.assert_allclose(shat, direct, rtol=1e-4, atol=1e-4)


def test_gradients_are_clipped_head_by_head():
    """A head with a huge gradient, or none that is finite, slows no other down."""
    nets = INITIAL(jax.random.key(1), SETTINGS, 1, 3, 2, 6)
    factor = jnp.asarray([1e-3, 1e3, 1.0], jnp.float32)
    grads = jax.tree.map(lambda x: x * factor.reshape(1, 3, *[1] * (x.ndim - 2)), nets)
    broken = grads.keys._replace(b_out=grads.keys.b_out.at[0, 2].set(jnp.nan))
    clipped = jax.jit(lambda x: distill.clipped(x, distill.norms(x), 1.0))
    found = clipped(grads._replace(keys=broken))
    leaves = [np.float64(x) for x in jax.tree.leaves(found)]
    norm = np.sqrt(sum((x**2).reshape(3, -1).sum(1) for x in leaves))
    before = [np.float64(x) for x in jax.tree.leaves(grads)]
    small = np.sqrt(sum((x[0, 0] ** 2).sum() for x in before))
    np.testing.assert_allclose(norm, [small, 1, 0], rtol=1e-5)
    assert small < 1


def test_a_run_learns_resumes_and_is_used(tmp_path):
    """Stopped and gone on with, a run gives the same bits; the file is read back."""
    model = tiny_model()
    whole = distill.train(model, TOKENS, SETTINGS, tmp_path / "whole")
    assert whole.finished
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0], losses

    calls = []

    class Stop(distill.run_folder.Interrupt):
        """Asks for an end after 31 steps, six after a checkpoint."""

        @property
        def asked(self):
            calls.append(1)
            return len(calls) > 60

        @asked.setter
        def asked(self, value):
            del value

    out = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill.run_folder, "Interrupt", Stop)
        part = distill.train(model, TOKENS, SETTINGS, out)
    assert not part.finished
    other = dataclasses.replace(SETTINGS, lr=1e-3)
    with pytest.raises(ValueError, match=r"lr was 0.04 .* and is 0.001 now"):
        distill.train(model, TOKENS, other, out, resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        distill.train(model, TOKENS, SETTINGS, out)
    resumed = distill.train(model, TOKENS, SETTINGS, out, resume=True)
    assert resumed.finished
    jax.tree.map(np.testing.assert_array_equal, resumed.weights, whole.weights)

    file = distill.as_file(whole, model, SETTINGS)
    map_files.save(tmp_path / "map.safetensors", file)
    read = map_files.load(tmp_path / "map.safetensors")
    assert (read.kind, read.trained_length, read.num_layers) == ("learned", 40, 2)
    jax.tree.map(np.testing.assert_array_equal, read.weights, file.weights)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (20, 8)}, r"lengths=\(20, 8\) must each exceed 8"),
        ({"batch": 3}, r"queries=16 must be a multiple of batch=3"),
        ({"loss": "kl"}, r"loss='kl' must be output or paper"),
        ({"steps": 0}, r"steps=0 must be at least 1"),
        ({"retrieved": (0.1, 0.05)}, r"retrieved=\(0.1, 0.05\) must rise"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_what_cannot_be_trained_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has 30 tokens and a document 56"):
        distill.train(tiny_model(), TOKENS[:30], SETTINGS, tmp_path / "a")
    long = dataclasses.replace(SETTINGS, lengths=(5000,))
    with pytest.raises(ValueError, match=r"documents of 5016 .* the model's 4096"):
        distill.train(tiny_model(), TOKENS, long, tmp_path / "b")
    entmax = tiny_model(attention_alpha=1.5)
    with pytest.raises(ValueError, match=r"entmax with alpha=1.5"):
        distill.train(entmax, TOKENS, SETTINGS, tmp_path / "c")


def test_a_head_that_is_not_finite_stops_the_run_and_the_last_good_state_stays(
    tmp_path, monkeypatch
):
    """The trace of a document overflows, as in a narrow dtype: found before a save."""
    settings = dataclasses.replace(SETTINGS, steps=24, save_every=6, log_every=10)
    real, documents = distill.trace, []

    def overflows(*arguments):
        documents.append(len(documents))
        found = real(*arguments)
        if len(documents) > 3:  # the first one gives the scales of all
            return found._replace(k=found.k.at[1, 0].set(jnp.inf))
        return found

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(distill, "trace", overflows)
        with pytest.raises(ValueError, match="training stopped") as caught:
            distill.train(tiny_model(), TOKENS, settings, out)
    message = str(caught.value)
    # Two documents of four steps each were sound.
    assert message.startswith(
        "step 9 in float32: loss or gradient of layer 1, KV head 0"
    )
    assert f"last good checkpoint is that of step 6 in {out / 'checkpoints'}" in message
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["6"]
    assert "NaN" not in (out / "metrics.jsonl").read_text()
    again = distill.train(tiny_model(), TOKENS, settings, out, resume=True)
    whole = distill.train(tiny_model(), TOKENS, settings, tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, again.weights, whole.weights)


@pytest.mark.usefixtures("unchecked_shapes")
def test_heads_abstain_where_completion_hurts():
    alone = np.array([[0.2, 0.3], [0.4, 0.5]])
    found = head_gains.Calibration(alone, alone * [[0.5, 1.5], [1.0, 0.9]])
    np.testing.assert_array_equal(found.gain, [[1, 0], [0, 1]])
    *_, line = head_gains.summary(found)
    assert line == (
        "mean relative error 0.3500 alone, 0.3500 completed, 0.3125 where it helps: 2 "
        "of 4 heads"
    )
    with pytest.raises(ValueError, match=r"more than new_tokens=8 .* there are 0"):
        head_gains.calibrate(None, None, None, None, [], new_tokens=8)
