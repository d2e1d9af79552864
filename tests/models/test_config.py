"""`config.json` in and out: every spelling, and an error for what is not understood."""

import dataclasses
import json
import math
from pathlib import Path

import make_windows
import pytest
from checkpoints import BASE, CONFIGS, LLAMA3, YARN
from known_configs import LOADED, REFUSED

from kvjax.copies import Copies
from kvjax.rope import Rope
from models.llama import LlamaDecoder, from_hf, notes, to_hf

GOLDENS = Path(__file__).parent / "goldens"
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LINEAR = {"rope_scaling": {"type": "linear", "factor": 4.0}}
QWEN = BASE | {"model_type": "qwen2", "sliding_window": 32, "max_window_layers": 1}


def test_llama_31_8b():
    config = from_hf(LLAMA_31_8B)
    assert (config.num_layers, config.width, config.mlp_width) == (32, 4096, 14336)
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    assert (config.context, config.vocab_size) == (131072, 128256)
    assert (config.dtype, config.norm_epsilon) == ("bfloat16", 1e-5)
    assert config.rope == Rope(
        128, 500000.0, "llama3", factor=8.0, original_context=8192
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_read_back(name):
    config = from_hf(CONFIGS[name])
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_both_spellings_are_one(kind):
    plain = "gqa" if kind == "default" else kind
    old, new = from_hf(CONFIGS[plain]), from_hf(CONFIGS[f"unified_{kind}"])
    assert old == new
    assert old.rope.kind == kind
    assert old.rope.theta == 100.0


def test_saved_prompts_of_before_know_the_decoder():
    """By its text of 2026-11-30: what came later is in it where it says something."""
    config = dataclasses.replace(from_hf(BASE), rope=Rope(8))
    text = repr(LlamaDecoder(config))
    assert text.startswith("LlamaDecoder(config=LlamaConfig(vocab_size=")
    assert text.endswith("attention_alpha=1.0, unrotated_layers=()))")
    repeated = dataclasses.replace(config, copies=2)
    assert repr(LlamaDecoder(repeated)).endswith("unrotated_layers=(), copies=2))")


def test_type_and_rope_type_are_one():
    scaling = {key: value for key, value in YARN.items() if key != "rope_type"}
    assert from_hf(BASE | {"rope_scaling": scaling | {"type": "yarn"}}) == from_hf(
        BASE | {"rope_scaling": YARN}
    )


@pytest.mark.parametrize(
    ("change", "context"),
    [
        ({}, 64),
        # The file does not say whether 64 counts the factor, until it says it all.
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 64),
        (LINEAR | {"max_sequence_length": 256}, 256),
        (LINEAR | {"max_sequence_length": 1000}, 256),
        (LINEAR | {"max_sequence_length": 100}, 100),
        ({"max_sequence_length": 256}, 64),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.5}}, 160),
        ({"rope_scaling": LLAMA3}, 64),
        ({"rope_scaling": YARN}, 64),
        ({"rope_scaling": YARN | {"factor": 8.0}}, 128),
        # HF falls back to max_position_embeddings, and derives a missing factor.
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
        ({"rope_scaling": YARN | {"factor": None}}, 64),
        ({"model_type": "mistral", "sliding_window": 48}, 48),
        ({"model_type": "mistral", "sliding_window": 4096}, 64),
        ({"model_type": "mistral", "sliding_window": None}, 64),
        ({"model_type": "mistral", "max_position_embeddings": 5000}, 4096),
        (QWEN | {"use_sliding_window": False}, 64),
        (QWEN | {"use_sliding_window": True}, 32),
        (QWEN | {"use_sliding_window": True, "layer_types": ["sliding_attention"]}, 32),
    ],
)
def test_context(change, context):
    assert from_hf(BASE | change).context == context


def test_window_survives_a_round_trip_of_stretched_rope():
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    config = from_hf(BASE | scaled | {"model_type": "mistral", "sliding_window": 100})
    assert config.context == 100
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("family", "given", "biases"),
    [
        ("llama", {}, (False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("llama", {"mlp_bias": True}, (False, False, True)),
        ("mistral", {}, (False, False, False)),
        ("qwen2", {}, (True, False, False)),
        ("qwen3", {}, (False, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False)),
    ],
)
def test_biases(family, given, biases):
    config = from_hf(BASE | {"model_type": family} | given)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == biases
    assert config.qk_norm == (family == "qwen3")


def test_defaults_of_absent_keys():
    absent = ("num_key_value_heads", "rope_theta", "tie_word_embeddings")
    config = from_hf({k: v for k, v in BASE.items() if k not in absent})
    assert config.num_kv_heads == config.num_q_heads == 4
    assert config.rope == Rope(8, 10_000.0)
    assert (config.head_dim, config.tied_embeddings, config.dtype) == (
        8,
        False,
        "float32",
    )
    assert from_hf(BASE | {"model_type": "qwen3"}).head_dim == 128


def test_dtype_in_either_spelling_and_overridden():
    for key in ("dtype", "torch_dtype"):
        config = BASE | {key: "bfloat16"}
        assert from_hf(config).dtype == "bfloat16"
        assert from_hf(config, dtype="float32").dtype == "float32"


@pytest.mark.parametrize(
    "harmless",
    [
        {"hidden_act": "silu", "pretraining_tp": 1, "attention_dropout": 0.1},
        {"eos_token_id": [1, 2], "transformers_version": "9", "use_mrope": False},
        {"layer_types": ["full_attention", "full_attention"], "rope_scaling": None},
        {"foo": None, "partial_rotary_factor": 1.0, "head_dim": None},
        {"foo": False, "bar": [], "baz": {}, "qux": "", "pretraining_tp": 2},
        {"_anything": 3, "unsloth_version": "1", "is_llama_config": True},
        {"embd_pdrop": 0.1, "hidden_dropout": 0.1, "image_token_id": 3},
    ],
)
def test_harmless_keys(harmless):
    assert from_hf(BASE | harmless) == from_hf(BASE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type='gpt2' is not supported; supported: llama",
        ),
        ({"foo": 3}, "key foo=3 is not known"),
        ({"foo": 0}, "key foo=0 is not known"),
        ({"foo": True}, "key foo=True is not known"),
        ({"hidden_act": "gelu"}, "key hidden_act='gelu' is not supported; only 'silu'"),
        ({"is_causal": False}, "key is_causal=False is not supported; only True is"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0 is not supported; only 1.0 is"),
        ({"max_sequence_length": 0}, "max_sequence_length=0 must be an integer >= 1"),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
            "original_max_position_embeddings=16 disagrees with the 32 of its rope",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "unquantized checkpoint"),
        ({"layer_types": ["full_attention", "mamba"]}, "layer_types holds mamba"),
        ({"layer_types": ["sliding_attention"]}, "holds sliding_attention with"),
        ({"vocab_size": None, "rms_norm_eps": None}, "lacks vocab_size, rms_norm_eps"),
        ({"hidden_size": "32"}, "hidden_size='32' must be an integer"),
        ({"num_key_value_heads": 3}, "=4 must be a multiple of num_key_value_heads=3"),
        ({"sliding_window": 8}, "sliding_window=8 is not supported for llama"),
        ({"torch_dtype": "int8"}, "dtype='int8' is not supported; use float32"),
        (
            {"model_type": "mistral", "attention_bias": True},
            "attention_bias=True is not supported for mistral",
        ),
        (
            {"model_type": "qwen2", "attention_bias": False},
            "attention_bias=False is not supported for qwen2",
        ),
        (
            {"model_type": "qwen3", "mlp_bias": True},
            "mlp_bias=True is not supported for qwen3",
        ),
        (
            {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}},
            "'ntk' is not supported; supported: default, linear, dynamic, llama3",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' lacks factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 1}},
            "rope type 'llama3' lacks high_freq_factor",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}},
            r"rope_scaling key mrope_section=\[1\] is not supported for rope type",
        ),
        (
            {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
            "rope_parameters key partial_rotary_factor=0.5",
        ),
        (
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "disagree; remove one",
        ),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf(BASE | change)


FACTORS = [1.0, 2.0, 4.0, 8.0]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "attention_factor": 1.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "change", [{}, {"attention_factor": None, "original_max_position_embeddings": 64}]
)
def test_longrope_that_is_the_same_at_every_length(change):
    config = from_hf(BASE | {"rope_scaling": LONGROPE | change})
    assert config.rope == Rope(8, 100.0, "factors", factors=tuple(FACTORS))
    assert config.context == 64
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    "change",
    [
        {"short_factor": [1.0, 1.0, 1.0, 1.0]},
        {"short_factor": None},
        {"short_factor": 2.0, "long_factor": 2.0},
        {"short_factor": ["a"] * 4, "long_factor": ["a"] * 4},
        {"attention_factor": 1.2},
        {"attention_factor": None},  # derived of 64 / 16
        {"factor": 4.0},
    ],
)
def test_any_other_longrope_is_refused(change):
    with pytest.raises(ValueError, match="'longrope' is supported only with"):
        from_hf(BASE | {"rope_scaling": LONGROPE | change})


def test_longrope_needs_a_factor_for_every_pair():
    three = {"short_factor": FACTORS[:3], "long_factor": FACTORS[:3]}
    with pytest.raises(ValueError, match="head_dim=8 got 3 factors"):
        from_hf(BASE | {"rope_scaling": LONGROPE | three})


def test_family_that_cannot_say_it_is_an_error():
    config = dataclasses.replace(from_hf(BASE), qk_norm=True)
    with pytest.raises(
        ValueError, match=r"llama config\.json cannot express qk_norm=True"
    ):
        to_hf(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_agrees_with_what_is_written(name):
    transformers = pytest.importorskip("transformers")
    given = CONFIGS[name]
    ours = to_hf(from_hf(given))
    theirs = [
        transformers.AutoConfig.for_model(c["model_type"], **_rest(c))
        for c in (given, ours)
    ]
    keys = (
        *("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size"),
        *("tie_word_embeddings", "intermediate_size", "num_hidden_layers"),
    )
    assert [getattr(theirs[0], k) for k in keys] == [
        getattr(theirs[1], k) for k in keys
    ]
    ropes = [
        {k: v for k, v in c.rope_parameters.items() if v is not None and k != "type"}
        for c in theirs
    ]
    assert ropes[0].items() <= ropes[1].items()


def _rest(config):
    return {key: value for key, value in config.items() if key != "model_type"}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_entmax_is_written_so_that_others_refuse_it(family, tmp_path):
    """transformers would ignore the key alone and run the model with softmax."""
    transformers = pytest.importorskip("transformers")
    given = {"model_type": f"{family}_entmax", "attention_alpha": 1.5}
    config = from_hf(BASE | {"num_key_value_heads": 2} | given)
    assert (config.family, config.attention_alpha) == (family, 1.5)
    assert LlamaDecoder(config).alpha == LlamaDecoder(config).cache_spec(1, 4).alpha
    written = to_hf(config)
    assert written["attention_alpha"] == 1.5
    assert from_hf(written) == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=f"{family}_entmax"):
        transformers.AutoConfig.from_pretrained(tmp_path)

    softmax = dataclasses.replace(config, attention_alpha=1.0)
    assert "attention_alpha" not in to_hf(softmax)
    assert to_hf(softmax)["model_type"] == family
    assert LlamaDecoder(softmax).alpha == 1.0
    assert from_hf(BASE | {"attention_alpha": 1.5}).attention_alpha == 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_alpha": 0.5}, "attention_alpha=0.5 must be a finite number >= 1"),
        ({"attention_alpha": math.inf}, "attention_alpha=inf must be a finite number"),
        ({"attention_alpha": "1.5"}, "attention_alpha='1.5' must be a finite number"),
        ({"attention_alpha": True}, "attention_alpha=True must be a finite number"),
        ({"model_type": "llama_entmax"}, "needs attention_alpha > 1 .* got None"),
        ({"model_type": "llama_entmax", "attention_alpha": 1}, "> 1 .* got 1"),
    ],
)
def test_wrong_alpha(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf(BASE | change)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_copies_are_written_so_that_others_refuse_them(family, tmp_path):
    """transformers would predict from the first copy."""
    transformers = pytest.importorskip("transformers")
    keys = {"phd_copies": 3, "phd_window": 16, "phd_chunk": 32}
    given = BASE | {"num_key_value_heads": 2, "model_type": f"{family}_phd"} | keys
    config = from_hf(given)
    assert LlamaDecoder(config).cache_spec(1, 4).copies == Copies(3, 16, 32)
    written = to_hf(config)
    assert written.items() >= keys.items()
    assert from_hf(written) == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=f"{family}_phd"):
        transformers.AutoConfig.from_pretrained(tmp_path)

    alone = dict(copies=1, copy_window=0, copy_chunk=0)
    vanilla = dataclasses.replace(config, **alone)
    as_ever = from_hf(_rest(BASE) | {"num_key_value_heads": 2, "model_type": family})
    assert vanilla == as_ever
    assert to_hf(vanilla) == to_hf(as_ever)
    assert not [key for key in to_hf(vanilla) if key.startswith("phd")]
    assert LlamaDecoder(vanilla).cache_spec(1, 4).copies is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama_phd"}, "needs phd_copies > 1 .* got None"),
        ({"model_type": "llama_phd", "phd_copies": 1}, "needs phd_copies > 1 .* got 1"),
        ({"phd_copies": 0}, "copies=0 must be at least 1"),
        ({"phd_copies": 2.0}, "copies=2.0 must be an integer"),
        ({"phd_copies": 2, "phd_window": -1}, "copy_window=-1 must be at least 0"),
        ({"phd_copies": 2, "phd_chunk": 1}, "copy_chunk=1 must be at least 2 tokens"),
        ({"phd_window": 16}, "copy_window=16 needs copies > 1"),
        ({"phd_chunk": 32}, "copy_chunk=32 needs copies > 1"),
        ({"phd_copies": 2, "attention_alpha": 1.5}, "copies=2 needs softmax attention"),
    ],
)
def test_wrong_copies(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf(BASE | change)


@pytest.mark.parametrize("name", LOADED)
def test_files_of_known_checkpoints(name):
    given, family, context = LOADED[name]
    config = from_hf(given)
    assert (config.family, config.context) == (family, context)
    assert (config.dtype, config.num_kv_heads) == ("bfloat16", 2)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_ask_for_something_else_are_refused_by_its_name(name):
    given, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        from_hf(given)
    assert "\n" not in str(caught.value)


def test_defaults_of_transformers_are_harmless():
    """Lists of one release, `known_configs` has those of older ones."""
    transformers = pytest.importorskip("transformers")
    defaults = transformers.PretrainedConfig().to_dict()
    generation = transformers.GenerationConfig()
    sampling = generation.to_dict() | generation._get_default_generation_params()
    for key, value in (sampling | defaults).items():
        if key not in ("model_type", "dtype"):
            assert from_hf(BASE | {key: value}) == from_hf(BASE), key
    for key in sampling:
        assert from_hf(BASE | {key: "something"}) == from_hf(BASE), key


WINDOWS = json.loads((GOLDENS / "windows.json").read_text("utf-8"))
FAMILIES = sorted({family for family, *_ in WINDOWS})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_is_that_of_a_layer_that_slides(family):
    """The rule of each family is transformers' own: see `make_windows.py`."""
    found = []
    for name, keys, window in WINDOWS:
        if name != family:
            continue
        given = make_windows.config(family, keys)
        found.append(window)
        if window == "refused":
            with pytest.raises(ValueError, match="holds sliding_attention with"):
                from_hf(given)
            continue
        config = from_hf(given)
        assert config.sliding_window == window, keys
        assert config.context == (window or make_windows.POSITIONS), keys
        assert from_hf(to_hf(config)) == config, keys
    assert len(found) == 90
    assert {None, 48} <= set(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_still_those_of_transformers(family):
    pytest.importorskip("transformers")
    for name, keys, window in WINDOWS[::7]:
        if name == family:
            assert make_windows.window_of(family, keys) == window, keys


def test_notes():
    assert notes(from_hf(BASE)) == ()
    window = BASE | {"model_type": "mistral", "sliding_window": 48}
    (note,) = notes(from_hf(window))
    assert note.startswith("the context ends at 48 tokens, the sliding window of")
    assert notes(from_hf(window | {"sliding_window": 4096})) == ()
    (note,) = notes(from_hf(BASE | LINEAR))
    assert note.startswith("the context is 64 tokens: config.json does not say")
    assert "factor 4; if not, set max_sequence_length to 256." in note
    assert notes(from_hf(BASE | LINEAR | {"max_sequence_length": 256})) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": []}, r"model_type=\[\] must be text"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        (
            {"rope_scaling": {"type": "linear", "factor": "4.0"}},
            "rope_scaling key factor='4.0' must be a number",
        ),
        ({"layer_types": 4}, "layer_types=4 must be a list"),
        (QWEN | {"max_window_layers": "28"}, "max_window_layers='28' must be a whole"),
        ({"model_type": "mistral3", "text_config": "x"}, "text_config='x' must be an"),
    ],
)
def test_values_of_another_json_type(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf(BASE | change)


def test_a_factor_on_yarns_own_scale():
    """DeepSeek-R1-0528-Qwen3-8B takes the scale back: 0.8782 = 1 / (0.1 ln 4 + 1)."""
    growth = 0.1 * math.log(4.0) + 1
    config = from_hf(BASE | {"rope_scaling": YARN | {"attn_factor": 1 / growth}})
    assert config.rope.attention_factor == pytest.approx(1.0)
    config = from_hf(BASE | {"rope_scaling": YARN | {"attn_factor": 1.0}})
    assert config.rope.attention_factor == pytest.approx(growth)
    with pytest.raises(ValueError, match="attn_factor='1' must be a number"):
        from_hf(BASE | {"rope_scaling": YARN | {"attn_factor": "1"}})
