# %% [markdown]
# # Attention with zeros in it
#
# Softmax gives every token some weight, so whatever a KV-cache method leaves out is
# lost. Entmax gives exactly zero to what scores below a threshold: a method that reads
# all the rest loses nothing, and can prove it. Weights are trained for one or the
# other; the package ships a model of each.

# %%
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from pallas_kernels.entmax import entmax

scores = jnp.linspace(3.0, -3.0, 25)
sheet = Figure(figsize=(8, 2.6), layout="constrained")
axes = sheet.subplots(1, 3, sharey=True)
rows = {
    "softmax": jax.nn.softmax(scores),
    "entmax, alpha 1.5": entmax(scores, alpha=1.5),
    "sparsemax, alpha 2": entmax(scores, alpha=2.0),
}
for axis, (title, weights) in zip(axes, rows.items(), strict=True):
    axis.bar(range(25), weights, color="#1b6ca8")
    axis.set_title(f"{title}: {int((weights > 0).sum())} of 25", fontsize=10)
sheet

# %% [markdown]
# ## In a model
#
# The newest query of every head, at the end of a text: how many of the tokens have any
# weight at all? Under softmax it would be all of them.

# %%
import models
from kvjax import dense
from kvjax.decoding.generate import prefill
from models import embedded

text = embedded.heldout_text()
full = kvjax.full()


def tokens_with_weight(model, length=192):
    """Of each layer and query head, `(L, Hq)`."""
    tokens = model.tokenizer.encode(text)[:length]
    prompt = prefill(model, full, [tokens], max_new_tokens=1)

    @jax.jit
    def step(params, states, newest):
        counts = []

        def count(state, q):
            counts.append((dense.weights(state, q) > 0).sum(-1)[0, :, -1])
            return full.inspect_step(state, q)

        counting = full._replace(inspect_step=count)
        model.decoder.decode_step(params, states, newest, counting)
        return jnp.stack(counts)

    newest = jnp.asarray([[tokens[-1]]], jnp.int32)
    return np.asarray(step(model.params, prompt.states, newest))


model = models.load("embedded-entmax", dtype="float32")
counts = tokens_with_weight(model)
print("of 193 tokens, by layer (down) and query head:")
print(counts)
assert counts.min() >= 1

# %% [markdown]
# ## The certificate
#
# `entmaxkv` reads pages of keys by an upper bound of what they can score. If the
# bounds of all pages that were not read lie at or below the threshold of what was,
# nothing is missing: `Diagnostics.exact` says so, head by head and step by step. It is
# a proof, not an estimate: where it holds, the output is that of attention over
# everything.
#
# Below, one layer on random heads: a prompt of 240 tokens, then 16 decode steps under
# each method, beside dense entmax. The last line goes on reading until the proof is
# there.

# %%
from kvjax.interface import CacheSpec


def unrotated(x, positions, length=None):
    return x


sizes = {"batch": 1, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
spec = CacheSpec(**sizes, capacity=256, dtype="float32", rope=unrotated, alpha=1.5)
rng = np.random.default_rng(0)


def heads(number, scale=1.0):
    return scale * rng.standard_normal((1, number, 256, 16))


# Keys of a page are alike, as neighbours in a text are.
k = np.repeat(heads(2)[:, :, ::8], 8, axis=2) + heads(2, 0.15)
q, k, v = (jnp.asarray(x, jnp.float32) for x in (heads(4, 4.0), k, heads(2)))


def decode(method):
    """Outputs and diagnostics of the last 16 tokens."""

    def step(state, now):
        q, k, v = now
        state, out, found = method.inspect_step(method.append(state, k, v), q)
        return state, (out, found)

    parts = slice(240), slice(240, None)

    @jax.jit
    def run(q, k, v):
        prompt, later = ([x[:, :, part] for x in (q, k, v)] for part in parts)
        lengths = jnp.full((1,), 240, jnp.int32)
        state, _ = method.prefill(method.init(spec), *prompt, lengths)
        one_by_one = tuple(jnp.moveaxis(x[..., None, :], 2, 0) for x in later)
        return jax.lax.scan(step, method.finish(state), one_by_one)[1]

    return run(q, k, v)


expected, _ = decode(full)
print(f"{'entmaxkv':<40}{'read':>6}{'worst error':>14}{'proved':>9}")
for options in ("budget=32", "budget=96", "budget=32,certified=true"):
    out, found = decode(kvjax.parse(f"entmaxkv:{options},page_size=8,per=query"))
    error = jnp.linalg.norm(out - expected, axis=-1)[:, 0, :, 0]
    error = error / jnp.linalg.norm(expected, axis=-1)[:, 0, :, 0]
    exact = found.exact[:, 0]
    read = (found.attended >= 0).sum(-1).mean()
    print(f"{options:<40}{read:>6.0f}{error.max():>14.1e}{exact.mean():>9.0%}")
    # What is proved is true, whatever the budget.
    assert jnp.where(exact, error, 0.0).max() < 1e-5
assert exact.all()
