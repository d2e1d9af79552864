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
# `kvjax.testing.check_method` runs a method over random heads, as a model would, in a
# ragged batch, and compares with float64 loops that share no code with it. With a
# budget for everything it must be full attention. With a smaller one, its output must
# be attention over exactly what it says it attended to. A prompt in chunks is the
# prompt, rows do not see each other, a step copies nothing; and more.

# %%
import kvjax

checked = kvjax.testing.check_method(landmarks)
print(f"landmarks keeps {len(checked)} promises, such as:")
for promise in checked[3:7]:
    print(" ", promise.replace("_", " "))

# %% [markdown]
# A mistake shows. Here the oldest landmark is reported, but another token is read:


# %%
def wrong(*, budget: int = 128) -> Method:
    right = landmarks(budget=budget)

    def inspect_step(state, q):
        state, out, diagnostics = right.inspect_step(state, q)
        moved = diagnostics.attended.at[..., -1].add(1)
        return state, out, diagnostics._replace(attended=moved)

    return right._replace(inspect_step=inspect_step)


try:
    kvjax.testing.check_method(wrong)
except AssertionError as error:
    print("caught:", str(error).splitlines()[0])
else:
    raise RuntimeError("the tests see nothing")

# %% [markdown]
# ## Compared as every method is
#
# A pass key hidden in text, asked for at the end, and what a step reads.

# %%
from kvjax import accounting
from kvjax.evaluation import one_task
from kvjax.report import table
from models import embedded

kvjax.register(landmarks)  # known by name from here on, as kvjax's own are
model = kvjax.load("embedded-softmax", dtype="float32")
text = embedded.heldout_text()
print(f"{'method':<24}{'cache read per token':>22}{'pass key':>10}")
for name in ("quest:budget=64,page_size=8", "landmarks:budget=64"):
    method = kvjax.parse(name)
    result = one_task.run(
        "passkey", model, method, kvjax.full(), text, context=256, n=5, batch=5
    )
    read = table.format_bytes(accounting.bytes_read(method, model.decoder, 256))
    print(f"{name:<28}{read:>18}{result['accuracy']['mean']:>10.0%}")

# %% [markdown]
# ## On the command line
#
# In a file `my_methods.py` it is a method on every command, with no registration:
# `kvjax compare --method my_methods:landmarks,budget=64 --method quest:budget=64`. A
# package that installs it names it once in its `pyproject.toml`, and `landmarks` is a
# name like `quest` wherever the package is installed:
#
# ```toml
# [project.entry-points."kvjax.methods"]
# landmarks = "my_methods:landmarks"
# ```
#
# To make it one of kvjax's own: this file in `kvjax/methods`, with a docstring as its
# neighbours have, one import line in `kvjax/registry/built_in.py`, and a test of what
# its paper promises.
