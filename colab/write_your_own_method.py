# %% [markdown]
# # A method of your own, in 40 lines
#
# A method is a `kvjax.Method`: pure functions over one layer's state. This one keeps
# every key and reads some: the newest tokens, and older ones at even distances. It is
# no good idea, but it is all there: state, prefill, step, accounting, diagnostics. What
# it attended to it says in one list a KV head: bytes are counted by these lists.

# %%
import jax.numpy as jnp

from kvjax import dense
from kvjax.attention.partials import softmax_only
from kvjax.interface import Diagnostics, Method, Traffic
from kvjax.stores import buffers, contiguous, kept_slots
from pallas_kernels.decode_attention import decode_attention


@softmax_only
def landmarks(*, budget: int = 128) -> Method:
    """Reads the newest tokens and, evenly spaced, as many older ones."""
    if budget < 2:
        raise ValueError(f"{budget=} must be at least 2 tokens.")
    window = budget // 2

    def chosen(length, heads):  # (B,) -> positions (B, Hkv, budget), -1 = none
        newest = length[:, None] - 1 - jnp.arange(window, dtype=jnp.int32)
        older, count = length - window, budget - window
        stride = jnp.maximum(-(-older // count), 1)
        steps = jnp.arange(count, dtype=jnp.int32)
        spread = older[:, None] - 1 - stride[:, None] * steps
        kept = jnp.maximum(jnp.concatenate([newest, spread], 1), -1)
        return jnp.repeat(kept[:, None], heads, axis=1)  # a list a KV head

    def inspect_step(state, q):
        rotated, positions = contiguous.rotate_queries(state.spec, q, state.length)
        kept = chosen(state.length, state.spec.num_kv_heads)
        k, v = buffers.gather(state.k, kept), buffers.gather(state.v, kept)
        out, lse = decode_attention(
            rotated, k, v, positions, kept, sm_scale=state.spec.sm_scale
        )
        exact = kept_slots.holds_all(kept, state.length, q.shape[1])
        diagnostics = Diagnostics(kept, lse, state.length <= budget, exact)
        return state, out.astype(q.dtype), diagnostics

    def traffic(spec, length):
        return Traffic(kv=buffers.kv_bytes(spec, min(budget, length)), metadata=0)

    # Everything else is that of attention to all tokens: one store, filled in order.
    return dense.method()._replace(inspect_step=inspect_step, traffic=traffic)


# %% [markdown]
# ## Tested as every method is
#
# `tests/drive.py` runs a method over random heads, as a model would, in a ragged
# batch, and the oracles are float64 loops that share no code with the library. With a
# budget for everything it must be full attention. With a smaller one, its output must
# be attention over exactly what it says it attended to.

# %%
import pathlib
import sys

TESTS = pathlib.Path("../tests").resolve()  # in a clone, beside this notebook's folder
if TESTS.is_dir():
    sys.path.insert(0, str(TESTS))
    import drive
    import numpy as np
    import oracles

    stream = drive.make_stream(prompts=(1, 9, 22), steps=6, seed=1)
    spec = drive.make_spec(stream)

    everything = drive.run(landmarks(budget=28), spec, stream)
    drive.assert_matches(everything, stream, oracles.full)
    assert everything.diagnostics.exact.all()

    some = drive.run(landmarks(budget=8), spec, stream)
    drive.assert_consistent(some, stream)
    attended = drive.attended_positions(some.diagnostics.attended[-1, 2], num_q_heads=2)
    print("28 tokens, a budget of 8:", attended[0])

    # A prompt in chunks is the prompt.
    chunks = [(1, 4, 10), (0, 5, 12)]
    chunked = drive.run(landmarks(budget=8), spec, stream, chunks)
    np.testing.assert_allclose(chunked.out, some.out, atol=1e-5)
else:
    print("the tests lie in kvjax's repository: run this notebook in a clone of it.")

# %% [markdown]
# A mistake shows. Here the oldest landmark is reported, but another token is read:


# %%
def wrong(*, budget: int) -> Method:
    right = landmarks(budget=budget)

    def inspect_step(state, q):
        state, out, diagnostics = right.inspect_step(state, q)
        moved = diagnostics.attended.at[..., -1].add(1)
        return state, out, diagnostics._replace(attended=moved)

    return right._replace(inspect_step=inspect_step)


if TESTS.is_dir():
    try:
        drive.assert_consistent(drive.run(wrong(budget=8), spec, stream), stream)
    except AssertionError as error:
        print("caught:", str(error).splitlines()[0])
    else:
        raise RuntimeError("the tests see nothing")

# %% [markdown]
# ## Compared as every method is
#
# A pass key hidden in text, asked for at the end, and what a step reads.

# %%
import models
from kvjax import accounting
from kvjax.evaluation import one_task
from kvjax.report import table
from models import embedded

model = models.load("embedded-softmax", dtype="float32")
text = embedded.heldout_text()
methods = {
    "quest": kvjax.quest(budget=64, page_size=8),
    "landmarks": landmarks(budget=64),
}
print(f"{'method':<12}{'cache read per token':>22}{'pass key':>10}")
for name, method in methods.items():
    found = one_task.run(
        "passkey", model, method, kvjax.full(), text, context=256, n=5, batch=5
    )
    read = table.format_bytes(accounting.bytes_read(method, model.decoder, 256))
    print(f"{name:<12}{read:>22}{found['accuracy']['mean']:>10.0%}")

# %% [markdown]
# To keep it: a file in `kvjax/methods` with a docstring as its neighbours have, one
# import line in `kvjax/methods/__init__.py`. Then `pytest tests/test_contract.py -k
# landmarks` runs the whole contract on it, and `kvjax compare` and every other command
# know it by name.
