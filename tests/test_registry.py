"""Names, spec strings and the messages for what cannot be read."""

import inspect
import sys
import typing

import numpy as np
import pytest

from kvjax import registry
from kvjax.interface import RECIPES, CacheSpec, Method
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


@pytest.mark.parametrize("name", registry.names())
def test_a_factory_that_is_called_shows_a_spec_of_the_same_method(name):
    factory = registry.get(name)
    shown = repr(factory())
    options = RECIPES[registry.parse(shown[8:-2])].options
    assert options.keys() == registry.options(name).keys()
    assert repr(factory(**options)) == shown


def test_a_transform_that_is_called_shows_what_it_is_around():
    inner = registry.get("quest")(budget=64, page_size=32)
    shown = repr(registry.get("retro")(inner, window=3))[8:-2]
    expected = registry.canonical("retro:window=3+quest:budget=64,page_size=32")
    assert registry.canonical(shown) == expected


NUMBERS = [
    (name, option.name)
    for name in registry.every()
    for option in registry.options(name).values()
    if type(option.default) in (int, float)
    and typing.get_origin(option.annotation) is not typing.Literal
]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_a_number_of_another_type_is_refused_when_called(name, option):
    methods = [registry.get("quest")()] * (2 if name == "dense_layers" else 1)
    methods *= registry.is_transform(name)
    parameter = registry.options(name)[option]
    default = parameter.default
    wrong = ["64", True, [default]] + [float(default)] * isinstance(default, int)
    wrong += [None] * (parameter.annotation in (int, float))
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{name}: {option}=.* must be of type"):
            registry.get(name)(*methods, **{option: value})


@pytest.mark.usefixtures("unchecked_shapes")
def test_numbers_of_numpy_are_numbers():
    quest = registry.get("quest")
    method = quest(budget=np.int64(64), budget_ratio=np.float32(0.5))
    assert method.traffic(SPEC, 64) == quest(budget=64).traffic(SPEC, 64)
    assert method.traffic(SPEC, 4096).kv == 2 * 2 * 2048 * 8 * 4


def test_equal_methods_have_one_canonical_spec():
    one = registry.canonical("dense_layers + quest: page_size=32 ,budget=64")
    assert one == registry.canonical(
        "dense_layers:first=2+quest:budget=64,page_size=32"
    )
    assert one != registry.canonical("dense_layers+quest:budget=96,page_size=32")
    with pytest.raises(ValueError, match="did you mean 'budget'"):
        registry.canonical("quest:bugdet=3")


# --- factories from elsewhere

MINE = '''
"""A module with methods, and with what is none."""
import kvjax


def newest(*, budget: int = 64, sinks=0) -> kvjax.Method:
    """Keeps the newest tokens."""
    return kvjax.streaming_llm(budget=budget, num_sinks=sinks)


def same(method, *, times: "int" = 1):
    """Is the method."""
    return method


def picky(*, budget: int = 64) -> kvjax.Method:
    """Takes even budgets."""
    if not budget:
        raise ValueError
    if budget % 2:
        raise ValueError(f"{budget=} must be even.")
    return newest(budget=budget)


def positional(budget):
    return newest(budget=budget)


def nothing(*, budget=64):
    return budget


class Newest: ...


made = newest()
'''


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", registry.transforms())
def test_a_transform_says_what_stands_in_the_place_of_a_method(name):
    transform = registry.get(name)
    full = registry.parse("full")
    count = sum(not given.kind.name.startswith("KEY") for given in arguments(transform))
    for place in range(count):
        for wrong, fix in (
            ("full", r"such as kvjax.parse\('full'\)\.$"),
            (None, r"such as kvjax.parse\('quest:budget=128'\)\.$"),
            (registry.get("full"), r"which a factory returns: call it\.$"),
        ):
            given = [full] * place + [wrong] + [full] * (count - place - 1)
            which = [argument.name for argument in arguments(transform)][place]
            message = rf"^{name}: {which}=.* must be a kvjax.Method.*, {fix}"
            with pytest.raises(TypeError, match=message):
                transform(*given)
            named = {arguments(transform)[i].name: one for i, one in enumerate(given)}
            with pytest.raises(TypeError, match=message):
                transform(**named)


def arguments(factory):
    return list(inspect.signature(factory).parameters.values())


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_a_factory_says_of_a_value_names_it(module):
    for spec, message in (
        (f"{module}:picky,budget=3", rf"^{module}:picky: budget=3 must be even\.$"),
        (f"{module}:picky,budget=0", rf"^{module}:picky: ValueError$"),
        ("head_budgets:alpha=2+snapkv", r"^head_budgets: alpha=2.0 must be in"),
        ("quest:budget=-1", r"^quest: budget=-1 must be"),
        ("quantize:group=0+full", r"^quantize: group=0 must be"),
        ("layer_budgets+full", "^layer_budgets: full has no budget"),
        ("head_budgets+quest", "^head_budgets ranks .* which quest does not tell"),
        ("decode_eviction+layer_budgets+snapkv", "which layer_budgets.snapkv does not"),
        ("quest:budget=x", "^quest: budget='x' must be of type int"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.parse(spec)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of another's, that can be imported."""
    (tmp_path / "their_methods").mkdir()
    (tmp_path / "their_methods" / "__init__.py").write_text("")
    (tmp_path / "their_methods" / "mine.py").write_text(MINE)
    (tmp_path / "their_methods" / "needs.py").write_text("import no_such_thing")
    (tmp_path / "their_methods" / "wrong.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_methods.mine"
    registry.parse.cache_clear()
    for name in [name for name in sys.modules if name.startswith("their_methods")]:
        del sys.modules[name]


def test_a_factory_is_named_by_where_it_lies(module):
    spec = f"{module}:newest,budget=32,sinks=2"
    method = registry.parse(spec)
    assert method.traffic(SPEC, 4096).kv == 2 * 2 * 32 * 8 * 4
    assert registry.parse(spec) is method
    assert repr(method) == f"Method('{spec}')"
    assert registry.canonical(f"{module}:newest,sinks=1") == (
        f"{module}:newest,budget=64,sinks=1"
    )
    assert registry.parse(f"{module}:newest") is not method
    outer = registry.parse(f"{module}:same,times=2+dense_layers+{spec}")
    assert outer.traffic(SPEC, 4096) == method.traffic(SPEC, 4096)
    assert registry.canonical(f"{module}:same+quest:budget=64").startswith(
        f"{module}:same,times=1+quest:budget=64,"
    )
    assert registry.parse(f"{module}:newest", budget=16).traffic(SPEC, 4096).kv == (
        2 * 2 * 16 * 8 * 4
    )
    assert not any("newest" in name for name in registry.names())


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("their_methds.mine:newest", "there is no module 'their_methds.mine' to take"),
        ("their_methods.min:newest", "there is no module 'their_methods.min' to take"),
        ("qest:budget", "no module 'qest' .*; did you mean the method 'quest'"),
        ("their_methods.mine:newset", "has no 'newset'; did you mean 'newest'"),
        ("their_methods.mine:zzzz", r"module 'their_methods.mine' has no 'zzzz'\."),
        ("their_methods.mine", "reads package.module:factory,option=value"),
        ("their_methods.mine:budget=3", "reads package.module:factory,option=value"),
        ("their_methods.mine:newest,bugdet=3", "no option 'bugdet'; did you mean 'bud"),
        ("their_methods.mine:newest,budget=x", "budget='x' must be of type int"),
        ("their_methods.mine:newest,sinks=x", "sinks='x' must be of type int"),
        ("their_methods.mine:newest,budget", "'budget' in .* must read option=value"),
        ("their_methods.mine:positional", "is no factory of methods: .* 'budget' must"),
        ("their_methods.mine:nothing", "nothing returned a int; a factory returns a"),
        ("their_methods.mine:Newest", "is no factory, but a class; give a function"),
        ("their_methods.mine:made", "is no factory, but a method that one made"),
        ("their_methods.mine:same", "ends in the transform 'their_methods.mine:same'"),
        ("their_methods.needs:f", "needs cannot be imported: No module named 'no_such"),
        ("their_methods.wrong:f", "their_methods.wrong cannot be imported: .*syntax"),
        ("../x:f", r"unknown method '\.\./x:f'"),
    ],
)
def test_mistakes_about_a_module_are_explained(module, spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        registry.parse(spec)
    assert "\n" not in str(caught.value)


@pytest.fixture
def registered(monkeypatch):
    """Forgets, after the test, what it registers."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    yield
    registry.parse.cache_clear()


@pytest.mark.usefixtures("registered")
def test_a_registered_factory_is_known_by_its_name():
    @registry.register
    def newest(*, budget: int = 64) -> Method:
        return registry.get("streaming_llm")(budget=budget)

    assert registry.get("newest") is newest
    assert "newest" in registry.names()
    assert "newest" in registry.names(1.5)  # it does not say that it needs softmax
    first = registry.parse("newest:budget=32")
    assert first.traffic(SPEC, 4096).kv == 2 * 2 * 32 * 8 * 4
    assert registry.parse("retro+quest") is registry.parse("retro+quest")
    registry.register(newest)
    assert registry.parse("newest:budget=32") is first

    @registry.register
    def newest(method, *, budget: int = 64) -> Method:
        return method

    assert registry.transforms() == tuple(sorted({*registry.transforms(), "newest"}))
    assert "newest" not in registry.names()
    with pytest.raises(ValueError, match="ends in the transform 'newest'"):
        registry.parse("newest:budget=32")


@pytest.mark.usefixtures("registered")
def test_a_registered_transform_must_pass_the_second_reading_on():
    @registry.register
    def dropping(method, *, budget: int = 64) -> Method:
        return method._replace(reread=None)

    registry.parse("dropping+quest")
    message = r"dropping cannot wrap Method\('kvzip:budget=8'\), .* pass `reread` on"
    with pytest.raises(ValueError, match=message):
        registry.parse("dropping+kvzip:budget=8")

    @registry.register
    def passing(method, *, budget: int = 64) -> Method:
        return method._replace(rewind=None)

    assert registry.parse("passing+kvzip:budget=8").reread is not None


@pytest.mark.usefixtures("registered", "unchecked_shapes")
def test_what_cannot_be_registered_is_refused():
    def quest(*, budget: int = 64) -> Method: ...

    with pytest.raises(ValueError, match="'quest' is a method of kvjax: choose anoth"):
        registry.register(quest)
    with pytest.raises(TypeError, match="has no name to be known by"):
        registry.register(lambda *, budget=64: registry.parse("full"))
    with pytest.raises(TypeError, match=r"Method\('full'\) is no factory, but a meth"):
        registry.register(registry.parse("full"))

    def other(budget: int = 64) -> Method: ...

    with pytest.raises(TypeError, match="its argument 'budget' must be keyword-only"):
        registry.register(other)
    assert "other" not in registry.names()

    def text(*, budget: int = 64) -> str: ...

    with pytest.raises(TypeError, match="text is no factory of methods: it returns st"):
        registry.register(text)


# --- entry points of installed packages


@pytest.fixture
def installed(module, tmp_path, monkeypatch):
    """A package that names a method, a transform, and one that cannot be imported."""
    folder = tmp_path / "theirs-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: theirs\nVersion: 1\n"
    )
    (folder / "entry_points.txt").write_text(
        f"[kvjax.methods]\nlately = {module}:newest\nwrapped = {module}:same\n"
        "quest = nowhere:quest\n"
    )
    for cached in (registry._entry_points, registry._loaded):
        cached.cache_clear()
    yield folder
    for cached in (registry._entry_points, registry._loaded, registry.parse):
        cached.cache_clear()


def test_installed_packages_have_methods_too(installed, module):
    assert registry.parse("quest:budget=64")
    assert module not in sys.modules  # nothing is imported before it is asked for
    method = registry.parse("wrapped+lately:budget=32")
    assert method.traffic(SPEC, 4096).kv == 2 * 2 * 32 * 8 * 4
    assert "lately" in registry.names()
    assert "wrapped" in registry.transforms()
    assert registry.get("quest").__module__.startswith("kvjax.")
    with pytest.raises(ValueError, match="'latly'; did you mean 'lately'"):
        registry.parse("latly")


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_package_that_is_broken_is_left_out_and_named(installed):
    text = "[kvjax.methods]\nbroken = their_methods.needs:f\n"
    (installed / "entry_points.txt").write_text(text)
    message = "method 'broken' of theirs: .*needs cannot be imported: No module named"
    with pytest.warns(UserWarning, match=f"left out: {message}"):
        assert "quest" in registry.names()
    with pytest.raises(ValueError, match=message):
        registry.parse("broken")
