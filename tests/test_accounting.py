"""Bytes read and held: the formulas by hand, and against the compiler's own count."""

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_model

from kvjax import accounting, registry
from kvjax.attention.tree_search import most_rounds
from kvjax.evaluation import compare, compare_inputs, fidelity, one_task
from kvjax.interface import CacheSpec, Traffic
from kvjax.methods.hip.method import candidates
from kvjax.rope import Rope
from kvjax.stores.buffers import kv_bytes

# --- by hand: 2 rows, 8 query heads on 4 KV heads of 16, two bytes an element

SIZES = (2, 8, 4, 16, 1000, "bfloat16", Rope(16))
SPEC = CacheSpec(*SIZES, max_new_tokens=10, layer=7, num_layers=8)
TOKEN = 2 * 4 * (16 + 16) * 2  # rows, KV heads, key and value, bytes
FLOAT_AND_INT = 4 + 4  # a score and a position


@pytest.mark.parametrize(
    ("method", "length", "kv", "metadata"),
    [
        ("full", 1000, 1000 * TOKEN, 0),
        ("streaming_llm:budget=64", 1000, 64 * TOKEN, 0),
        ("streaming_llm:budget=64", 50, 50 * TOKEN, 0),
        ("snapkv:budget=64", 1000, (64 + 10) * TOKEN, 2 * 4 * 74 * 4),
        ("snapkv:budget=64", 30, 30 * TOKEN, 2 * 4 * 30 * 4),
        ("kvzip:budget=64", 1000, (64 + 10) * TOKEN, 2 * 4 * 74 * 4),
        # Of what it wraps.
        ("critiprefill+snapkv:budget=64", 1000, (64 + 10) * TOKEN, 2 * 4 * 74 * 4),
        ("random:budget=64", 1000, (64 + 10) * TOKEN, 2 * 4 * 74 * 4),
        ("subgen:budget=64", 1000, (64 + 10) * TOKEN, 2 * 4 * 74 * 4),
        # A window of 32, 16 samples and 32 keys; 32 centres, counts, a number a slot.
        (
            "subgen:mode=stream,budget=64",
            1000,
            (32 + 16 + 16) * TOKEN,
            16 * TOKEN + 2 * 4 * (32 + 32 + 16) * 4,
        ),
        ("subgen:mode=stream,budget=64", 20, 20 * TOKEN, 0),
        # 4 sinks, 4 rings of 14, the current token; their scores, a row a ring to move.
        ("cascade:budget=64", 1000, 61 * TOKEN, 2 * 4 * 56 * 4 + 4 * TOKEN),
        ("cascade:budget=64", 50, 50 * TOKEN, 2 * 4 * 45 * 4 + 4 * TOKEN),
        ("cascade:budget=64,num_cascades=1", 1000, 64 * TOKEN, 0),
        # The budget and every generated token; places need no positions.
        ("citrus:budget=64", 1000, (64 + 10) * TOKEN, 0),
        ("citrus:budget=64,variant=individual", 50, 50 * TOKEN, 0),
        ("h2o:budget=64", 1000, 64 * TOKEN, 2 * 4 * 64 * FLOAT_AND_INT),
        ("h2o:budget=64", 50, 50 * TOKEN, 2 * 4 * 50 * FLOAT_AND_INT),
        ("tova:budget=64", 1000, 64 * TOKEN, 2 * 64 * FLOAT_AND_INT),
        # 63 pages of 16: a minimum and a maximum each; lists of four pages.
        ("quest:budget=64", 1000, 64 * TOKEN, 63 * TOKEN),
        ("quest:budget=64", 17, 32 * TOKEN, 2 * TOKEN),
        ("quest:budget=64,per=query", 1000, 2 * 64 * TOKEN, 63 * TOKEN),
        ("quest:budget=64,budget_ratio=0.1", 1000, 96 * TOKEN, 63 * TOKEN),
        # The outputs of three tokens, who read the pages, and the newest two's keys.
        (
            "retro:window=4+quest:budget=64",
            1000,
            64 * TOKEN,
            63 * TOKEN + 2 * 8 * 3 * 17 * 4 + 2 * 4 * 4 * 4 + 32 * TOKEN // 2,
        ),
        # Four pages, one of them searched for among 61 in six rounds of two.
        ("hip:budget=64", 1000, 64 * TOKEN, 5 * 4 * 16 * TOKEN // 2),
        ("hip:budget=64,key_stride=5", 1000, 64 * TOKEN, 5 * 4 * 4 * TOKEN // 2),
        ("hip:budget=64", 64, 64 * TOKEN, 2 * 16 * TOKEN // 2),
        # All keys to choose, then the values of the chosen.
        ("oracle_topk:budget=64", 1000, 64 * TOKEN // 2, 1000 * TOKEN // 2),
        ("oracle_topk:budget=64,per=query", 1000, 64 * TOKEN, 1000 * TOKEN // 2),
        # All keys to choose, once there is something to choose.
        ("token_select:budget=64", 1000, 64 * TOKEN, 1000 * TOKEN // 2),
        ("token_select:budget=64", 64, 64 * TOKEN, 0),
        # 890 fixed tokens: 44 centroids and two integers each; lists with positions.
        (
            "squeezed:budget=64",
            1000,
            (64 + 110) * TOKEN,
            44 * TOKEN // 2 + 2 * 4 * (44 * 8 + 64 * 4),
        ),
        (
            "squeezed:budget=64,per=query,coarse=0.01",
            1000,
            2 * (64 + 110) * TOKEN,
            # 8 coarse ones, and three quarters of the others, listed twice.
            (8 + 2 * 33) * TOKEN // 2 + 2 * 4 * (8 * 12 + 2 * 33 * 8 + 2 * 64 * 4),
        ),
        ("squeezed:budget=64", 100, 100 * TOKEN, 44 * TOKEN // 2 + 2 * 4 * 44 * 8),
        ("entmax_full", 1000, 1000 * TOKEN, 0),
        # At most the budget, and two vectors a page; the Gaussian's are float32.
        ("entmaxkv:budget=64", 1000, 64 * TOKEN, 63 * TOKEN),
        ("entmaxkv:budget=64,selector=gaussian", 1000, 64 * TOKEN, 63 * 2 * TOKEN),
        ("entmaxkv:budget=64,certified=true", 1000, 63 * 16 * TOKEN, 63 * TOKEN),
        # A full step in five, and the positions of the small cache.
        ("refreshkv:budget=64", 1000, (1000 + 4 * 64) * TOKEN // 5, 2 * 4 * 64 * 4),
        ("refreshkv:schedule=never,budget=64", 50, 50 * TOKEN, 2 * 4 * 50 * 4),
        ("dense_layers:first=8+tova:budget=64", 1000, 1000 * TOKEN, 0),
        ("dense_layers+h2o:budget=64", 50, 50 * TOKEN, 2 * 4 * 50 * FLOAT_AND_INT),
        # Slots that the heads share, each with a head and a position: none is padding.
        ("head_budgets+snapkv:budget=64", 1000, 74 * TOKEN, 2 * 4 * 74 * 8),
        ("head_budgets+snapkv:budget=64", 30, 30 * TOKEN, 2 * 4 * 30 * 8),
        # The last of eight layers has a quarter of the even budget.
        ("layer_budgets:beta=4+tova:budget=64", 1000, 16 * TOKEN, 2 * 16 * 8),
        # Every 32 steps the keys again.
        (
            "decode_eviction:every=32+snapkv:budget=64",
            1000,
            96 * TOKEN,
            96 * TOKEN // 2 // 32,
        ),
        # A head of 16 in bytes and a scale; in halves of bytes with a scale and offset.
        ("quantize+full", 1000, 2 * 4 * 1000 * (18 + 18), 0),
        # In one row three scales have room for four.
        ("quantize:values=4+quest:budget=64", 1000, 512 * (16 + 8 + 8), 63 * TOKEN),
        # One of four heads in full; two of four under Quest.
        ("duo:share=0.25,budget=64,num_sinks=4+full", 1000, 298 * TOKEN, 0),
        (
            "duo:budget=64,num_sinks=4+quest:budget=64",
            1000,
            64 * TOKEN,
            63 * TOKEN // 2,
        ),
    ],
)
def test_bytes_read(method, length, kv, metadata):
    traffic = registry.parse(method).traffic(SPEC, length)
    assert traffic == Traffic(kv, metadata)
    assert traffic.total == kv + metadata


def test_revising_a_token_reads_three_in_a_hundred_more_at_most():
    """An 8B model's layer at 8K; shares of a context as RetroAttention chooses them."""
    spec = CacheSpec(1, 32, 8, 128, 8192, "bfloat16", Rope(128))
    quest = "quest:budget=256,budget_ratio=0.15"
    least, two, eight = (
        registry.parse(name).traffic(spec, 8192).total
        for name in (quest, f"retro:window=2+{quest}", f"retro:window=8+{quest}")
    )
    assert least < two < 1.03 * least
    assert two < eight < 1.06 * least


CLOCK = 2 * 4  # one int32 a row


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("full", 1000 * TOKEN + CLOCK),
        ("streaming_llm:budget=64", 64 * TOKEN + CLOCK),
        # A position per slot and KV head; the budget and every generated token.
        ("snapkv:budget=64", 74 * TOKEN + 2 * 4 * 74 * 4 + CLOCK),
        ("citrus:budget=64", 74 * TOKEN + 2 * 74 * 4 + 2 * CLOCK),
        ("h2o:budget=64", 64 * TOKEN + 2 * 4 * 64 * FLOAT_AND_INT + CLOCK),
        ("tova:budget=64", 64 * TOKEN + 2 * 64 * FLOAT_AND_INT + CLOCK),
        ("quest:budget=64", 63 * 16 * TOKEN + 63 * TOKEN + CLOCK),
        (
            "retro:window=4+quest:budget=64",
            63 * 17 * TOKEN + 2 * 8 * 3 * 17 * 4 + 2 * 4 * 63 * 4 + 2 * CLOCK,
        ),
        ("hip:budget=64", 63 * 16 * TOKEN + CLOCK),
        ("oracle_topk:budget=64", 1000 * TOKEN + CLOCK),
        # One slot more, for who leaves the window; a sum, a length, a count; the key.
        (
            "subgen:mode=stream,budget=64",
            (33 + 16 + 16 + 16) * TOKEN + 2 * 4 * (80 + 3) * 4 + 2 * 8 + CLOCK,
        ),
        ("head_budgets+snapkv:budget=64", 74 * TOKEN + 2 * 4 * 74 * 8 + CLOCK),
        ("layer_budgets:beta=4+tova:budget=64", 16 * TOKEN + 2 * 16 * 8 + CLOCK),
        # The window's queries, and a token that waits for the step to read it.
        (
            "decode_eviction:every=32+snapkv:budget=64",
            97 * TOKEN + 2 * 4 * 96 * 4 + 2 * 8 * 32 * 16 * 2 + 2 * CLOCK,
        ),
        # Positions, 44 centroids and two integers each; fixed tokens, a threshold.
        ("squeezed:budget=64", 1000 * TOKEN + 2 * 4 * 4000 + 2 * 4 * 44 * 40 + 3 * 8),
        ("quantize:bits=4+full", 2 * 4 * 1000 * (12 + 12) + CLOCK),
        # Which of the four heads are whose, in both rows.
        (
            "duo:share=0.25,budget=64,num_sinks=4+full",
            298 * TOKEN + 2 * 4 * 4 + 2 * CLOCK,
        ),
    ],
)
def test_bytes_held_while_decoding(method, expected):
    assert accounting.state_bytes(registry.parse(method), SPEC) == expected


# --- the compiler's count, of the read alone, in the dtype the CPU multiplies natively

WIDE = {"batch": 2, "num_q_heads": 4, "num_kv_heads": 4, "head_dim": 128}


def _wide(capacity, alpha=1.0):
    return CacheSpec(
        **WIDE,
        capacity=capacity,
        dtype="float32",
        rope=Rope(128),
        max_new_tokens=8,
        layer=7,
        alpha=alpha,
    )


def _compiled_read(method, capacity, alpha=1.0, function="decode_step"):
    spec = _wide(capacity, alpha)
    state = jax.eval_shape(lambda: method.finish(method.init(spec)))
    q = jax.ShapeDtypeStruct((2, 4, 1, 128), "float32")
    donated = {} if function == "select" else {"donate_argnums": 0}
    step = jax.jit(getattr(method, function), **donated)
    compiled = step.lower(state, q).compile()
    accessed = compiled.cost_analysis()["bytes accessed"]
    return accessed, compiled.memory_analysis().temp_size_in_bytes, spec


# What a method's attention reads in place, all that its state holds; of RefreshKV, of
# which steps are branches, the small one alone.
IN_PLACE = {
    "full": "full",
    "entmax_full": "entmax_full",
    "streaming_llm": "streaming_llm:budget=512",
    "snapkv": "snapkv:budget=512",
    "h2o": "h2o:budget=512",
    "tova": "tova:budget=512",
    "cascade": "cascade:budget=512",
    "refreshkv": "refreshkv:budget=512,schedule=never",
}
# More passes over the logits: a cascade asks every slot by two queries, and scores it.
MOST = {"cascade": 1.2}
# What it gathers from, of keys and values; the compiler counts a gather as reading its
# whole operand. EntmaxKV takes keys, then values, out of pages that hold both.
GATHERS_FROM = {"quest": 1.0, "hip": 2.0, "oracle_topk": 0.5, "entmaxkv": 2.0}
GATHERS_FROM |= {"token_select": 1.0, "topk_completion": 1.0}
# What goes through its lists in a loop, whose body the compiler counts once.
LOOPS = {"quest", "entmaxkv", "hip"}
# What searches in a loop: one round is counted, however many there are.
SEARCHES = {"hip"}


def alpha_of(name):
    return 1.0 if name in registry.names(1.0) else 1.5


def reads_in_place(name):
    """Whether a step reads all that is held: else it gathers a part."""
    if name in IN_PLACE or name in GATHERS_FROM:
        return name in IN_PLACE
    method, spec = parsed(name), _wide(1024, alpha_of(name))
    held = accounting.state_bytes(method, spec)
    return method.traffic(spec, 1024).total > 0.9 * held


def parsed(name):
    return registry.parse(IN_PLACE.get(name, name), budget=512)


def test_every_method_is_measured():
    """By what the tables say, or by what it holds and reads."""
    known = {*IN_PLACE, *GATHERS_FROM}
    assert known <= set(registry.names())
    assert all(reads_in_place(name) == (name in IN_PLACE) for name in known)


@pytest.mark.parametrize(
    "name", [name for name in registry.names() if reads_in_place(name)]
)
def test_the_compiler_counts_what_traffic_says(name):
    """One pass over the keys and values, and a score over the logits, 1/256 each.

    A second pass over the keys or the values would add half.
    """
    method = parsed(name)
    accessed, temporary, spec = _compiled_read(method, 1024, alpha_of(name))
    traffic = method.traffic(spec, 1024)
    assert 1.0 <= accessed / traffic.total <= MOST.get(name, 1.08)
    assert temporary < 0.05 * traffic.total, "a copy of the cache"


def test_the_compiler_counts_what_a_stream_of_subgen_says():
    """What a step reads; and to fold a token no cache is copied: the rows that it may
    become are made, once for every slot."""
    method = registry.parse("subgen:mode=stream,num_sinks=4,budget=512")
    accessed, temporary, spec = _compiled_read(method, 1024)
    traffic, numbers = method.traffic(spec, 1024), 4 * 8 * (254 + 127)
    assert 1.0 <= accessed / (traffic.kv + numbers) <= 1.08
    assert temporary < 0.05 * traffic.kv
    state = jax.eval_shape(lambda: method.finish(method.init(spec)))
    kv = jax.ShapeDtypeStruct((2, 4, 1, 128), "float32")
    compiled = jax.jit(method.append, donate_argnums=0).lower(state, kv, kv).compile()
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes == accounting.state_bytes(method, spec)
    assert analysis.temp_size_in_bytes < 1.1 * kv_bytes(spec, 127)


@pytest.mark.parametrize(
    "name", [name for name in registry.names() if not reads_in_place(name)]
)
def test_the_compiler_counts_gathers(name):
    """Capacity costs summaries (and the gather's operand), budget a few copies."""
    method = registry.parse(f"{name}:budget=256")
    at_1k, _, spec_1k = _compiled_read(method, 1024, alpha_of(name))
    at_2k, temporary, spec_2k = _compiled_read(method, 2048, alpha_of(name))
    traffic_1k, traffic_2k = (
        method.traffic(spec_1k, 1024),
        method.traffic(spec_2k, 2048),
    )
    assert traffic_2k.kv == traffic_1k.kv
    summaries = traffic_2k.metadata - traffic_1k.metadata
    summaries *= name not in SEARCHES
    # One whole operand, unless the table knows better.
    operand = GATHERS_FROM.get(name, 1.0) * kv_bytes(spec_2k, 1024)
    assert 0.99 <= (at_2k - at_1k) / (summaries + operand) <= 1.1
    # Nothing the size of the cache is copied: the rows chosen are.
    assert temporary < 2.5 * kv_bytes(spec_2k, 256)
    double = registry.parse(f"{name}:budget=512")
    growth = _compiled_read(double, 2048, alpha_of(name))[0] - at_2k
    if name in SEARCHES:
        growth -= growth_of_a_round(method, double, 2048)
    growth *= spec_2k.batch * spec_2k.num_kv_heads if name in LOOPS else 1
    wanted = double.traffic(spec_2k, 2048).kv - traffic_2k.kv
    assert 1.0 <= growth / wanted <= 6.0


def growth_of_a_round(method, double, capacity):
    """Bytes that a round reads more for the larger budget, as the compiler counts."""
    less, more = (
        _compiled_read(one, capacity, function="select")[0] for one in (method, double)
    )
    bounds = []
    for one in (method, double):
        options = one.select.args[0]
        rounds = most_rounds(candidates(options, capacity), options.pages_to_search_for)
        bounds.append(one.traffic(_wide(capacity), capacity).metadata / rounds)
    # Gathered, multiplied, reduced: copies of what traffic counts once.
    assert 1.0 <= (more - less) / (bounds[1] - bounds[0]) <= 6.0
    return more - less


@pytest.mark.parametrize("lists", [1, 3, 5])
def test_lists_of_no_ones_heads_are_refused(lists):
    """Bytes are counted list by list: one for all heads would count a part of them."""
    model = tiny_model(num_layers=1)
    full = registry.parse("full")

    def inspect_step(state, q):
        state, out, found = full.inspect_step(state, q)
        attended = jnp.repeat(found.attended[:, :1], lists, axis=1)
        return state, out, found._replace(attended=attended)

    wrong = full._replace(inspect_step=inspect_step)
    message = rf"attended of shape \(1, {lists}, 4096\) .* 2 KV heads .* 4 query heads"
    with pytest.raises(ValueError, match=message):
        accounting.check_diagnostics(wrong, model.decoder)
    settings = compare_inputs.Settings(context=64, new_tokens=8, windows=1)
    nothing = compare_inputs.Inputs([], [], [], [])
    with pytest.raises(ValueError, match=message):
        compare.compare(model, {"full": full, "x": wrong}, nothing, settings)
    with pytest.raises(ValueError, match=message):
        one_task.run("passkey", model, wrong, full, "text", context=64)
    both = fidelity.side_by_side(full, wrong)
    spec = model.decoder.cache_spec(1, 4096)
    q, kv = (jnp.zeros((1, heads, 1, spec.head_dim)) for heads in (4, 2))
    state = both.append(both.init(spec), kv, kv)
    with pytest.raises(ValueError, match=message):
        both.inspect_step(state, q)


@pytest.mark.parametrize("spec", registry.names(1.0))
def test_every_methods_lists_can_be_counted(spec):
    decoder = tiny_model(num_layers=1).decoder
    accounting.check_diagnostics(registry.parse(spec), decoder)


# Of the methods for softmax: what holds no more for a longer prompt; and of these what
# holds no more for more tokens to generate either.
READ_IN_CONSTANT = {"cascade", "citrus", "streaming_llm"}
CONSTANT = READ_IN_CONSTANT - {"citrus"}


@pytest.mark.parametrize("name", registry.names())
def test_what_grows_with_the_text(name):
    method = registry.parse(name)
    decoder = tiny_model(num_layers=1, attention_alpha=alpha_of(name)).decoder
    reads = name in READ_IN_CONSTANT
    assert accounting.grows_with_prompt(method, decoder) != reads
    assert accounting.grows_with_generated(method, decoder) == (name not in CONSTANT)
    assert method.renumbers == reads
    assert accounting.is_endless(method, decoder) == (name in CONSTANT)


def test_a_stream_of_subgen_is_as_long_as_its_prompts_are_held():
    """What it decodes with is constant; the whole prompt is held while it is read, at
    positions that are those of the text."""
    method = registry.parse("subgen:mode=stream")
    decoder = tiny_model(num_layers=1).decoder
    assert accounting.grows_with_prompt(method, decoder)
    assert not accounting.is_endless(method, decoder)
    short, long = (
        accounting.bytes_held(method, decoder, capacity, capacity // 2)
        for capacity in (1 << 12, 1 << 20)
    )
    assert short == long


def test_one_dense_layer_is_enough_to_grow():
    decoder = tiny_model(num_layers=2).decoder
    for first, is_endless in [(0, True), (1, False), (2, False)]:
        method = registry.parse(f"dense_layers:first={first}+streaming_llm")
        assert accounting.is_endless(method, decoder) == is_endless
        assert method.renumbers == is_endless
