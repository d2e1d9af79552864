"""The README tells the truth: its tables are generated, its commands and code run.

`python tests/test_readme.py` writes the generated parts anew, of the README and of
pages under `docs`, and the figure.
"""

import ast
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import compiling
import pytest
import ruler_page
from test_fidelity_cards import with_cards
from tiny import keep_layers

from kvjax import registry
from kvjax.evaluation.claims import recorded
from kvjax.evaluation.claims.claim import FROM_SHAPES
from kvjax.registry.describe import describe
from kvjax.report import labels, table
from kvjax.report.figures import compare
from models import embedded

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
LONGEST = 200  # lines of the README
INSTALLS = "pip install"
ROOMS = ("kvjax", "pallas_kernels", "models")


def method_table() -> str:
    rows = ["| method | what it does | exact when | source |", "|---|---|---|---|"]
    for name in with_cards():
        about = describe(registry.get(name))
        source = re.search(r"arXiv:(\d{4}\.\d{5})", about.source)
        link = f"[{source[1]}](https://arxiv.org/abs/{source[1]})" if source else ""
        exact = about.exact_when.rstrip(".")
        rows.append(f"| `{name}` | {about.summary} | {exact} | {link} |")
    return "\n".join(rows)


def tree() -> str:
    lines = ["```"]
    others = [name for name in registry.every() if name not in with_cards()]
    unfinished = [f"kvjax/methods/{name}" for name in others]
    for room in ROOMS:
        lines.append(f"{room}/")
        for path in sorted((ROOT / room).rglob("*.py")):
            whole = path.relative_to(ROOT).with_suffix("").as_posix()
            if any(f"{whole}/".startswith(f"{one}/") for one in unfinished):
                continue
            relative = path.relative_to(ROOT / room)
            docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
            if relative.name == "__init__.py" and len(relative.parts) == 1:
                continue
            first = (docstring or "").split("\n\n")[0].replace("\n", " ")
            clause = re.split(r"(?<=[^.]{3})\. ", first)[0].rstrip(".")
            lines.append(f"  {relative.as_posix():<42} {clause}".rstrip())
    return "\n".join([*lines, "```"])


def claims(folder: pathlib.Path | None = None) -> str:
    """What came of the claims in the last full run, of each model a sentence."""
    (_, embedded), *_ = runs = recorded.runs(folder or RESULTS)
    assert embedded["finished"]
    text = " ".join(counted_claims(*run) for run in runs)
    return textwrap.fill(text, 88, break_on_hyphens=False)


def test_claims_of_every_recorded_model_are_counted(tmp_path):
    newest = max(RESULTS.glob("*-reproduce.json"))
    document = json.loads(newest.read_text("utf-8"))
    (tmp_path / "2026-01-01-reproduce.json").write_text(json.dumps(document))
    other = document | {"model": "mine", "rows": document["rows"][:3]}
    (tmp_path / "2026-01-01-reproduce-mine.json").write_text(json.dumps(other))
    ours, theirs = " ".join(claims(tmp_path).split()).split(". ", 1)
    assert ours.startswith(f"Of {len(document['rows'])} claims ")
    assert theirs.startswith("On mine, of 3 claims ")
    assert theirs.endswith("(`benchmarks/results/2026-01-01-reproduce-mine.json`).")


def counted_claims(name: str, document: dict) -> str:
    rows, counts = document["rows"], document["verdicts"]
    counted = [
        row["measured"] == FROM_SHAPES and row["verdict"] == "reproduced"
        for row in rows
    ]
    of = "Of" if "model" not in document else f"On {document['model']}, of"
    return (
        f"{of} {len(rows)} claims {counts['reproduced']} are reproduced "
        f"({sum(counted)} of them by formulas alone), {counts['direction only']} in "
        f"direction only, {counts['not reproduced']} not, and "
        f"{counts['not measured']} could not be measured "
        f"(`benchmarks/results/{name}`)."
    )


# What `kvjax compare` wrote, under the names of the tables.
RESULTS = ROOT / "benchmarks" / "results"
COMPARISONS = {
    "embedded": "2026-11-29-compare-embedded.json",
    "smollm2": "2026-11-30-compare-smollm2-2k.json",
    "smollm2-4k": "2026-11-30-compare-smollm2-4k.json",
    "smollm2-quantised": "2026-12-01-compare-smollm2-1k-quantised.json",
}
IMAGES = ROOT / "docs" / "images"
FIGURE = IMAGES / "compare-smollm2.png"
FRONTIER = IMAGES / "kl-by-bytes-smollm2.png"
# Of the tables in a terminal the columns that tell most; those that a file lacks go.
HEADINGS = ("read / token", "held", "KL", "KL p99", "same tokens", "perplexity")
HEADINGS += ("passkey", "multi-key", "chain")
HEADINGS += ("passkey, after", "multi-key, after", "chain, after")


def comparison(name: str) -> dict:
    return json.loads((RESULTS / COMPARISONS[name]).read_text("utf-8"))


def comparison_table(name: str) -> str:
    """The tables of a comparison and of its sections, and what is in neither."""
    results = comparison(name)
    parts = [one_table(one) for one in (results, *results.get("sections", ()))]
    left_out = textwrap.fill(table.left_out(results), 88)
    return "\n\n".join([*parts, left_out] if left_out else parts)


def is_asked(results: dict) -> bool:
    """Whether answers say something: those of one example do not."""
    return results["manifest"]["settings"]["examples"] > 1


def one_table(results: dict) -> str:
    """The columns of the terminal's tables that tell most, and how it was measured."""
    assert results["complete"]
    answered = table.ANSWERED if is_asked(results) else ()
    columns = {c.heading: c for c in (*table.PREDICTED, *answered)}
    chosen = [columns[heading] for heading in HEADINGS if heading in columns]
    headings, cells = table.table_rows(results, chosen)
    rows = [
        "| " + " | ".join(headings) + " |",
        "|---" + "|--:" * (len(headings) - 1) + "|",
    ]
    rows += [f"| `{name}` | {' | '.join(numbers)} |" for name, *numbers in cells]
    # Speeds are of a machine that did other work too.
    said = [table.predicted_caption(results)]
    if is_asked(results):
        said.append(table.answered_caption(results, speed=False))
    caption = " ".join([*said, labels.of_results(results).shared])
    return "\n".join([*rows, "", textwrap.fill(caption, 88)])


GENERATED = {"methods": method_table, "tree": tree, "claims": claims} | {
    name: functools.partial(comparison_table, name) for name in COMPARISONS
}
if ruler_page.is_there():
    GENERATED["ruler"] = ruler_page.table


def page_of(name: str) -> pathlib.Path:
    """The page that has the markers of a generated part."""
    marker = f"\n<!-- {name} -->\n"
    (page,) = [page for page in PAGES if marker in page.read_text("utf-8")]
    return page


def between(text: str, name: str) -> re.Match:
    return re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)


def blocks(language: str) -> list[str]:
    text = README.read_text("utf-8")
    return re.findall(f"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.strip().splitlines()]
    # Installing is what `.ci/run` and a newcomer do; what follows it runs here.
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if not part.startswith((INSTALLS, "pytest"))]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_current(name):
    found = between(page_of(name).read_text("utf-8"), name)[1].strip()
    assert found == GENERATED[name](), "run: python tests/test_readme.py"


def test_every_method_has_a_source():
    for name in with_cards():
        assert f"`{name}`" in method_table()
    assert method_table().count("arxiv.org") == len(with_cards())


def test_the_readme_is_short():
    # With room for a method more: its three files change no other page by hand.
    assert len(README.read_text("utf-8").splitlines()) < LONGEST


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text("utf-8"))
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """The first layer of the embedded model: compiles in a quarter of the time."""
    folder = tmp_path_factory.mktemp("models") / "one-layer"
    shutil.copytree(embedded.path(), folder)
    keep_layers(folder, 1)
    return folder


# What the comment on a command says that does not run as it stands.
SHORTENED = "# shortened in the tests"


def shorter(command: str, model: pathlib.Path) -> list[str]:
    """Arguments to append to a command, none unless its comment says so."""
    if not command.endswith(SHORTENED):
        return []
    if "smollm2" in command:
        # A method takes 30 layers half a minute to compile; tests/models has the rest.
        examples = ["--method", "full", "--n", "1", "--windows", "1"]
        return [*examples, "--context", "320", "--new-tokens", "16"]
    # Five programs a method; that every method is taken, tests/cli asserts.
    return ["--model", str(model), "--method", "quest", "--method", "snapkv"]


@pytest.mark.parametrize("command", commands())
def test_shown_command_runs(command, tmp_path, one_layer, request):
    program, *arguments = shlex.split(command, comments=True)
    assert program == "kvjax"
    assert (SHORTENED in command) == (arguments[0] == "compare")
    if "smollm2" in arguments:
        request.getfixturevalue("smollm2")
    arguments += shorter(command, one_layer)
    shutil.copy(ROOT / "CONTRIBUTING.md", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "kvjax", *arguments],
        cwd=tmp_path,
        env=os.environ | compiling.ENVIRONMENT,  # most of the time is compiling
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_shown_python_runs(tmp_path):
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | compiling.ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


if __name__ == "__main__":
    for name, generate in GENERATED.items():
        page = page_of(name)
        text = page.read_text("utf-8")
        start, end = between(text, name).span(1)
        page.write_text(text[:start] + generate() + "\n" + text[end:], "utf-8")
    compare.scatter(comparison("smollm2")).savefig(FIGURE, dpi=110)
    wide = compare.BROAD._replace(width=16.0)  # beside a key of many long names
    lost = compare.scatter(comparison("smollm2-quantised"), ["kl"], layout=wide)
    lost.savefig(FRONTIER, dpi=110)
