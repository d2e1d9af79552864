"""Attention of models that repeat tokens, in training: against loops over pairs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles.phd
import pytest
import toys
from jax.sharding import NamedSharding, PartitionSpec
from tiny import tiny_model

from kvjax.copies import Copies
from kvjax.rope import Rope
from kvjax.training import attention, phd
from kvjax.training import step as steps
from kvjax.training.attention import causal_attention
from kvjax.training.batch import Batch
from kvjax.training.config import RefreshKV
from kvjax.training.phd import phd_attention
from models.llama import LlamaDecoder

LENGTH = 11
# Copies, window and chunk: of PHD, its windows, and windows in chunks; odd ones too.
SIZES = [(2, 0, 0), (3, 0, 4), (2, 1, 4), (2, 16, 8), (3, 4, 4), (5, 4, 8), (4, 1, 0)]
SIZES += [(3, 16, 0)]
ROPE = Rope(4)


@functools.cache
def heads(rows, batch=2):
    rng = np.random.default_rng(rows)
    q = 2 * rng.standard_normal((batch, 4, rows, 4)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, 2, rows, 4)).astype(np.float32)
    return q, k, v


def attend(sizes, q, k, v, **options):
    made = phd_attention(ROPE, copies=Copies(*sizes), **options)
    return jax.jit(functools.partial(made, 0))(q, k, v)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_copies_attend_as_defined(sizes):
    """Over blocks of four positions, the last of which is not whole, in two groups."""
    given = heads(sizes[0] * LENGTH)
    expected = oracles.phd.attention(*given, *sizes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(phd, "CPU_SCORES", 0)
        patched.setattr(phd, "CPU_MIN_BLOCK", 4)
        patched.setattr(phd, "MAX_GROUPS", 2)
        out = attend(sizes, *given)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    # Originals are the vanilla model's, to the bit: one function computes them.
    vanilla = jax.jit(functools.partial(causal_attention(ROPE), 0))
    own = [x[:, :, :LENGTH] for x in given]
    np.testing.assert_array_equal(out[:, :, :LENGTH], vanilla(*own))


def test_packed_rows_equal_their_sequences_alone():
    """Chunks are counted from the start of each sequence; padding gives 0."""
    sizes = (3, 4, 4)
    given = heads(sizes[0] * LENGTH)
    segments = np.array([[1] * 3 + [2] * 6 + [0] * 2] * 2, np.int32)
    positions = np.array([[*range(3), *range(6), 0, 0]] * 2, np.int32)
    out = attend(
        sizes,
        *given,
        segments=jax.device_put(segments),
        positions=jax.device_put(positions),
    )
    expected = oracles.phd.attention(*given, *sizes, starts=(0, 3, 9))
    split = (2, 4, sizes[0], LENGTH, 4)
    out, expected = (np.asarray(x).reshape(split) for x in (out, expected))
    np.testing.assert_allclose(out[:, :, :, :9], expected[:, :, :, :9], atol=2e-6)
    assert not out[:, :, :, 9:].any()


DECODER = toys.decoder()
REPEATING = LlamaDecoder(
    dataclasses.replace(DECODER.config, copies=2, copy_window=4, copy_chunk=4)
)


@functools.cache
def params():
    return jax.jit(DECODER.init, static_argnums=0)(0)


def batch_of(length=8, rows=2, **fields):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, toys.VOCAB, (rows, length + 1)).astype(np.int32)
    ones = np.ones((rows, length), np.float32)
    made = Batch(
        tokens[:, :-1], tokens[:, 1:], ones, ones > 2, np.int32(0 * ones), None, None
    )
    return jax.tree.map(jax.device_put, made._replace(**fields))


def test_the_loss_is_of_the_last_copy_alone():
    """By the oracle's attention on a vanilla model that is fed all rows."""
    batch = batch_of()
    config = DECODER.config

    def by_hand(params):
        rows = jnp.tile(batch.tokens, (1, 2))
        mask = oracles.phd.mask(8, 2, 4, 4)
        order = np.arange(16).reshape(2, 8).T.ravel()
        sees = np.zeros((16, 16), bool)
        sees[np.ix_(order, order)] = mask

        def dense(layer, q, k, v):
            del layer
            place = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32) % 8, (2, 16))
            q, k = config.rope(q, place), config.rope(k, place)
            k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
            logits = jnp.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
            weights = jax.nn.softmax(jnp.where(sees, logits, -1e30), -1)
            return jnp.einsum("bhts,bhsd->bhtd", weights, v)

        hidden = DECODER.hidden(params, rows, dense)[:, 8:]
        return steps.cross_entropy(DECODER.logits(params, hidden), batch.targets)[0]

    def ours(remat, params):
        return steps.token_losses(REPEATING, params, batch, remat=remat)[0]

    def both(losses):
        return jax.jit(jax.value_and_grad(lambda p: losses(p).sum()))(params())

    value, gradient = both(by_hand)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    close = functools.partial(np.testing.assert_allclose, atol=1e-5 * scale)
    for remat in (False, True):
        mine, mine_gradient = both(functools.partial(ours, remat))
        np.testing.assert_allclose(mine, value, rtol=1e-5)
        jax.tree.map(close, mine_gradient, gradient)


def test_memory_is_linear_in_the_length():
    """A step of twice as many tokens holds about twice as much."""

    def held(length):
        shape = jax.ShapeDtypeStruct((1, 2, 2 * length, 4), jnp.float32)
        made = phd_attention(ROPE, copies=Copies(2, 4, 8), block=16)
        loss = jax.grad(lambda q, k, v: made(0, q, k, v).sum(), (0, 1, 2))
        compiled = jax.jit(loss).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    with pytest.MonkeyPatch.context() as patched:
        for module in (phd, attention):
            patched.setattr(module, "CPU_SCORES", 0)
            patched.setattr(module, "CPU_MIN_BLOCK", 16)
            patched.setattr(module, "MAX_GROUPS", 1)
        assert held(512) < 2.5 * held(256)


def test_far_hidden_tokens_do_not_matter():
    """Without chunks two layers reach 2 * ceil(W / (K - 1)) tokens back, no further."""
    vanilla, tokens = tiny_model(), np.arange(2 * LENGTH, dtype=np.int32)[None] % LENGTH
    attend = phd_attention(vanilla.decoder.rope, copies=Copies(2, 2, 0))
    run = jax.jit(
        lambda rows: vanilla.decoder.hidden(vanilla.params, rows, attend)[0, LENGTH:]
    )
    before = np.asarray(run(jax.device_put(tokens)))
    other = tokens.copy()
    other[0, LENGTH + 3] = 77  # the copy of token 3 is another token
    moved = (np.asarray(run(jax.device_put(other))) != before).any(-1)
    assert np.flatnonzero(moved).tolist() == [3, 4, 5, 6, 7]
    other = tokens.copy()
    other[0, 3] = 77  # its original
    moved = (np.asarray(run(jax.device_put(other))) != before).any(-1)
    assert np.flatnonzero(moved).tolist() == list(range(3, LENGTH))


def test_rows_over_two_devices_are_the_same():
    """Copies are rows of a sequence, and sequences go over the devices as before."""
    sizes = SIZES[3]
    given = heads(sizes[0] * LENGTH)
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("data",))
    placed = NamedSharding(mesh, PartitionSpec("data"))
    out = attend(sizes, *(jax.device_put(x, placed) for x in given))
    assert out.sharding.is_equivalent_to(placed, 4)
    np.testing.assert_allclose(out, attend(sizes, *given), atol=1e-6)


def test_copies_are_not_alike():
    """Copy j sees its token j times: without that rule the model would be vanilla."""
    given = heads(2 * LENGTH)
    half = [np.concatenate([x[:, :, :LENGTH]] * 2, axis=2) for x in given]
    first, second = np.split(np.asarray(attend((2, 0, 0), *half)), 2, axis=2)
    assert np.abs(first - second)[:, :, 1:].max(-1).min() > 1e-5


def test_shapes_that_disagree_are_named():
    q, k, v = heads(2 * LENGTH)
    for name in ("segments", "positions"):
        wrong = {name: jnp.ones((2, 2 * LENGTH), jnp.int32)}
        with pytest.raises(
            ValueError, match=rf"{name} \(2, 22\) must be .*\(2, 11\): q"
        ):
            attend((2, 4, 4), q, k, v, **wrong)
    with pytest.raises(ValueError, match="must have a multiple of 3 rows"):
        attend((3, 4, 4), q, k, v)


def test_one_setting_of_attention_at_a_time():
    setting = RefreshKV(decoded=2, budget=4)
    with pytest.raises(ValueError, match=r"refreshkv and 2 copies .* leave one"):
        steps.token_losses(REPEATING, params(), batch_of(), setting=setting)
    for change in ("refreshkv.decoded=2", "lora.rank=2"):
        with pytest.raises(ValueError, match=r"model.copies=2 trains all weights"):
            toys.config("model.copies=2", change, model={"checkpoint": "a"})
