"""Names, spec strings and the messages for what cannot be read."""

import inspect

import pytest

from kvjax import registry
from kvjax.interface import CacheSpec, Method
from kvjax.rope import Rope

SPEC = CacheSpec(1, 4, 2, 8, 4096, "float32", Rope(8), layer=3)


def test_the_methods_of_the_library():
    assert registry.names()[0] == "full"
    expected = {"h2o", "oracle_topk", "quest", "snapkv", "streaming_llm", "tova"}
    assert expected <= set(registry.names())
    assert "dense_layers" not in registry.names()
    assert "dense_layers" in registry.transforms()


@pytest.mark.parametrize("name", [*registry.names(), *registry.transforms()])
def test_every_factory_is_documented(name):
    factory = registry.get(name)
    sections = ("Returns:", "State:", "Exact when:", "Source:", "Deviations:")
    for section in sections:
        assert section in factory.__doc__, f"{name}: {section} is missing"
    for option, parameter in registry.options(name).items():
        assert f"{option}:" in factory.__doc__, f"{name}: {option} is not explained"
        assert parameter.default is not inspect.Parameter.empty


def test_parse_gives_options_their_types():
    method = registry.parse("quest:budget=64,page_size=32,per=query,recent=2")
    assert isinstance(method, Method)
    # Two lists a group, each of two pages of 32 tokens; the bounds of 128 pages.
    traffic = method.traffic(SPEC, 4096)
    assert traffic.kv == 2 * (2 * 2 * 64 * 8 * 4)
    assert traffic.metadata == 2 * 2 * 128 * 8 * 4


def test_parse_ignores_spaces_and_reads_none():
    spaced = registry.parse(" h2o : budget = 64 , recent = none ".replace(" :", ":"))
    assert spaced.traffic(SPEC, 4096).kv == 2 * 2 * 64 * 8 * 4


def test_transforms_are_written_outer_first():
    method = registry.parse("dense_layers:first=4+tova:budget=64")
    sparse = registry.parse("dense_layers:first=3+tova:budget=64")
    assert method.traffic(SPEC, 4096) == registry.parse("full").traffic(SPEC, 4096)
    assert sparse.traffic(SPEC, 4096) == registry.parse("tova:budget=64").traffic(
        SPEC, 4096
    )


def test_the_same_string_is_the_same_object():
    """A method is a static argument of jit: a new object would compile again."""
    assert registry.parse("tova:budget=64") is registry.parse("tova:budget=64")


def test_defaults_fill_what_the_string_leaves_out():
    filled = registry.parse("quest", budget=64, page_size=32, window=9)
    assert filled.traffic(SPEC, 4096).kv == 2 * 2 * 64 * 8 * 4
    given = registry.parse("quest:budget=128", budget=64)
    assert given.traffic(SPEC, 4096).kv == 2 * 2 * 128 * 8 * 4
    assert isinstance(registry.parse("full", budget=64), Method)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("qest", r"unknown method 'qest'; did you mean 'quest'\?"),
        ("zzzz", r"unknown method 'zzzz'; known: .*full.*quest"),
        ("quest:bugdet=64", r"quest has no option 'bugdet'; did you mean 'budget'\?"),
        ("full:budget=64", r"full has no option 'budget'; known: none"),
        ("quest:budget=many", r"quest: budget='many' must be of type int"),
        ("quest:budget=1.5", r"quest: budget='1.5' must be of type int"),
        ("quest:per=head", r"quest: per='head' must be one of kv, query"),
        ("quest:budget", r"'budget' in 'quest:budget' must read option=value"),
        ("quest:budget=64,budget=64", r"'budget' is given twice"),
        ("quest:budget=24", r"budget=24.*page_size=16"),
        ("streaming_llm:budget=4", r"num_sinks=4 must be in \[0, budget=4\)"),
        ("dense_layers", r"ends in the transform 'dense_layers'.*dense_layers\+quest"),
        ("quest+full", r"'quest' in 'quest\+full' is no transform.*dense_layers"),
        ("", r"unknown method ''"),
    ],
)
def test_mistakes_are_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.parse(spec)


@pytest.mark.parametrize("name", [*registry.names(), "dense_layers+quest"])
def test_a_canonical_spec_says_everything_and_is_its_own(name):
    spelled = registry.canonical(name)
    assert registry.canonical(spelled) == spelled
    parts = zip(name.split("+"), spelled.split("+"), strict=True)
    for part, full in parts:
        options = [item.partition("=")[0] for item in full.partition(":")[2].split(",")]
        assert [o for o in options if o] == list(registry.options(part))


def test_equal_methods_have_one_canonical_spec():
    one = registry.canonical("dense_layers + quest: page_size=32 ,budget=64")
    assert one == registry.canonical(
        "dense_layers:first=2+quest:budget=64,page_size=32"
    )
    assert one != registry.canonical("dense_layers+quest:budget=96,page_size=32")
    with pytest.raises(ValueError, match="did you mean 'budget'"):
        registry.canonical("quest:bugdet=3")
