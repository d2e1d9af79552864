"""Schedules against their formulas; optimizers against their published updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from kvjax.training import optim


def rates(*changes):
    config = toys.config(
        "optimizer.lr=2.0", "optimizer.warmup=4", "optimizer.final=0.25", *changes
    )
    return np.asarray(optim.schedule(config)(np.arange(config.steps)))


def test_warm_up_is_linear_and_ends_at_the_rate():
    np.testing.assert_allclose(
        rates("optimizer.schedule=constant"), [0.5, 1, 1.5, *[2] * 9]
    )


def test_a_constant_rate_decays_over_the_last_steps():
    found = rates("optimizer.schedule=constant", "optimizer.decay_steps=4")
    np.testing.assert_allclose(found[7:], [2, 1.625, 1.25, 0.875, 0.5])


def test_linear_and_cosine_end_at_the_final_share():
    linear = rates("optimizer.schedule=linear")
    done = np.arange(9) / 8
    np.testing.assert_allclose(linear[3:], 2 - 1.5 * done, rtol=1e-6)
    cosine = rates("optimizer.schedule=cosine")
    np.testing.assert_allclose(
        cosine[3:], 0.5 + 1.5 * (1 + np.cos(np.pi * done)) / 2, rtol=1e-5
    )


def tree():
    rng = np.random.default_rng(0)
    shapes = {"inner": (6, 4), "embedding": (toys.VOCAB, 4), "norm": (4,)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def updates(*changes, grads):
    config = toys.config("optimizer.schedule=constant", "optimizer.warmup=0", *changes)
    tx = optim.optimizer(config, toys.VOCAB)
    params = tree()
    return tx.update(grads, tx.init(params), params)[0]


def test_adamw_decays_matrices_only():
    grads = jax.tree.map(jnp.zeros_like, tree())
    found = updates("optimizer.lr=0.5", "optimizer.weight_decay=0.2", grads=grads)
    for name, leaf in tree().items():
        share = 0.0 if name == "norm" else 0.5 * 0.2
        np.testing.assert_allclose(found[name], -share * leaf, rtol=1e-6)


def test_the_first_step_of_adamw_is_the_rate_with_the_gradients_sign():
    grads = tree()
    found = updates("optimizer.weight_decay=0", "optimizer.clip=0", grads=grads)
    for name, leaf in grads.items():
        np.testing.assert_allclose(found[name], -0.01 * np.sign(leaf), rtol=1e-3)


def test_muon_moves_inner_matrices_by_something_orthogonal_and_the_rest_as_adamw():
    grads = tree()
    plain = ["optimizer.weight_decay=0", "optimizer.clip=0"]
    found = updates("optimizer.name=muon", *plain, grads=grads)
    adamw = updates(*plain, grads=grads)
    for name in ("embedding", "norm"):
        np.testing.assert_array_equal(found[name], adamw[name])
    sizes = np.linalg.svd(np.asarray(found["inner"]), compute_uv=False)
    # Newton-Schulz brings singular values near 1; 0.2 * sqrt(6) makes adamw's size.
    assert sizes.max() < 1.3 * 0.01 * 0.2 * 6**0.5
    assert sizes.min() > 0.6 * 0.01 * 0.2 * 6**0.5
    assert np.vdot(found["inner"], grads["inner"]) < 0


def test_muon_decays_what_adamw_decays():
    grads = jax.tree.map(jnp.zeros_like, tree())
    found = updates("optimizer.name=muon", "optimizer.weight_decay=0.5", grads=grads)
    assert not found["norm"].any()
    for name in ("inner", "embedding"):
        np.testing.assert_allclose(found[name], -0.005 * tree()[name], rtol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_clipping_bounds_the_norm_of_the_gradient(clip):
    # The first momentum shows it: (1 - b1) times the clipped gradient.
    config = toys.config(f"optimizer.clip={clip}")
    tx, params = optim.optimizer(config, toys.VOCAB), tree()
    state = tx.update(params, tx.init(params), params)[1]
    mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in params.values()))
    scale = 0.1 * min(1.0, clip / norm if clip else 1.0)
    for name, leaf in params.items():
        np.testing.assert_allclose(mu[name], scale * leaf, rtol=1e-5)


def is_adam(x):
    return hasattr(x, "mu")
