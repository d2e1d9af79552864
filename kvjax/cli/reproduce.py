"""`kvjax reproduce`: the papers' claims, each measured here and judged."""

import json
import pathlib
import sys
from typing import Annotated

import typer

import kvjax
from kvjax import files, registry
from kvjax.cli.options import JsonOption, arguments_given, held_out_text, load
from kvjax.cli.progress import show_progress
from kvjax.report import documents, terminal


def reproduce(
    claim: Annotated[
        list[str] | None,
        typer.Option(help="A claim by its name. May be repeated; all if left out."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: minutes, wider intervals.")
    ] = False,
    as_list: Annotated[
        bool, typer.Option("--list", help="Print the claims and measure nothing.")
    ] = False,
    results: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Folder of recorded runs; those of benchmarks/results if left out."
        ),
    ] = None,
    out: Annotated[
        pathlib.Path, typer.Option(help="Folder for report.html and results.json.")
    ] = pathlib.Path("kvjax-reproduce"),
    as_json: JsonOption = False,
) -> None:
    """Measures the papers' claims on the embedded models, a verdict for each."""
    from kvjax.evaluation import claims
    from kvjax.evaluation.claims import runner, session
    from kvjax.report import claims_page

    chosen = claims.named(claim or ())
    if as_list:
        _print_list(chosen, as_json)
        return
    if results is not None and not results.is_dir():
        raise ValueError(f"--results {results} is not a folder.")
    files.check_writable(out)
    shared = session.session(
        lambda name: load(name, "float32"),
        registry.parse,
        held_out_text(),
        quick=quick,
        results=results,
    )
    about = documents.manifest(
        version=kvjax.__version__,
        model=", ".join((session.SOFTMAX, session.ENTMAX, session.REFRESHED)),
        arguments=arguments_given.get(),
        settings=shared.sizes._asdict(),
    )

    def document_of(rows):
        return claims_page.document(rows, about, quick=quick, asked=len(chosen))

    with show_progress(len(chosen)) as progress:

        def finished(rows):
            # Row by row: what is interrupted keeps what it has.
            claims_page.write_results(out, document_of(rows))
            progress(rows[-1].claim.name, 1.0)

        rows = runner.run(
            chosen,
            shared,
            quick=quick,
            started=lambda claim: progress(claim.name, 0.0),
            finished=finished,
        )
    document = document_of(rows)
    written = (
        claims_page.write_page(out, document),
        claims_page.write_results(out, document),
    )
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        claims_page.print_table(document)
    print("wrote {} and {}".format(*written), file=sys.stderr)


def _print_list(chosen, as_json: bool) -> None:
    if as_json:
        fields = "name", "method", "sentence", "source", "paper", "value", "command"
        rows = [{name: getattr(one, name) for name in fields} for one in chosen]
        print(json.dumps(rows, indent=2))
        return
    width = max(len(one.name) for one in chosen)
    for one in chosen:
        line = f"{one.name:<{width}}  {one.sentence} ({one.source})"
        terminal.say(line, later=" " * (width + 2))
