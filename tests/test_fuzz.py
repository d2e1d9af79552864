"""Files and arguments of any content: they work, or one line says what is wrong.

KVJAX_FUZZ is the number of examples a test, and random ones then; without it few, and
the same ones always.
"""

import os
import pathlib
import random
import struct
import traceback

import checkpoints
import gguf_files
import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny import SMALL, tiny_model

import models
from kvjax import accounting, registry
from kvjax.decoding import generate
from kvjax.decoding.sampling import Sampling
from kvjax.interface import Method
from models.gguf import header
from models.gguf import tokenizer as gguf_tokenizer
from models.llama import LlamaDecoder, from_hf, notes, to_hf

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
ROOT = pathlib.Path(models.__file__).parents[1]
ROOMS = ("kvjax", "models", "pallas_kernels")
NUMBER = int(os.environ.get("KVJAX_FUZZ", "0"))


def examples(few: int):
    return hypothesis.settings(
        max_examples=NUMBER or few,
        derandomize=not NUMBER,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def works_or_says(run):
    """Returns what it gives, None after an error that a user can read.

    It is one line, raised by a check of ours, and not what Python says of a value.
    """
    try:
        return run()
    except (ValueError, FileNotFoundError) as error:
        *_, last = traceback.walk_tb(error.__traceback__)
        where = pathlib.Path(last[0].f_code.co_filename)
        assert any(where.is_relative_to(ROOT / room) for room in ROOMS)
        message = str(error)
        assert len(message.split()) > 2, message
        assert "\n" not in message
        for phrase in ("could not convert", "invalid literal", "unpack", "math domain"):
            assert phrase not in message
        return None


# --- config.json

WORDS = st.sampled_from(
    [
        *("yarn", "llama3", "linear", "dynamic", "longrope", "default", "mrope"),
        *("full_attention", "sliding_attention", "bfloat16", "float16", "int8"),
        *(*models.llama.MODEL_TYPES, "gpt2", "silu", "", "\x00", "名"),
    ]
)
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, 10**40, 10**400, -(10**400), True, False]),
    st.sampled_from([0.0, -0.0, 1.0, 0.5, 1e-5, 8.0, 1e30, 1e308, -1.0]),
    st.sampled_from([float("inf"), float("-inf"), float("nan"), 5e-324]),
)
LEAVES = st.one_of(st.none(), NUMBERS, WORDS)
KEYS = st.sampled_from(
    [
        *("factor", "type", "rope_type", "rope_theta", "low_freq_factor", "beta_fast"),
        *("high_freq_factor", "original_max_position_embeddings", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate", "attn_factor"),
        *("short_factor", "long_factor", "partial_rotary_factor", "mrope_section"),
        *("model_type", "rope_scaling", "layer_types", "name", "bits", "head_dim"),
        *("hidden_size", "num_hidden_layers"),
    ]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)
    ),
    max_leaves=8,
)
READ = [
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window"),
    *("max_window_layers", "layer_types", "max_sequence_length", "no_rope_layers"),
    *("no_rope_layer_interval", "attention_bias", "mlp_bias", "qkv_bias", "bias"),
    *("attention_out_bias", "tie_word_embeddings", "attention_alpha", "torch_dtype"),
    *("dtype", "original_max_position_embeddings", "text_config", "hidden_act"),
    *("quantization_config", "partial_rotary_factor", "embedding_multiplier"),
    *("logits_scaling", "residual_multiplier", "attention_multiplier", "anything"),
]
GIVEN = [
    *checkpoints.CONFIGS.values(),
    *(twin.config for twin in checkpoints.FAMILIES.values()),
]


@examples(300)
@hypothesis.given(
    st.sampled_from(GIVEN),
    st.dictionaries(st.sampled_from(READ), VALUES, max_size=4),
    st.lists(st.sampled_from(READ), max_size=2),
)
def test_config_json(config, change, removed):
    config = config | change
    config = {key: value for key, value in config.items() if key not in removed}
    found = works_or_says(lambda: from_hf(config))
    if found is None:
        return
    assert 1 <= found.context < 2**31
    notes(found)
    decoder = LlamaDecoder(found)
    spec = decoder.cache_spec(1, 8)
    assert accounting.bytes_held(registry.parse("full"), decoder, 8, 1) > 0
    if found.head_dim <= 256:
        one = jnp.ones((1, 1, 2, found.head_dim))
        assert np.isfinite(spec.rope(one, jnp.ones((1, 2), jnp.int32))).all()
    works_or_says(lambda: to_hf(found))


@examples(20)
@hypothesis.given(VALUES)
def test_what_is_no_config_at_all(content):
    works_or_says(lambda: from_hf(content))


# --- GGUF


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return gguf_files.write(folder / "tiny.gguf", checkpoints.CONFIGS["gqa"], "F32")


def _header_and_all_but_weights(path):
    opened = header.read(path)
    gguf_tokenizer.load(opened)
    gguf_tokenizer.eos_ids(opened)
    return models.load_decoder(path)


@examples(150)
@hypothesis.given(
    st.integers(0, 2**32 - 1), st.sampled_from(["flip", "cut", "insert", "number"])
)
def test_damaged_gguf_headers(gguf_file, seed, kind):
    rng = random.Random(seed)
    data = bytearray(gguf_file.read_bytes())
    start = data.index(b"blk.0.") + 2000  # all metadata, and most names of tensors
    for _ in range(rng.choice([1, 1, 1, 3, 10])):
        place = rng.randrange(4, min(start, len(data) - 9))
        if kind == "flip":
            data[place] = rng.randrange(256)
        elif kind == "cut":
            del data[place : place + rng.randrange(1, 9)]
        elif kind == "insert":
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        else:
            number = rng.choice([0, 1, 12, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            data[place : place + 8] = struct.pack("<Q", number)
    damaged = gguf_file.with_name("damaged.gguf")
    damaged.write_bytes(data)
    works_or_says(lambda: _header_and_all_but_weights(damaged))


GGUF_KEYS = [
    "general.architecture",
    *(f"llama.{key}" for key in ("block_count", "context_length", "embedding_length")),
    *(f"llama.{key}" for key in ("feed_forward_length", "vocab_size", "expert_count")),
    *(f"llama.attention.{key}" for key in ("head_count", "head_count_kv")),
    *(f"llama.attention.{key}" for key in ("key_length", "value_length")),
    *(f"llama.attention.{key}" for key in ("sliding_window", "causal")),
    "llama.attention.layer_norm_rms_epsilon",
    *(f"llama.rope.{key}" for key in ("freq_base", "scale_linear", "dimension_count")),
    *(f"llama.rope.scaling.{key}" for key in ("type", "factor", "attn_factor")),
    *(f"llama.rope.scaling.{key}" for key in ("original_context_length",)),
    *(f"llama.rope.scaling.yarn_{key}" for key in ("log_multiplier", "beta_fast")),
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "merges")),
    *(f"tokenizer.ggml.{key}" for key in ("token_type", "scores", "bos_token_id")),
    *(f"tokenizer.ggml.{key}" for key in ("eos_token_id", "add_bos_token")),
    "tokenizer.chat_template",
]
GGUF_VALUES = st.one_of(
    st.integers(0, 70),
    st.sampled_from([2**31, 2**32 - 1, True, False]),
    st.sampled_from([0.0, -1.0, 1.0, 4.0, 1e38, float("inf"), float("nan")]),
    st.sampled_from(["llama", "qwen2", "gpt2", "gpt-2", "yarn", "linear", "none", ""]),
    st.lists(st.integers(0, 70), min_size=1, max_size=3),
    st.lists(st.sampled_from(["a", "b", "a b", "", " "]), min_size=1, max_size=3),
)


@examples(60)
@hypothesis.given(
    st.dictionaries(st.sampled_from(GGUF_KEYS), GGUF_VALUES, min_size=1, max_size=3)
)
def test_gguf_metadata(gguf_file, change):
    path = gguf_file.with_name("odd.gguf")
    if not isinstance(change.get("general.architecture", "llama"), str):
        change.pop("general.architecture")  # what the writer itself refuses
    gguf_files.write(path, checkpoints.CONFIGS["gqa"], "F32", change=change)
    works_or_says(lambda: _header_and_all_but_weights(path))


# --- method specs

NAMES = [*registry.names(), *registry.transforms(), "qest", "", "full ", "é"]
NAMES += ["kvjax:quest", "kvjax:retro", "math:floor", "no.such:thing", "math:"]
KNOWN = (*registry.names(), *registry.transforms())
OPTION_NAMES = sorted({key for name in KNOWN for key in registry.options(name)})
OPTION_VALUES = st.one_of(
    st.integers(-2, 70).map(str),
    st.sampled_from(["0.5", "-1e9", "nan", "inf", "-inf", "1e400", "none", "None"]),
    st.sampled_from(["true", "false", "", " ", "9" * 30, "9" * 5000, "1_0", "٣"]),
    st.sampled_from(["exact", "max", "mean", "kv", "query", "gaussian", "post", "="]),
    st.text(max_size=4),
)


@st.composite
def specs(draw):
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(NAMES))
        known = OPTION_NAMES
        if name in KNOWN:
            known = [*registry.options(name), "x"]
        keys = draw(st.lists(st.sampled_from(known), max_size=3))
        given = [f"{key}={draw(OPTION_VALUES)}" for key in keys]
        parts.append(f"{name}:{','.join(given)}" if given else name)
    return "+".join(parts)


@examples(300)
@hypothesis.given(st.one_of(specs(), st.text(max_size=12)))
def test_method_specs(spec):
    found = works_or_says(lambda: registry.parse(spec))
    if found is None:
        return
    assert isinstance(found, Method)
    assert registry.parse(registry.canonical(spec)) is not None


# --- prompts and options

MODEL = tiny_model(num_layers=1)
METHODS = [registry.parse(name, **SMALL) for name in ("full", "streaming_llm")]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.integers(0, 9),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.sampled_from([np.int64(3), np.float32(2), np.bool_(True), np.array([1, 2])]),
    st.sampled_from([np.zeros((0,)), np.zeros((2, 2)), np.array(3), object, {}, set()]),
    st.lists(st.integers(-1, 270), max_size=4),
    st.lists(st.text(max_size=2), max_size=2),
)
PROMPTS = st.one_of(ODD, st.lists(ODD, max_size=3), st.lists(st.lists(ODD, max_size=3)))
SAMPLINGS = st.one_of(ODD, st.builds(Sampling, ODD, ODD, ODD, ODD, ODD))
OPTIONS = {
    **dict.fromkeys(("max_new_tokens", "stop", "eos_ids", "seed"), ODD),
    **dict.fromkeys(("chunk_size", "stream_every"), ODD),
    "sampling": SAMPLINGS,
}


@examples(200)
@hypothesis.given(
    st.sampled_from(METHODS), PROMPTS, st.fixed_dictionaries({}, optional=OPTIONS)
)
def test_prompts_and_options(method, prompts, options):
    if isinstance(prompts, str):
        return  # a TypeError by design
    works_or_says(lambda: generate.stream(MODEL, method, prompts, **options))
