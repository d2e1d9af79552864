# %% [markdown]
# # Long contexts on one chip
#
# Colab's TPU v5e-1 or v6e-1, or a GPU. The kernels are checked against their
# definitions on the chip that is really here; then every operation is timed beside the
# time that its bytes alone would take; then a model decodes under several methods,
# beside the time that the bytes of a step would take. With no accelerator all of it
# runs too, small. The model is of the hub, else SmolLM2, else one that ships with
# kvjax.

# %%
import socket

import jax.numpy as jnp
import numpy as np

import models
from models import embedded, published

on_accelerator = jax.default_backend() != "cpu"


def has_network() -> bool:
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True


# Any Llama, Mistral, Qwen2 or Qwen3 of the hub; this one needs no account.
HUB_MODEL = "unsloth/Llama-3.2-1B"
if on_accelerator and has_network():
    NAME, DTYPE, CONTEXT, BUDGET, STEPS = HUB_MODEL, "bfloat16", 32768, 1024, 16
else:
    NAME, DTYPE, CONTEXT, BUDGET, STEPS = "smollm2", "float32", 256, 64, 4
    if on_accelerator:
        DTYPE, CONTEXT, BUDGET, STEPS = "bfloat16", 8192, 1024, 16
    try:
        published.fetch(NAME)  # once: 93 MB, Apache-2.0
    except (OSError, ImportError) as error:
        NAME = embedded.DEFAULT
        print(f"{error}\nGoing on with {NAME}.")
print(f"{NAME}: {CONTEXT:,} tokens, budgets of {BUDGET}")

# %% [markdown]
# ## The kernels, checked here
#
# Each operation is defined in XLA and has kernels for some chips.
# `implementation="xla"` asks for the definition; `None` takes what this chip has. The
# largest relative error of a row must be that of the dtype.

# %%
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.entmax import solve
from pallas_kernels.page_attention import page_attention
from pallas_kernels.page_scores import page_bounds
from pallas_kernels.topk import top_k

tokens = 16384 if on_accelerator else 256
dtype = jnp.bfloat16 if on_accelerator else jnp.float32
heads, group, size, page = (8, 4, 128, 64) if on_accelerator else (2, 2, 64, 16)
pages = tokens // page
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)


q = normal(1, heads * group, 1, size)
k, v = normal(1, heads, tokens, size), normal(1, heads, tokens, size)
fused = jnp.concatenate([k, v], -1).reshape(1, heads, pages, page, 2 * size)
low, high = (
    f(k.reshape(1, heads, pages, page, size), axis=3) for f in (jnp.min, jnp.max)
)
chosen = [np.sort(rng.permutation(pages)[: pages // 4]) for _ in range(heads)]
ids = jnp.asarray(np.stack(chosen)[None], jnp.int32)
position = jnp.full((1, 1), tokens - 1, jnp.int32)
scores = jnp.asarray(rng.standard_normal((heads, tokens)), jnp.float32)
scale = {"sm_scale": size**-0.5}
checks = {
    "decode_attention": lambda **o: decode_attention(q, k, v, position, **scale, **o),
    "entmax threshold": lambda **o: solve(scores, alpha=1.5, **o),
    "page_attention": lambda **o: page_attention(q, fused, ids, position, **scale, **o),
    "page_bounds": lambda **o: page_bounds(q[:, :, 0], low, high, **o),
    "top_k": lambda **o: top_k(scores, 64, **o),
}
for name, run in checks.items():
    expected = jax.tree.leaves(jax.jit(lambda run=run: run(implementation="xla"))())
    compiled = jax.jit(run).lower().compile()
    has_kernel = "custom_call" in compiled.as_text() and on_accelerator
    worst = 0.0
    for a, b in zip(jax.tree.leaves(compiled()), expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max() / np.abs(b).max()
        worst = max(worst, float(error))
    what = "a kernel" if has_kernel else "the definition: no kernel for this chip"
    print(f"{name:<20}{worst:.1e}  {what}")
    assert worst < (3e-2 if dtype == jnp.bfloat16 else 1e-5), name

# %% [markdown]
# ## How fast the operations are
#
# One attention layer of an 8B model (here on a CPU: a small one). The floor is the
# time of the bytes at the speed of a copy, measured in the same run.

# %%
from kvjax.cost import bench_kernels

sizes = bench_kernels.Sizes(CONTEXT, BUDGET, page, dtype=jnp.dtype(dtype).name)
if not on_accelerator:
    sizes = sizes._replace(num_kv_heads=1, group=2, head_dim=32)
wanted = ("copy", "full", "page_bounds", "top_k", "page_attention", "sparse")
operations = {n: o for n, o in bench_kernels.operations(sizes).items() if n in wanted}
seconds = {n: np.median(s) for n, s in bench_kernels.measure(operations, 3).items()}
bandwidth = operations["copy"].num_bytes / seconds["copy"]
print(f"copy: {bandwidth / 1e9:.0f} GB/s; one layer at {CONTEXT:,} tokens")
for name, operation in operations.items():
    floor = operation.num_bytes / bandwidth
    print(f"{name:<16}{1e3 * seconds[name]:>9.3f} ms   floor {1e3 * floor:>7.3f} ms")

# %% [markdown]
# ## How fast a model decodes
#
# What `kvjax bench decode` prints: the same prompt under each method, steps after it,
# and the share of them that the bytes of a step take at the speed of a copy.

# %%
from kvjax.cost import bench_decode

model = models.load(NAME, dtype=DTYPE)
text = model.tokenizer.encode(embedded.heldout_text())
specs = ["full", f"quest:budget={BUDGET}"]
if on_accelerator:
    specs += [f"streaming_llm:budget={BUDGET}", f"cascade:budget={BUDGET}"]
    specs += [f"snapkv:budget={BUDGET}", f"h2o:budget={BUDGET}"]
    specs += [f"tova:budget={BUDGET}", f"refreshkv:budget={BUDGET}"]
rows = bench_decode.run(model, specs, text, contexts=[CONTEXT], steps=STEPS)
print(f"{'method':<28}{'MB / step':>10}{'tokens/s':>10}{'of roofline':>13}")
for row in rows:
    share = row.floor / row.median
    megabytes = row.num_bytes / 1e6
    rate = row.tokens_per_second
    print(f"{row.method:<28}{megabytes:>10.1f}{rate:>10.1f}{share:>13.0%}")
