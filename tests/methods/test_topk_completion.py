"""Retrieved tokens exactly, the rest by their surrogate weights, merged in one softmax.

The oracle adds up the surrogate weight of every unread token: it knows no summary.
"""

import drive
import jax
import numpy as np
import oracles
import pytest

from kvjax import accounting, files, registry
from kvjax.interface import CacheSpec
from kvjax.methods.topk_completion import feature_maps, map_files
from kvjax.methods.topk_completion.method import topk_completion
from kvjax.rope import Rope

# The estimate is a float32 difference of sums: the same bar as everywhere, 1e-5 a row.
OPTIONS = {"num_sinks": 2, "tail": 3, "features": 3, "calibration": 6}
OPTIONS |= {"charge": "none"}
# No middle; one token of it; a few; many, of which most are not read.
PROMPTS = (0, 6, 12, 33)
STEPS = 7


def check(stream, retrieved, chunks=None, capacity=None, **options):
    options = OPTIONS | options
    given = dict(options)
    outliers = options.get("num_outliers", 0)
    given["budget"] = retrieved + options["num_sinks"] + options["tail"] + outliers
    spec = drive.make_spec(stream, capacity=capacity)
    run = drive.run(topk_completion(**given), spec, stream, chunks)
    names = {"feature_map": "name", "lam": "gain"}
    wanted = {names.get(key, key): value for key, value in options.items()}
    wanted.pop("charge")
    if "gain" in wanted:
        wanted["gain"] = np.full(stream.q.shape[1], wanted["gain"])
    drive.assert_matches(
        run, stream, oracles.topk_completion, retrieved=retrieved, **wanted
    )
    return run


@pytest.mark.parametrize(
    ("heads", "retrieved", "options"),
    [
        (
            (4, 2),
            6,
            {
                "feature_map": "anchor",
                "selector": "pages",
                "page_size": 3,
                "per": "query",
            },
        ),
        (
            (4, 1),
            3,
            {
                "feature_map": "anchor_hard",
                "per": "query",
                "lam": 0.5,
                "mass_cap": False,
            },
        ),
        ((4, 2), 1, {"feature_map": "moment", "window": 2, "tail": 0}),
        (
            (4, 2),
            8,
            {"feature_map": "mean", "selector": "pages", "page_size": 4, "window": 3},
        ),
        (
            (4, 2),
            8,
            {"feature_map": "rank1", "selector": "pages", "page_size": 1, "window": 3},
        ),
    ],
    ids=lambda value: value.get("feature_map") if isinstance(value, dict) else None,
)
def test_equals_direct_sums(heads, retrieved, options):
    """Every kind of map, selector and list; folding; outliers; with and without cap."""
    stream = drive.make_stream(PROMPTS, STEPS, heads=heads)
    check(stream, retrieved, **options)


def nets(rng, shape, head_dim, width, features):
    """A random network for each of `shape`, with decided outputs."""

    def draw(*size, scale=1.0):
        values = scale * rng.standard_normal((*shape, *size))
        return values.astype(np.float32)

    return feature_maps.Mlp(
        draw(head_dim, width, scale=head_dim**-0.5),
        draw(width, scale=0.1),
        draw(width, 5, scale=width**-0.5),
        draw(5, scale=0.1),
        draw(5, width, scale=0.5),
        draw(width, scale=0.1),
        draw(),
        draw(width, features, scale=0.5),
        draw(features, scale=0.3),
    )


def plain(net, index):
    """One network in float64, as the oracle takes it."""
    return {key: np.float64(leaf[index]) for key, leaf in net._asdict().items()}


def test_a_file_has_the_networks_and_the_gain_of_the_layer(tmp_path):
    """The layer's own; outliers chosen by what the networks overestimate."""
    rng = np.random.default_rng(3)
    weights = feature_maps.Learned(
        nets(rng, (3, 2), 8, 6, 4), nets(rng, (3, 2, 2), 8, 6, 4)
    )
    gain = rng.uniform(0.2, 1, (3, 4)).astype(np.float32)
    gain[1, 2] = 0
    file = map_files.MapFile("learned", 40, weights, gain, {"seed": 3})
    path = tmp_path / "map.safetensors"
    map_files.save(path, file)
    assert map_files.load(path).about == {"seed": 3}

    stream = drive.make_stream((20, 9), 4)
    options = {"budget": 12, "num_sinks": 2, "tail": 3, "calibration": 6}
    method = topk_completion(feature_map=str(path), charge="none", **options)
    spec = drive.make_spec(stream, layer=1)
    run = drive.run(method, spec, stream)
    layer = feature_maps.Learned(*(jax.tree.map(lambda x: x[1], n) for n in weights))
    given = [plain(layer.keys, kv) for kv in range(2)]
    asked = [plain(layer.queries, (h // 2, h % 2)) for h in range(4)]
    drive.assert_matches(
        run,
        stream,
        oracles.topk_completion,
        retrieved=3,  # 12 less 2 sinks, 3 of the tail and 4 outliers
        num_sinks=2,
        tail=3,
        num_outliers=4,
        gain=gain[1],
        nets=(given, asked),
    )
    # The networks count in the budget, and rows share them.
    with pytest.raises(
        ValueError, match=r"budget=12 leaves 3 tokens, .* 17 .charge='step'"
    ):
        topk_completion(feature_map=str(path), **options).init(spec)
    with pytest.warns(
        UserWarning, match="of up to 40 tokens, and there is room for 43"
    ):
        method.init(drive.make_spec(stream, capacity=47, layer=1))
    for change, message in [
        ({"layer": 3}, "has 3 layers and the model a layer 3"),
        ({"num_q_heads": 2}, "calibrated for 4 query heads and the model has 2"),
        (
            {"head_dim": 4, "rope": Rope(4)},
            r"\(2, 2, 8\) and the model has \(2, 2, 4\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            method.init(drive.make_spec(stream, **({"layer": 1} | change)))


# --- the budget: 2 rows, 8 query heads on 4 KV heads of 64, two bytes an element

SPEC = CacheSpec(2, 8, 4, 64, 4096, "bfloat16", Rope(64), max_new_tokens=32)
TOKEN = 2 * 4 * (64 + 64) * 2


@pytest.mark.parametrize(
    ("options", "retrieved", "elements"),
    [
        # 82 - 20; with `mean` 2*64 + 2 numbers in float32, 2.03 tokens: 3.
        ("lam=0", 62, 0),
        ("feature_map=mean", 59, 130),
        ("feature_map=mean,charge=none", 62, 130),
        ("feature_map=mean,charge=request", 61, 130),  # 2.03 over 32 steps: 1
        ("feature_map=mean,num_outliers=2", 57, 130),
        # Two heads share what a list of each would be charged: 1.02 and so 2.
        ("feature_map=mean,per=query", 60, 130),
        # 258 numbers a feature, 4.03 tokens: 7 of them are no more than half of 62.
        ("", 62 - 29, 258 * 7),
        ("features=4", 62 - 17, 258 * 4),
        ("charge=request", 62 - 3, 258 * 16),
        ("feature_map=favor,features=4,charge=none", 62, 130 * 4 + 192),
    ],
)
def test_what_a_budget_of_two_percent_buys(options, retrieved, elements):
    method = registry.parse(f"topk_completion:budget=82,{options}")
    traffic = method.traffic(SPEC, 4096)
    outliers = 2 if "num_outliers" in options else 0
    lists = 2 if "per=query" in options else 1
    read = 20 + retrieved + outliers + 32  # every generated token at the end
    assert traffic.kv == lists * read * TOKEN
    assert traffic.metadata == 4096 * TOKEN // 2 + 2 * 4 * elements * 4
    if options in ("", "feature_map=favor,features=4,charge=none"):
        state = jax.eval_shape(lambda: method.finish(method.init(SPEC)))
        leaves = jax.tree.leaves((state.params, state.summary))
        assert sum(leaf.size for leaf in leaves) == 2 * 4 * elements
        held = accounting.state_bytes(method, SPEC)
        assert held == 4096 * TOKEN + 2 * 4 * 4 * elements + 2 * 2 * 4


@pytest.mark.parametrize("prompt", [13, 27, 36])
@pytest.mark.parametrize("tail", [0, 1])
def test_pages_of_a_budget_above_the_capacity_are_all_of_them(prompt, tail):
    """Also the last one, which is not whole, and the only one."""
    stream = drive.make_stream((prompt, 5), 3, sharpness=1.0)
    method = topk_completion(selector="pages", tail=tail, num_sinks=0)
    run = drive.run(method, drive.make_spec(stream), stream)
    drive.assert_matches(run, stream, oracles.full)
    assert run.diagnostics.exact.all()


def test_a_mass_that_nothing_bounds_is_refused():
    stream = drive.make_stream((40,), 1)
    spec = drive.make_spec(stream)
    options = {"feature_map": "moment", "charge": "none", "num_sinks": 2, "tail": 3}
    with pytest.raises(ValueError, match="budget=5 leaves no token to retrieve"):
        topk_completion(budget=5, **options).init(spec)
    pages = options | {"selector": "pages", "page_size": 4}
    with pytest.raises(ValueError, match="budget=8 leaves no token to retrieve"):
        topk_completion(budget=8, **pages).init(spec)
    topk_completion(budget=9, **pages).init(spec)


def test_pages_read_whole_pages_and_their_extremes():
    method = registry.parse("topk_completion:budget=82,lam=0,selector=pages")
    traffic = method.traffic(SPEC, 4096)
    assert traffic.kv == (20 + 48 + 32) * TOKEN  # three pages of 16 of 62 tokens
    assert traffic.metadata == 4096 // 16 * TOKEN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 19}, r"num_sinks=4 and tail=16 .* budget=19"),
        ({"num_sinks": -1}, r"num_sinks=-1"),
        ({"features": 0}, r"features=0 must be at least 1"),
        ({"selector": "all"}, r"selector='all' must be one of oracle, pages"),
        ({"per": "head"}, r"per='head' must be one of kv, query"),
        ({"charge": "never"}, r"charge='never' must be one of step, request, none"),
        ({"group_reduce": "sum"}, r"group_reduce='sum' must be one of"),
        ({"group_reduce": "mean"}, r"mass_cap=True .* group_reduce='mean'"),
        ({"lam": 1.5}, r"lam=1.5 must be in \[0, 1\]"),
        ({"calibration": 0}, r"calibration=0 must be at least 1 query"),
        ({"num_outliers": 13}, r"num_outliers=13 must be in \[0, 12\]"),
        ({"window": 0, "tail": 0}, r"window=0 .* tail=0"),
        (
            {"feature_map": "ancor"},
            r"'ancor' is neither one of anchor, .*No such file",
        ),
        ({"feature_map": "moment", "mass_cap": False}, r"needs mass_cap=true .*False"),
        ({"feature_map": "moment", "num_outliers": 1}, r"num_outliers=1: its mass"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_both_values(options, message):
    with pytest.raises(ValueError, match=message):
        topk_completion(**({"budget": 32} | options))


def test_a_file_of_something_else_is_an_error(tmp_path):
    path = tmp_path / "other.safetensors"
    files.save_tensors(path, {"x": np.zeros(1)})
    with pytest.raises(ValueError, match=r"format None, .* wanted 'kvjax-feature-map'"):
        topk_completion(feature_map=str(path))
    path.write_text("text")
    with pytest.raises(ValueError, match="is no safetensors file"):
        topk_completion(feature_map=str(path))
