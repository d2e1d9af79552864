"""Configs that nobody meant: each is a config, or one line of error.

`KVJAX_FUZZ=1500 pytest tests/training/test_config_fuzz.py` tries so many of each kind.
"""

import copy
import os

import pytest
import toys
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax import cli
from kvjax.training import config_files, optim, pipeline

EXAMPLES = int(os.environ.get("KVJAX_FUZZ", "60"))
MOST = 4096  # of tokens and checks of what is also drawn from
BASES = [
    toys.BASE,
    toys.BASE | {"refreshkv": {"decoded": 4, "budget": 4}, "mesh": {"data": 1}},
    toys.BASE | {"optimizer": {"schedule": "constant", "decay_steps": 3}},
]

NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**31, -(2**63), 10**30, 10**300]),
    st.floats(),
    st.sampled_from([1e308, 5e-324, 1.5, -0.0]),
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["count", "noise", "train", "cosine", "muon", "count@16", "???"]),
    st.sampled_from(["count@0", "@", "a@1@2", "count@16/bits", "stdlib", "2001-99-99"]),
)
LEAVES = st.none() | st.booleans() | NUMBERS | WORDS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(WORDS | st.integers(-1, 40), inner, max_size=3),
    ),
    max_leaves=4,
)


def places(node, place=()):
    yield place
    inner = node.items() if isinstance(node, dict) else ()
    inner = enumerate(node) if isinstance(node, list) else inner
    for key, value in inner:
        yield from places(value, (*place, key))


@st.composite
def documents(draw):
    document = copy.deepcopy(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(list(places(document))[1:]))
        node = document
        for key in above:
            node = node[key]
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            node[last] = draw(VALUES)
        elif change == "remove":
            del node[last]
        elif isinstance(node, dict):
            node[draw(WORDS)] = draw(VALUES)
        if not document:
            break
    return document


def check(read):
    """The config that `read()` makes; None if it raises as a user's mistake does."""
    try:
        return read()
    except (ValueError, FileNotFoundError) as error:
        is_right = cli._is_ours(error) and "\n" not in str(error)
        if not is_right:
            raise
        return None


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 100)
@given(document=documents(), changes=st.lists(WORDS, max_size=1))
def test_any_document_is_a_config_or_one_line(document, changes):
    text = yaml.safe_dump(document, allow_unicode=True)
    config = check(lambda: config_files.parse(text, "file", changes))
    if config is None:
        return
    assert config_files.parse(config_files.dump(config)) == config
    check(lambda: config_files.located(config))
    assert float(optim.schedule(config)(0)) >= 0
    steps = check(lambda: pipeline.Steps(config, toys.SOURCES))
    if steps is None or max(stage.tokens for stage in config.stages) > MOST:
        return
    batch = steps[0]
    assert batch.tokens.shape == batch.weights.shape
    if config.longest <= MOST and config.evaluate.tokens <= MOST:
        found = pipeline.check_batches(config, toys.SOURCES)
        assert set(found) == {f"{source}@{length}" for source, length in config.checks}


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 100)
@given(
    key=st.sampled_from([".".join(map(str, p)) for p in places(toys.BASE)][1:]) | WORDS,
    value=WORDS | VALUES.map(repr) | st.sampled_from(["&a [*a]", "\x00", "{[}: 1}"]),
)
def test_any_change_is_a_config_or_one_line(key, value):
    check(lambda: toys.config(f"{key}={value}"))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 100)
@given(
    data=st.binary() | st.text().map(str.encode) | documents().map(repr).map(str.encode)
)
def test_any_file_is_a_config_or_one_line(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    path.write_bytes(data)
    check(lambda: config_files.load(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: \x01\n", "is not YAML"),
        ("[" * 3000, "nested too deeply|is not YAML"),
        ("a: &a [*a]\nmodel: ???\n", "leaves model to you"),
        ("a: 2001-99-99\n", "month must be in"),
    ],
)
def test_what_yaml_chokes_on(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_files.parse(text, "file")
    assert "\n" not in str(caught.value)
