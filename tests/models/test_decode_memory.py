"""No decode step copies a cache: temporaries at an 8B model's cache shapes, 128K.

Compiled ahead of time, never run: for this CPU, and for a real TPU that is not there.
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from aot import gpu, tpu
from jax.sharding import SingleDeviceSharding

from kvjax import registry
from kvjax.interface import layer_specs
from kvjax.rope import Rope
from kvjax.stores import buffers
from models.llama.config import LlamaConfig
from models.llama.model import LlamaDecoder
from pallas_kernels import dispatch

CONTEXT = 131_072
# The heads of an 8B Llama; a narrow width, since weights are not what is asked about.
CONFIG = LlamaConfig(
    vocab_size=512,
    width=256,
    num_layers=1,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=512,
    context=CONTEXT,
    rope=Rope(128, theta=500_000.0),
)
# Logits of one layer at a time: 32 heads x 131,072 x float32 is 16.8 MB. XLA's CPU
# backend keeps two such arrays, three where all tokens are ranked, and packs Quest's
# summaries for its matmul. One layer's keys alone are 537 MB.
LOGITS = 32 * CONTEXT * 4
CPU_LIMIT = 4 * LOGITS + 8_000_000
TPU_LIMIT = 16_000_000
GPU_LIMIT = 16_000_000

COMPILED = {}  # by program and device


@pytest.fixture(autouse=True)
def optimised():
    """The suite compiles without optimisations; here they are the subject."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def compile_step(name, dtype, sharding=None, batch=1):
    innermost = name.split("+")[-1].split(":")[0]
    alpha = 1.0 if innermost in registry.names(1.0) else 1.5
    # A copy shows in one layer as it does in many; a layer unlike the rest is one more.
    layers = 1 + name.startswith("dense_layers")
    config = dataclasses.replace(
        CONFIG, num_layers=layers, dtype=dtype, attention_alpha=alpha
    )
    decoder = LlamaDecoder(config)
    method = registry.parse(name, budget=2048)
    specs = layer_specs(decoder, batch, CONTEXT // batch, 1024)

    def states():
        return tuple(method.finish(method.init(spec)) for spec in specs)

    def step(params, states, tokens):
        return decoder.decode_step(params, states, tokens, method)

    tokens = jax.ShapeDtypeStruct((batch, method.rows), jnp.int32)
    arguments = (decoder.param_shapes(), jax.eval_shape(states), tokens)
    if sharding is not None:
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            arguments,
        )
    lowered = jax.jit(step, donate_argnums=1).lower(*arguments)
    text = lowered.as_text(), str(sharding)
    if text not in COMPILED:  # what evicts a prompt alone decodes as others do
        COMPILED[text] = lowered.compile().memory_analysis()
    return COMPILED[text], buffers.num_bytes(arguments[1])


@pytest.mark.parametrize("batch", [1, 2], ids="B{}".format)
@pytest.mark.parametrize("name", registry.names())
def test_cpu_temporaries_are_logits_not_caches(name, batch):
    memory, held = compile_step(name, "float32", batch=batch)
    # It alone ranks the tokens of all rows at once: 2.5 such arrays a row.
    more = LOGITS if (name, batch) == ("topk_completion", 2) else 0
    assert memory.temp_size_in_bytes < CPU_LIMIT + more
    assert memory.alias_size_in_bytes >= held


# A step that writes several tokens again, into pages and into a dense layer.
REVISING = "dense_layers:first=1+retro:window=4+quest"
# Codes and scales, read by kernels where XLA lays them out.
QUANTIZED = (
    "quantize:bits=4+quest:page_size=128",
    "quantize:bits=8+quest:page_size=64",
    "quantize:keys=8,values=4+full",
)


@pytest.mark.parametrize("name", [*registry.names(), REVISING, *QUANTIZED])
def test_tpu_temporaries_are_a_few_megabytes(name):
    pytest.importorskip("libtpu", reason=tpu.REASON)
    sharding = SingleDeviceSharding(tpu.topology("v5e").devices[0])
    memory, held = compile_step(name, "bfloat16", sharding)
    assert memory.temp_size_in_bytes < TPU_LIMIT
    assert memory.alias_size_in_bytes >= held


@pytest.mark.skipif(gpu.unavailable() is not None, reason=str(gpu.unavailable()))
def test_gpu_temporaries_are_a_few_megabytes():
    """Pages and their statistics are written where they are, and chosen ones read."""
    with gpu.target("h100") as sharding:
        memory, held = compile_step("quest", "bfloat16", sharding)
    assert memory.temp_size_in_bytes < GPU_LIMIT
    assert memory.alias_size_in_bytes >= held


@pytest.mark.skipif(gpu.unavailable() is not None, reason=str(gpu.unavailable()))
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("quantize:keys=8,values=4+full", "xla"),
        ("quantize:bits=4+quest", "xla"),
        ("quantize:bits=4+quest", "triton"),
    ],
)
def test_gpu_temporaries_of_a_quantised_cache(name, code, monkeypatch):
    """No copy of it, in floats or codes, whatever reads it."""
    if code == "xla":
        monkeypatch.setattr(dispatch, "_is_for_gpu", lambda: False)
    elif importlib.util.find_spec("jax_triton") is None:
        pytest.skip("Triton kernels need jax-triton: pip install 'kvjax[triton]'")
    with gpu.target("h100") as sharding:
        memory, held = compile_step(name, "bfloat16", sharding)
    assert memory.temp_size_in_bytes < GPU_LIMIT
    assert memory.alias_size_in_bytes >= held
