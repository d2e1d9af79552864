"""`kvjax reproduce`: rows on stdout and on disk, whatever happens on the way."""

import dataclasses
import json

import pytest

from kvjax import cli
from kvjax.evaluation import claims
from kvjax.evaluation.claims.claim import VERDICTS, Effect, Measured

COUNTED = ("--claim", "retro-bytes", "--claim", "completion-state")
TEMPLATE = claims.named(["retro-bytes"])[0]


def toy(name, measure):
    return dataclasses.replace(
        TEMPLATE, name=name, measure=measure, bar=Effect(0.0, 0.0)
    )


def test_claims_are_measured_in_the_order_of_the_table(run, tmp_path):
    folder = tmp_path / "out"
    printed = run("reproduce", *COUNTED, "--quick", "--json", "--out", folder)
    document = json.loads(printed)
    assert document == json.loads((folder / "results.json").read_text())
    assert (folder / "report.html").read_text().count("<tr>") >= 5
    assert document["quick"]
    assert document["finished"]
    assert [row["name"] for row in document["rows"]] == [
        "completion-state",
        "retro-bytes",
    ]
    for row in document["rows"]:
        low, high = row["interval"]
        assert low <= row["value"] <= high
        assert row["n"] >= 1
        assert row["verdict"] in VERDICTS
        assert row["command"] == f"kvjax reproduce --claim {row['name']}"
    assert document["manifest"]["arguments"][0] == "reproduce"


def test_a_run_of_the_embedded_models_goes_on_too(run, fail, tmp_path, monkeypatch):
    run("reproduce", *COUNTED, "--quick", "--out", tmp_path)
    before = json.loads((tmp_path / "results.json").read_text())["rows"]

    def broken(session):
        raise AssertionError("measured again")

    again = dataclasses.replace(TEMPLATE, measure=broken)
    monkeypatch.setattr(claims, "named", lambda names: (again,))
    run("reproduce", "--quick", "--continue", "--out", tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == before
    message = fail("reproduce", "--continue", "--out", tmp_path)
    assert "was made with layer_context=1024 and cannot go on with 2048" in message


def test_the_table_says_value_verdict_and_reason(run, tmp_path):
    out = run("reproduce", "--claim", "retro-bytes", "--out", tmp_path)
    said = " ".join(out.split())
    assert "1.6% to 3.0% more" in said
    assert "retro-bytes: reproduced. The whole interval is ≤ 1.03." in said
    assert "kvjax reproduce --claim retro-bytes" in said
    assert "1 claims, full sizes: 1 reproduced" in said


def test_the_list_measures_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = json.loads(run("reproduce", "--list", "--json"))
    assert [row["name"] for row in listed] == [claim.name for claim in claims.ALL]
    out = run("reproduce", "--list", "--claim", "retro-text")
    assert out.startswith("retro-text  It predicts better than Quest")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--claim", "cascade-recal-2"], "did you mean 'cascade-recall-2'?"),
        (["--results", "nowhere"], "--results nowhere is not a folder"),
    ],
)
def test_mistakes(fail, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail("reproduce", *options)


def test_what_is_interrupted_keeps_its_finished_rows(tmp_path, monkeypatch, capsys):
    def interrupted(session):
        raise KeyboardInterrupt

    def broken(session):
        raise ZeroDivisionError

    fine = toy("fine", lambda session: Measured(2.0, 1.0, 3.0, 4))
    for name, measure in (("interrupted", interrupted), ("broken", broken)):
        pair = fine, toy(name, measure)
        monkeypatch.setattr(claims, "named", lambda names, pair=pair: pair)
        arguments = ["reproduce", "--out", str(tmp_path / name)]
        if name == "interrupted":
            assert cli.run(arguments) == 130
            assert capsys.readouterr().err.endswith("kvjax: error: interrupted.\n")
        else:
            with pytest.raises(ZeroDivisionError):  # a fault of ours stays visible
                cli.run(arguments)
        document = json.loads((tmp_path / name / "results.json").read_text())
        assert [row["name"] for row in document["rows"]] == ["fine"]
        assert not document["finished"]
