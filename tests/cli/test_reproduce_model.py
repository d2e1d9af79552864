"""`kvjax reproduce --model`: any model's claims; a run goes on after a kill."""

import json
import shutil

import pytest
import safetensors.numpy
from tiny import keep_layers

from kvjax import cli, files
from kvjax.evaluation import claims
from kvjax.evaluation.claims import samples
from kvjax.evaluation.claims.measure import steps
from models import embedded

CLAIMS = ("cascade-recall-2", "entmax-dropped", "refresh-bytes")
ARGUMENTS = [x for name in CLAIMS for x in ("--claim", name)]
TIMES = ("seconds", "cpu_seconds")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Another model than the embedded ones: one of them elsewhere, its first layer."""
    folder = tmp_path_factory.mktemp("model") / "mine"
    shutil.copytree(embedded.path(), folder)
    keep_layers(folder, 1)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    kept = {k: v for k, v in tensors.items() if "layers." not in k or ".0." in k}
    files.save_tensors(file, kept, {"format": "pt"})
    return folder


@pytest.fixture
def arguments(model):
    sizes = ["--context", "512", "--n", "2", "--batch", "1"]
    return ["reproduce", "--model", str(model), *sizes]


def rows_of(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_a_run_goes_on_where_it_ended(
    run, fail, arguments, model, tmp_path, monkeypatch, capsys
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    document = json.loads(run(*arguments, *ARGUMENTS, "--json", "--out", whole))
    assert document["model"] == str(model)
    assert (document["context"], document["n"], document["finished"]) == (512, 2, True)
    recall, dropped, counted = document["rows"]
    assert (recall["n"], counted["verdict"]) == (2, "reproduced")
    assert "attends by softmax" in dropped["reason"]
    assert recall["command"].startswith(f"kvjax reproduce --model {model} --claim")
    assert not recall["reason"].count("neighbours")  # that is of the embedded ones
    assert (whole / "report.html").is_file()

    write, written = samples.Samples._write, []

    def dies(self, name, found):
        write(self, name, found)
        written.append(name)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(samples.Samples, "_write", dies)
    assert cli.run([*arguments, *ARGUMENTS, "--out", str(cut)]) == 130
    assert rows_of(cut) == []
    capsys.readouterr()
    read, count = steps.read, []
    monkeypatch.setattr(steps, "read", lambda *a, **k: count.append(1) or read(*a, **k))
    # What is there is not thrown away by mistake.
    assert "by --continue" in fail(*arguments, *ARGUMENTS, "--out", cut)
    other = [*arguments, "--cut", "4", *ARGUMENTS]
    assert "made with cut=8 and cannot go on with 4" in fail(
        *other, "--continue", "--out", cut
    )
    run(*arguments, *ARGUMENTS, "--continue", "--out", cut)
    assert len(count) == 1  # of four
    assert rows_of(cut) == rows_of(whole)

    # Rows that are there stand; of others' claims too; more samples go on.
    def first(*options):
        run(*arguments, *options, "--continue", "--out", cut)
        return rows_of(cut)

    assert first("--claim", "refresh-bytes") == rows_of(whole)
    assert len(count) == 1
    longer = first("--n", "3", "--claim", "cascade-recall-2")
    assert [row["name"] for row in longer] == list(CLAIMS)
    assert (longer[0]["n"], len(count)) == (3, 3)


def test_the_list_is_of_all_that_another_model_can_tell(run):
    listed = json.loads(run("reproduce", "--model", "smollm2", "--list", "--json"))
    assert [one["name"] for one in listed] == [
        one.name for one in (*claims.ALL, *claims.MORE)
    ]
    assert all(" --model smollm2 " in one["command"] for one in listed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "4"], "--n is of one model: add --model"),
        (["--ruler-text", "published"], "--ruler-text is of one model: add --model"),
        (["--overwrite"], "--overwrite is of one model: add --model"),
    ],
)
def test_options_of_one_model(fail, options, message):
    assert message in fail("reproduce", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "16384"], "exceeds the 8192 tokens"),
        (["--context", "500"], "context=500 must be a multiple of 16"),
        (["--n", "900"], "n=900 windows of context=512 tokens need"),
        (["--n", "0"], "n"),
        (["--continue", "--overwrite"], "not both"),
        (["--claim", "completion-k"], "did you mean 'completion-kl'?"),
        (["--ruler-text", "published"], "kvjax fetch ruler"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_any_work(
    fail, arguments, options, message, tmp_path
):
    assert message in fail(*arguments, *options, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))
