"""The training step: its loss and gradient by other means, exact parts, bad numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from kvjax.training import optim, pipeline, sharding
from kvjax.training import step as steps
from kvjax.training.batch import Batch

DECODER = toys.decoder()


@functools.cache
def params():
    return jax.jit(DECODER.init, static_argnums=0)(0)


@functools.cache
def set_up(*changes):
    """A config's parts, compiled once for all tests that ask for the same."""
    config = toys.config(*changes)
    mesh = sharding.make_mesh(config.mesh)
    tx = optim.optimizer(config, toys.VOCAB)
    state = jax.jit(lambda params: steps.init_state(params, tx, config))(params())
    return config, mesh, tx, state, steps.make_train_step(DECODER, tx, config, mesh)


def copy(tree):
    return jax.tree.map(jnp.array, tree)


def batch_of(config, index) -> Batch:
    return jax.tree.map(jnp.asarray, pipeline.Steps(config, toys.SOURCES)[index])


@jax.jit
@jax.value_and_grad
def loss_and_gradient(params, batch):
    """The definition, from whole log-probabilities."""
    attend = toys.attention(
        DECODER.config.rope, segments=batch.segments, positions=batch.positions
    )
    hidden = DECODER.hidden(params, batch.tokens, attend)
    log_probs = jax.nn.log_softmax(DECODER.logits(params, hidden), -1)
    picked = jnp.take_along_axis(log_probs, batch.targets[..., None], -1)[..., 0]
    return -jnp.sum(picked * batch.weights) / jnp.sum(batch.weights)


def assert_close(a, b, rtol=2e-5):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale),
        a,
        b,
    )


@pytest.mark.usefixtures("real_attention")
@pytest.mark.parametrize("index", [0, 7])
def test_loss_and_update_are_those_of_the_definition(index):
    config, mesh, tx, state, _ = set_up()
    batch = batch_of(config, index)
    assert (batch.segments is not None) == (index == 7)
    value, grads = loss_and_gradient(state.params, batch)
    changes, _ = jax.jit(tx.update)(grads, state.opt_state, state.params)
    expected = optax.apply_updates(state.params, changes)
    with jax.numpy_dtype_promotion("standard"):
        norm = optax.tree.norm(grads)

    moved, metrics = steps.make_train_step(DECODER, tx, config, mesh)(
        copy(state), batch
    )
    loss = metrics["loss"].sum() / metrics["weight"].sum()
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    # adamw's first step has the size of the rate whatever the gradient's: a wrong
    # gradient shows in the signs, a right one near zero may differ in them.
    assert_close(moved.params, expected, rtol=2e-3)
    assert int(moved.step) == 1
    np.testing.assert_allclose(
        moved.average["norm"]["weight"],
        0.1 * state.params["norm"]["weight"] + 0.9 * moved.params["norm"]["weight"],
        rtol=1e-6,
    )


def gradient_of(config, mesh, batch, state, **options):
    """Of plain descent at rate 1, the update is the gradient itself."""
    tx = optax.sgd(1.0)
    state = steps.init_state(state.params, tx, config)
    step = steps.make_train_step(DECODER, tx, config, mesh, **options)
    moved, metrics = step(copy(state), batch)
    return jax.tree.map(jnp.subtract, state.params, moved.params), metrics


ALL_AT_ONCE = (["optimizer.accumulate=2", "remat=true"], {"max_logits": 700})


@pytest.mark.parametrize(
    ("index", "variants"),
    [
        (
            0,
            [
                (["optimizer.accumulate=4"], {}),
                (["remat=true"], {}),
                ([], {"max_logits": 1000}),
            ],
        ),
        (9, [ALL_AT_ONCE]),
    ],
)
def test_parts_chunks_and_remat_change_no_gradient(index, variants):
    config, mesh, _, state, _ = set_up("stages.0.tokens=128", "stages.1.tokens=128")
    batch = batch_of(config, index)
    weights = batch.weights.at[0].multiply(7.0)  # rows count unequally
    batch = batch._replace(weights=weights)
    whole, metrics = gradient_of(config, mesh, batch, state)
    assert_close(whole, loss_and_gradient(state.params, batch)[1], 1e-5)
    for changes, options in variants:
        changed = toys.config("stages.0.tokens=128", "stages.1.tokens=128", *changes)
        found, sums = gradient_of(changed, mesh, batch, state, **options)
        assert_close(found, whole, 1e-6)
        for name in ("loss", "weight", "nats", "targets", "right", "answers", "rows"):
            np.testing.assert_allclose(sums[name], metrics[name], rtol=1e-6)


def test_chunks_bound_the_logits_alive_at_once():
    config, mesh, tx, state, _ = set_up(
        "stages.0.tokens=4096", "stages.0.lengths={64: 1}", "evaluate.every=0"
    )
    batch = batch_of(config, 0)
    sizes = []
    for bound in (2**30, 2**14):
        step = steps.make_train_step(DECODER, tx, config, mesh, max_logits=bound)
        analysis = step.lower(state, batch).compile().memory_analysis()
        sizes.append(analysis.temp_size_in_bytes)
    # Whole logits are 4096 * 40 floats; chunks hold a tenth of them.
    assert sizes[1] < sizes[0] - 4096 * 40 * 4 * 0.8


def test_cross_entropy_and_its_gradient_against_optax():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 5, 11)) * 30, jnp.float32)
    targets = jnp.asarray(rng.integers(11, size=(3, 5)), jnp.int32)
    scale = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)

    def ours(logits):
        return (steps.cross_entropy(logits, targets)[0] * scale).sum()

    def theirs(logits):
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (nats * scale).sum()

    nats, right = steps.cross_entropy(logits, targets)
    np.testing.assert_array_equal(right, jnp.argmax(logits, -1) == targets)
    np.testing.assert_allclose(ours(logits), theirs(logits), rtol=1e-5)
    assert (nats >= 0).all()
    np.testing.assert_allclose(
        jax.grad(ours)(logits), jax.grad(theirs)(logits), atol=1e-5
    )


def test_metrics_count_by_source():
    config, _, _, state, step = set_up()
    batch = batch_of(config, 8)
    token_losses = jax.jit(functools.partial(steps.token_losses, DECODER))
    losses = token_losses(state.params, batch)
    nats, right = map(np.asarray, losses)
    batch = jax.tree.map(np.asarray, batch)
    metrics = jax.device_get(step(copy(state), batch)[1])
    assert len(set(np.asarray(batch.sources).ravel().tolist())) == 2
    for index in range(2):
        own = np.asarray(batch.sources == index)
        weights = np.asarray(batch.weights)
        expected = {
            "loss": (nats * weights)[own].sum(),
            "weight": weights[own].sum(),
            "nats": nats[own & (weights > 0)].sum(),
            "targets": (own & (weights > 0)).sum(),
            "right": (right & batch.answers)[own].sum(),
            "answers": batch.answers[own].sum(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name][index], value, rtol=1e-5)
    record = steps.summary(metrics, ("count", "noise"))
    assert record["loss"] == pytest.approx(
        (nats * batch.weights).sum() / batch.weights.sum(), rel=1e-5
    )
    assert record["loss/noise"] == pytest.approx(
        metrics["loss"][1] / metrics["weight"][1]
    )
    assert "accuracy/noise" not in record


def test_bfloat16_computes_in_it_and_keeps_float32_masters():
    config, _, _, state, step = set_up(
        "precision.compute=bfloat16", "optimizer.lr=1e-6"
    )
    batch = batch_of(config, 0)
    moved, metrics = step(copy(state), batch)
    floats = [
        x for x in jax.tree.leaves(moved) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    loss = float(metrics["loss"].sum() / metrics["weight"].sum())
    exact = float(loss_and_gradient(state.params, batch)[0])
    assert loss != pytest.approx(exact, rel=1e-6)
    assert loss == pytest.approx(exact, rel=1e-2)
    # A step far below bfloat16's resolution still moves the masters.
    changed = jax.tree.map(lambda a, b: (a != b).mean(), moved.params, state.params)
    assert float(changed["layers"][0]["mlp"]["up"]["kernel"]) > 0.9


def test_bfloat16_weights_become_float32_masters():
    config, _, tx, _, _ = set_up()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    state = steps.init_state(half, tx, config)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_nor_do_later_ones(where):
    config, _, _, state, step = set_up()
    good, bad = batch_of(config, 0), batch_of(config, 1)
    bad = bad._replace(weights=bad.weights.at[0, 0].set(jnp.nan))
    if where == "gradient":  # overflows in the backward pass only
        bad = bad._replace(weights=jnp.full_like(bad.weights, 3e38).at[1:].set(1e-30))
    state, _ = step(copy(state), good)
    before = copy(state)
    state, metrics = step(state, bad)
    assert not metrics["finite"]
    state, metrics = step(state, good)
    assert not metrics["finite"]
    assert not state.finite
    jax.tree.map(
        np.testing.assert_array_equal, state._replace(finite=before.finite), before
    )


@pytest.mark.parametrize("where", ["params", "average"])
def test_weights_that_are_not_finite_are_found(where):
    _, _, _, state, _ = set_up()
    assert steps.has_finite_weights(state)
    weights = getattr(state, where)
    norm = weights["norm"]["weight"].at[-1].set(-jnp.inf)
    weights = weights | {"norm": {"weight": norm}}
    assert not steps.has_finite_weights(state._replace(**{where: weights}))


def test_a_batch_of_nothing_but_padding_has_no_gradient():
    config, _, _, state, step = set_up()
    batch = batch_of(config, 0)
    batch = batch._replace(weights=jnp.zeros_like(batch.weights))
    moved, metrics = step(copy(state), batch)
    assert metrics["finite"]
    assert metrics["grad_norm"] == 0
    # Weight decay alone: norms are vectors.
    np.testing.assert_array_equal(
        moved.params["norm"]["weight"], state.params["norm"]["weight"]
    )


def test_one_compilation_per_shape(traces):
    config, mesh, tx, state, _ = set_up()
    step = steps.make_train_step(DECODER, tx, config, mesh)
    shapes = steps.state_shapes(DECODER, tx, config, mesh)
    state = jax.device_put(copy(state), sharding.of_state(shapes, mesh))
    for index in (0, 1, 2):
        batch = pipeline.Steps(config, toys.SOURCES)[index]
        state, _ = step(state, sharding.place(batch, mesh))
    assert traces == {"hidden": 1}


def test_the_decoder_is_what_training_needs():
    assert isinstance(DECODER, steps.TrainableLM)
