"""Claims: a verdict follows from value, interval and bar, and from nothing else."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import pytest

import kvjax
from kvjax import cli, registry
from kvjax.evaluation import claims
from kvjax.evaluation.claims import recorded, runner, session
from kvjax.evaluation.claims.claim import (
    Claim,
    Effect,
    Measured,
    NotMeasuredError,
    Within,
    as_dict,
    from_shapes,
    in_whole,
    judge,
    without_spread,
)
from kvjax.evaluation.claims.measure import steps
from kvjax.evaluation.claims.papers import (
    cascade,
    citrus,
    critiprefill,
    entmaxkv,
    hip,
    refreshkv,
    retro,
    squeezed,
    subgen,
    topk_completion,
)
from kvjax.report import claims_page
from kvjax.report.figures import claims as figures_claims

PAPERS = (cascade, citrus, critiprefill, entmaxkv, hip, refreshkv, retro)
PAPERS += (squeezed, subgen, topk_completion)
inf = math.inf


def reading() -> session.Session:
    return session.session(kvjax.parse, kvjax.parse, "", quick=True)


def measured(value, low, high):
    return Measured(value, low, high, 5)


@pytest.mark.parametrize(
    ("bar", "found", "verdict"),
    [
        # Beyond nothing is enough where the paper gives no size.
        (Effect(0.0, 0.0), (0.2, 0.1, 0.3), "reproduced"),
        (Effect(0.0, 0.0), (0.2, 0.0, 0.4), "direction only"),  # touches no effect
        (Effect(0.0, 0.0), (0.2, -0.1, 0.5), "direction only"),
        (Effect(0.0, 0.0), (0.0, 0.0, 0.0), "not reproduced"),  # exactly no effect
        (Effect(0.0, 0.0), (-0.2, -0.3, -0.1), "not reproduced"),
        (Effect(0.0, 0.0), (-0.2, -0.5, 0.1), "not reproduced"),
        # A size to be reached.
        (Effect(1.0, 3.0), (3.0, 2.9, 3.1), "reproduced"),
        (Effect(1.0, 3.0), (2.99, 2.9, 3.1), "direction only"),
        (Effect(1.0, 3.0), (4.0, 1.0, 7.0), "direction only"),
        (Effect(1.0, 3.0), (0.99, 0.9, 3.5), "not reproduced"),
        # Lower is better: everything turned round.
        (Effect(1.0, 0.25, "lower"), (0.25, 0.2, 0.3), "reproduced"),
        (Effect(1.0, 0.25, "lower"), (0.26, 0.2, 0.3), "direction only"),
        (Effect(1.0, 0.25, "lower"), (0.2, -1.0, 1.0), "direction only"),
        (Effect(1.0, 0.25, "lower"), (1.0, 0.9, 1.1), "not reproduced"),
        (Effect(1.0, 0.25, "lower"), (1.2, 1.1, 1.3), "not reproduced"),
        # A spread that is not known shows a direction and no more.
        (Effect(0.0, 0.0), (0.2, -inf, inf), "direction only"),
        (Effect(0.0, 0.0), (-0.2, -inf, inf), "not reproduced"),
        # No change, up to a bound that belongs to it.
        (Within(1.0), (1.0, 1.0, 1.0), "reproduced"),
        (Within(1.0), (0.9, 0.8, 1.0), "reproduced"),
        (Within(1.0), (0.9, 0.8, 1.01), "direction only"),
        (Within(1.0), (1.01, 0.9, 1.1), "not reproduced"),
        (Within(1.0), (1.0, -inf, inf), "direction only"),
        (Within(-0.05, "higher"), (-0.05, -0.05, 0.1), "reproduced"),
        (Within(-0.05, "higher"), (0.0, -0.06, 0.1), "direction only"),
        (Within(-0.05, "higher"), (-0.06, -0.1, 0.1), "not reproduced"),
    ],
)
def test_verdicts(bar, found, verdict):
    assert bar.verdict(measured(*found))[0] == verdict


def a_claim(**changes) -> Claim:
    plain = Claim(
        name="toy",
        method="quest",
        sentence="It helps",
        source="arXiv:0000.00000, Table 1",
        paper="2 against 1",
        value="points",
        bar=Effect(0.0, 0.0),
        measure=lambda session: measured(0.2, 0.1, 0.3),
        because={"not reproduced": "it does not help here"},
        note="a toy",
    )
    return dataclasses.replace(plain, **changes)


def test_a_reason_says_what_the_verdict_follows_from_and_why():
    good, bad = (judge(a_claim(), measured(x, x - 0.1, x + 0.1)) for x in (0.2, -0.2))
    assert good.reason == "The interval is above 0, no effect. A toy."
    assert bad.reason == (
        "Not above 0, which is no effect. It does not help here. A toy."
    )


@pytest.mark.parametrize("found", [(math.nan, 0, 1), (2.0, 0, 1), (inf, 0, inf)])
def test_a_value_that_makes_no_sense_is_refused(found):
    with pytest.raises(ValueError, match="must be finite and within its interval"):
        judge(a_claim(), measured(*found))


def test_every_claim_says_where_it_is_from_and_how_to_measure_it_alone(monkeypatch):
    names = [claim.name for claim in claims.ALL]
    assert len(names) == len(set(names)) >= 14
    listed = []
    monkeypatch.setattr(
        "kvjax.cli.reproduce._print_list", lambda chosen, _: listed.extend(chosen)
    )
    for claim in claims.ALL:
        assert claim.method in (*registry.names(), *registry.transforms())
        assert re.search(r"arXiv:\d{4}\.\d{5}, \w", claim.source) or (
            claim.source.startswith("ours")
        )
        assert claim.paper
        assert not claim.sentence.endswith(".")
        program, *arguments = claim.command.split()
        assert program == "kvjax"
        assert cli.run([*arguments, "--list"]) == 0
    assert listed == list(claims.ALL)  # each command chooses its own claim
    # Each paper's abstract is one of those whose methods the library has.
    methods = {claim.method for claim in claims.ALL}
    assert methods == {module.__name__.split(".")[-1] for module in PAPERS}


def test_an_unknown_claim_names_the_nearest():
    with pytest.raises(ValueError, match=r"'retro-txt'; did you mean 'retro-text'\?"):
        claims.named(["retro-txt"])
    assert claims.named(()) == claims.ALL
    chosen = claims.named(["retro-text", "completion-error"])
    assert [claim.name for claim in chosen] == ["completion-error", "retro-text"]


# Runs of toy claims.


def test_a_claim_that_cannot_be_measured_loses_no_other():
    def missing(session):
        raise NotMeasuredError("no GPU is at hand.")

    seen = []
    three = [a_claim(), a_claim(name="gpu", measure=missing), a_claim(name="last")]
    rows = runner.run(three, reading(), finished=lambda rows: seen.append(len(rows)))
    assert [row.verdict for row in rows] == ["reproduced", "not measured", "reproduced"]
    assert rows[1].reason == "no GPU is at hand."
    assert seen == [1, 2, 3]


def test_a_fault_is_raised_once_what_came_before_is_handed_over():
    def broken(session):
        raise ZeroDivisionError

    kept = []
    with pytest.raises(ZeroDivisionError):
        runner.run(
            [a_claim(), a_claim(name="broken", measure=broken), a_claim(name="last")],
            reading(),
            finished=lambda rows: kept.append([row.claim.name for row in rows]),
        )
    assert kept == [["toy"]]


def test_quick_runs_compile_with_few_optimisations_but_for_what_is_timed():
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    seen = []

    def looks(session):
        with steps.optimised():
            seen.append(jax.config.read(name))
        seen.append(jax.config.read(name))
        return from_shapes(1.0)

    runner.run([a_claim(measure=looks)], reading(), quick=True)
    runner.run([a_claim(measure=looks)], reading(), quick=False)
    assert seen == [False, True, False, False]
    assert jax.config.read(name) == before


def test_what_a_formula_gives_is_told_from_what_was_measured():
    def formula(session):
        return from_shapes(1.0, note="of 4 layers")

    rows = runner.run([a_claim(), a_claim(name="bytes", measure=formula)], reading())
    found = claims_page.document(rows, {}, quick=False, asked=2)
    measured, counted = (row["measured"] for row in found["rows"])
    assert (measured, counted) == ("now", "never: counted")
    assert claims_page.summary(found).endswith(
        "0 not measured. By formulas, not by a run: 1."
    )
    assert rows[1].reason.endswith(" Of 4 layers.")
    only = claims_page.document(rows[:1], {}, quick=False, asked=2)
    assert claims_page.summary(only).endswith("0 not measured.")


def test_the_document_is_json_with_a_verdict_a_row(tmp_path):
    without = a_claim(name="alone", measure=lambda s: without_spread(1.5, 3))
    rows = runner.run([a_claim(), without], reading())
    found = claims_page.document(rows, {"date": "today"}, quick=True, asked=3)
    claims_page.write_results(tmp_path, found)
    claims_page.write_page(tmp_path, found)
    read = json.loads((tmp_path / "results.json").read_text())
    assert not read["finished"]
    assert read["verdicts"]["reproduced"] == read["verdicts"]["direction only"] == 1
    first, second = read["rows"]
    assert first["value"] == 0.2
    assert first["interval"] == [0.1, 0.3]
    assert second["interval"] == [None, None]
    needed = {"name", "value", "interval", "n", "verdict", "reason", "command"}
    assert needed <= set(first)
    html = (tmp_path / "report.html").read_text()
    assert "0.2 [0.1, 0.3]" in html
    assert 'class="verdict direction-only"' in html
    assert html.count("<svg") == 1
    text = claims_page.markdown(read)
    assert "| `toy`: It helps (arXiv:0000.00000, Table 1) |" in text


def test_another_model_has_a_column_and_claims_of_its_own(tmp_path):
    rows = runner.run([a_claim()], reading())
    found = claims_page.document(rows, {}, quick=False, asked=1)
    changes = {"value": "nats", "measure": lambda s: measured(-0.2, -0.3, -0.1)}
    both = [a_claim(elsewhere=changes), a_claim(name="new", note="", because={})]
    rows = runner.run([one.on("mine") for one in both], reading())
    about = {"model": "mine", "context": 2048, "n": 5}
    other = claims_page.document(rows, {}, quick=False, asked=2, about=about)
    assert claims_page.summary(other).startswith(
        "2 claims, mine, inputs of up to 2,048 tokens: 1 reproduced"
    )
    text = claims_page.markdown(found, [other])
    heading, _, first, second = text.splitlines()[:4]
    assert heading.endswith("| verdict | mine |")
    assert first.endswith(
        "| reproduced | -0.2 [-0.3, -0.1]; nats; bar > 0; n 5; **not reproduced** |"
    )
    assert "| - | - | - | - | 0.2 [0.1, 0.3]; points; bar > 0; n 5; **rep" in second
    ours, theirs = text.split("On mine:")
    assert "- `toy`: The interval is above 0, no effect. A toy." in ours
    assert "- `toy`: Not above 0, which is no effect. A toy." in theirs
    # The newest of each model, the embedded ones first.
    for name, document in {
        "2026-01-02-reproduce-mine.json": other,
        "2026-01-01-reproduce-mine.json": other | {"old": True},
        "2026-01-01-reproduce.json": found,
    }.items():
        (tmp_path / name).write_text(json.dumps(document))
    runs = recorded.runs(tmp_path)
    names = ["2026-01-01-reproduce.json", "2026-01-02-reproduce-mine.json"]
    assert [name for name, _ in runs] == names


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_is_whole_at_any_width(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, document = last_run()
    claims_page.print_table(document)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    printed = set(out.split())
    for row in document["rows"]:
        for cell in claims_page.cells(row):
            assert set(cell.split()) <= printed


def test_a_picture_has_no_effect_at_0_and_the_claims_side_to_the_right():
    row = as_dict(
        judge(a_claim(bar=Effect(1.0, 0.5, "lower")), measured(0.6, 0.5, 1.1))
    )
    value, low, high = figures_claims.position(row)
    assert (value, low, high) == pytest.approx((0.8, -0.2, 1.0))
    alone = as_dict(judge(a_claim(), without_spread(0.3, 1)))
    assert figures_claims.position(report_ready(alone)) == (figures_claims.SIDE,) * 3
    against = as_dict(judge(a_claim(), in_whole(-0.3, 1)))
    assert figures_claims.position(against) == (-figures_claims.SIDE,) * 3


def report_ready(row):
    return row | {"interval": [None, None]}


def test_a_picture_tells_verdicts_and_missing_intervals_apart():
    found = {
        "reproduced": measured(0.2, 0.1, 0.3),
        "direction only": measured(0.2, -0.1, 0.3),
        "not reproduced": measured(-0.2, -0.3, -0.1),
    }
    rows = [as_dict(judge(a_claim(), value)) for value in found.values()]
    assert [row["verdict"] for row in rows] == list(found)
    rows += [as_dict(judge(a_claim(), in_whole(0.2, 9)))]
    rows += [report_ready(as_dict(judge(a_claim(), without_spread(0.2, 1))))]
    assert [row["verdict"] for row in rows[3:]] == ["reproduced", "direction only"]
    figure = figures_claims.intervals(rows)
    (axis,) = figure.axes
    assert len(axis.collections) == 3  # lines are of intervals
    marks = {round(float(line.get_ydata()[0])): line for line in axis.lines[:-1]}
    looks = [
        (marks[y].get_marker(), marks[y].get_color(), marks[y].get_markerfacecolor())
        for y in range(5)
    ]
    assert len(set(looks)) == 5
    full, part = looks[0], looks[1]
    assert full[2] != "white" == part[2] == looks[4][2]
    # What has no interval stands at no distance, and is no row with one.
    assert [marks[y].get_marker() for y in (3, 4)] == [">", ">"]
    assert (
        max(float(marks[y].get_xdata()[0]) for y in (3, 4)) == figures_claims.SIDE < 1
    )
    labels = [text.get_text() for text in axis.get_xticklabels()]
    assert "as claimed" not in " ".join(labels)
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == [*found, "no interval"]
    assert "farthest from it is 1" in " ".join(figure.get_supxlabel().split())


# The page of the last full run.

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reproduce.md"
TABLE = re.compile("(?<=<!-- table -->\\n).*(?=<!-- /table -->)", re.DOTALL)


def last_run() -> tuple[str, dict]:
    path = max(RESULTS.glob("*-reproduce.json"))
    return path.name, json.loads(path.read_text("utf-8"))


def table() -> str:
    name, document = last_run()
    about = document["manifest"]
    said = f"{about['date'][:10]}, {about['cpu_count']} cores, jax {about['jax']}"
    if "note" in about:
        said = f"{said}; {about['note']}"
    (_, *others) = recorded.runs(RESULTS)
    for other, found in others:
        said += f"; {found['model']}: `benchmarks/results/{other}`"
        said += f", {found['manifest']['date'][:10]}"
    shown = claims_page.markdown(document, [found for _, found in others])
    return f"`benchmarks/results/{name}`, {said}.\n\n{shown}\n"


def test_the_page_shows_the_last_full_run():
    assert TABLE.search(PAGE.read_text("utf-8"))[0] == table(), (
        "PYTHONPATH=.:tests python tests/evaluation/test_claims.py writes it anew"
    )


def test_the_last_full_run_is_judged_as_its_rows_say():
    _, document = last_run()
    assert document["finished"]
    assert [row["name"] for row in document["rows"]] == [c.name for c in claims.ALL]
    for claim, row in zip(claims.ALL, document["rows"], strict=True):
        if row["value"] is None:
            assert row["verdict"] == "not measured"
            continue
        low, high = row["interval"]
        low, high = -inf if low is None else low, inf if high is None else high
        found = Measured(row["value"], low, high, row["n"], note=row["note"])
        again = judge(claim, found)
        assert (again.verdict, again.reason) == (row["verdict"], row["reason"])
    held = document["verdicts"]["reproduced"] + document["verdicts"]["direction only"]
    assert held >= 11


def test_no_file_of_claims_writes_a_verdict_by_hand():
    for module in PAPERS:
        source = pathlib.Path(module.__file__).read_text()
        assert "verdict" not in source
        assert "Row(" not in source


if __name__ == "__main__":
    text = TABLE.sub(lambda _: table(), PAGE.read_text("utf-8"))
    PAGE.write_text(text, "utf-8")
