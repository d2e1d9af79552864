"""Configs: strict, one line of error that names key, place and nearest neighbour."""

import importlib.resources
import re

import numpy as np
import pytest
import toys

from kvjax import registry
from kvjax.training import config_files, optim
from kvjax.training.data import text

MINIMAL = """\
model: {checkpoint: softmax}
stages:
  - steps: 10
    tokens: 256
    lengths: {64: 1}
    mixture: {text: 1}
"""


def test_a_minimal_config_has_defaults():
    config = config_files.parse(MINIMAL)
    assert config.steps == 10
    assert config.optimizer.name == "adamw"
    assert config.sources == ("text",)
    assert config.checks == (("text", 64),)


def test_every_preset_is_right_and_survives_a_round_trip():
    assert "toy" in config_files.presets()
    filled = ["model.checkpoint=mine", "data.corpus=mine.txt"]
    for name in config_files.presets():
        config = config_files.load(name, filled if name.startswith("own-") else [])
        assert config_files.parse(config_files.dump(config)) == config


def test_a_pattern_is_no_alias_of_yaml():
    for pattern in ("*.jsonl", "*", "**/*.txt"):
        config = config_files.parse(MINIMAL, overrides=[f"data.corpus={pattern}"])
        assert config.data.corpus == (pattern,)
    for value in ("*.txt", "*books", "[a.txt, *.txt]"):
        with pytest.raises(
            ValueError, match=r'line 8 .* such as "\*\.txt", must be in q'
        ):
            config_files.parse(f"{MINIMAL}data:\n  corpus: {value}\n")


def test_a_preset_trains_for_the_method_that_it_names():
    """Options it does not name are the method's own defaults."""
    folder = importlib.resources.files("kvjax.training") / "presets"
    comment = (folder / "own-refreshkv.yaml").read_text("utf-8")
    (named,) = re.findall(r"`refreshkv:(.*?)`", comment)
    given = dict(option.split("=") for option in named.split(","))
    filled = ["model.checkpoint=mine", "data.corpus=mine.txt"]
    setting = config_files.load("own-refreshkv", filled).refreshkv
    trained = setting.model_dump(exclude={"decoded"})
    assert trained.pop("eviction") == "exact"
    for name, option in registry.options("refreshkv").items():
        if name in trained:
            assert str(trained[name]) == given.get(name, str(option.default)), name


def test_numbers_that_yaml_1_1_reads_as_text_or_as_floats():
    config = config_files.parse(
        MINIMAL + "optimizer: {lr: 1e-3, eps: 2.5E-9, warmup: 1e2, decay_steps: 0}\n"
    )
    assert config.optimizer.lr == 0.001
    assert config.optimizer.eps == 2.5e-9
    assert config.optimizer.warmup == 100


def test_set_changes_single_values():
    config = config_files.parse(
        MINIMAL,
        "file",
        [
            "optimizer.lr=1e-4",
            "stages.0.steps=7",
            "stages.0.lengths={32: 1, 64: 1}",
            "stages.0.mixture.keys=0.5",
            "data.corpus=[a.txt, b.txt]",
            "checkpoint.every_seconds=null",
        ],
    )
    assert config.optimizer.lr == 1e-4
    assert config.stages[0].steps == 7
    assert config.stages[0].lengths == {32: 1, 64: 1}
    assert config.stages[0].mixture == {"text": 1, "keys": 0.5}
    assert config.data.corpus == ("a.txt", "b.txt")


def test_the_recipe_of_a_step_is_that_of_its_stage():
    config = toys.config()
    assert [config.stage(i) is config.stages[0] for i in (0, 5, 6, 11)] == [1, 1, 0, 0]
    with pytest.raises(IndexError):
        config.stage(12)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (
            MINIMAL + "optimizer:\n  lrr: 1\n",
            [],
            "file line 8: unknown key optimizer.lrr; did you mean optimizer.lr?",
        ),
        (
            MINIMAL + "lr: 1\n",
            [],
            "file line 7: unknown key lr; did you mean optimizer.lr?",
        ),
        (
            MINIMAL,
            ["optimiser.lr=1"],
            "--set optimiser.lr=1: unknown key optimiser.lr; did you mean optimizer.l",
        ),
        (
            MINIMAL,
            ["stages.0.step=1"],
            "unknown key stages.0.step; did you mean stages.0.steps?",
        ),
        (MINIMAL, ["stages.3.steps=1"], "stages has entries 0 to 0."),
        (MINIMAL, ["optimizer.lr"], "--set optimizer.lr: give key=value"),
        (MINIMAL, ["a\nb=1"], "--set a b=1: unknown key a b"),
        (MINIMAL, ["optimizer.lr=[1"], "--set optimizer.lr=[1: line 1 is not YAML"),
        (MINIMAL, ["optimizer.lr=fast"], "--set: optimizer.lr='fast': Input should be"),
        (MINIMAL, ["optimizer.lr=-1"], "--set: optimizer.lr=-1: Input should be gr"),
        (MINIMAL, ["stages.0.steps=true"], "stages.0.steps=True"),
        (MINIMAL, ["stages.0.steps=1.5"], "stages.0.steps=1.5"),
        (MINIMAL, ["remat=1"], "remat=1"),
        (MINIMAL, ["optimizer.name=sgd"], "'adamw' or 'muon'"),
        (MINIMAL, ["stages.0.tokens=63"], "must be at least one row"),
        (MINIMAL, ["stages.0.shortest=65"], "shortest=65 must not exceed"),
        (MINIMAL, ["stages.0.mixture.text=0"], "shares of mixture sum to 0"),
        (MINIMAL, ["optimizer.decay_steps=5"], "is for schedule=constant"),
        (
            MINIMAL,
            ["optimizer.schedule=constant", "optimizer.decay_steps=11"],
            "optimizer.decay_steps=11 exceeds the 10 steps",
        ),
        (MINIMAL, ["optimizer.accumulate=3"], "make 4 rows of 64, which must be a mul"),
        (MINIMAL, ["mesh.data=8"], "multiple of 8"),
        (MINIMAL, ["evaluate.checks=[text]"], "'text' must be source@length"),
        (MINIMAL, ["checkpoint.best=loss"], "'loss' is measured by no check; there"),
        (MINIMAL, ["model.tokenizer=train"], "tokenizer belongs to config"),
        (MINIMAL, ["model.config={a: 1}"], "either checkpoint or config"),
        ("stages: []\n", [], "file: model is missing. (and 1 more)"),
        ("- 1\n", [], "file must be a mapping"),
        ("", [], "file must be a mapping"),
        ("a: [\n", [], "is not YAML"),
        (MINIMAL + "seed: 1\nseed: 2\n", [], "file line 8: key 'seed' is given twice"),
    ],
)
def test_mistakes_are_one_line(text, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config_files.parse(text, "file", changes)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no file and no preset; .*toy"):
        config_files.load("toyy")
    (tmp_path / "c.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        config_files.load(tmp_path / "c.yaml")


def rates(config):
    return np.asarray(optim.schedule(config)(np.arange(config.steps)))


def check_resume(old, new, step):
    before, now = (np.asarray(optim.schedule(c)(np.arange(step))) for c in (old, new))
    config_files.check_resume(old, new, step, before, now)


CONSTANT = {"optimizer": {"lr": 1e-2, "warmup": 3, "schedule": "constant"}}


@pytest.mark.parametrize(
    "changes",
    [
        ["log.every=1", "checkpoint.keep=5", "evaluate.every=0", "data.threads=7"],
        ["stages.1.steps=100"],
        ["optimizer.decay_steps=4"],
        ["stages.1.mixture={noise: 1}"],  # its steps are all to come
        ["mesh.data=2"],
        ["data.corpus=moved.txt", "model.tokenizer=moved", "model.dtype=bfloat16"],
    ],
)
def test_what_a_resumed_run_may_change(changes):
    check_resume(toys.config(**CONSTANT), toys.config(*changes, **CONSTANT), 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optimizer.lr=1e-3"], r"may not change optimizer.lr \(0.01 was saved\)"),
        (["seed=1", "remat=true"], r"remat \(False was saved\), seed \(0 was saved\)"),
        (["data.seed=3"], "data.seed"),
        (["stages.0.mixture={noise: 1}"], "stages differ at step 0, which is done"),
        (["stages.0.steps=5"], "stages differ at step 5"),
        (["stages.1.shortest=null"], "stages differ at step 6"),
        (["optimizer.decay_steps=5"], "learning rate of step 7, which is done, would"),
        (["stages.1.steps=1"], "is at step 8, and the stages now end at 7"),
    ],
)
def test_what_it_may_not(changes, message):
    old, new = toys.config(**CONSTANT), toys.config(*changes, **CONSTANT)
    with pytest.raises(ValueError, match=message):
        check_resume(old, new, 8)


def test_a_longer_cosine_changes_the_past():
    with pytest.raises(ValueError, match="learning rate of step 3") as caught:
        check_resume(toys.config(), toys.config("stages.1.steps=9"), 8)
    assert "schedule=cosine is spread over all steps" in str(caught.value)


def test_rates_that_hardly_differ_are_told_apart():
    """Two steps more in ten thousand: five digits of the rates are the same."""
    old, new = (toys.config(f"stages.1.steps={n}") for n in (9994, 9996))
    with pytest.raises(ValueError, match="learning rate of step") as caught:
        check_resume(old, new, 300)
    numbers = re.search(r"would be (\S+) and was (\S+): ", str(caught.value))
    assert float(numbers[1]) != float(numbers[2])


def test_paths_are_made_absolute_and_names_are_kept(tmp_path, monkeypatch):
    inside = tmp_path / "a [b]"
    (inside / "start").mkdir(parents=True)
    (inside / "b[1].txt").write_text("text")
    monkeypatch.chdir(inside)
    given = ["b[1].txt", "*.md", "stdlib/json/*.py", "/abs/*.txt"]
    config = config_files.parse(
        MINIMAL, "file", [f"data.corpus={given}", "model.checkpoint=start"]
    )
    found = config_files.located(config)
    assert found.model.checkpoint == str(inside / "start")
    escaped = str(inside).replace("[", "[[]")
    assert found.data.corpus == (
        *(str(inside / "b[1].txt"), f"{escaped}/*.md"),
        *("stdlib/json/*.py", "/abs/*.txt"),
    )
    assert text.read(found.data.corpus[:1]) == ["text"]
    named = config_files.parse(MINIMAL, "file", ["model.checkpoint=smollm2"])
    assert config_files.located(named).model.checkpoint == "smollm2"
    assert config_files.located(named).data == named.data
