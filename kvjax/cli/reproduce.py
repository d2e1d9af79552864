"""`kvjax reproduce`: the papers' claims, each measured here and judged."""

import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import typer

import kvjax
from kvjax import files, registry
from kvjax.cli.options import (
    AskChatOption,
    JsonOption,
    ModelOption,
    RulerTextOption,
    TextOption,
    arguments_given,
    given_text,
    held_out_text,
    load,
    positive,
    ruler_texts,
)
from kvjax.cli.progress import Update, show_progress
from kvjax.report import documents, earlier, terminal

CONTEXT, N = 2048, 20  # of a model that --model names
QUICK_CONTEXT, QUICK_N = 1024, 6
MOST_AT_ONCE = 8192  # tokens of inputs in a batch
PARTS = 2  # measurements that most claims take


def reproduce(
    claim: Annotated[
        list[str] | None,
        typer.Option(help="A claim by its name. May be repeated; all if left out."),
    ] = None,
    model: ModelOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: minutes, wider intervals.")
    ] = False,
    as_list: Annotated[
        bool, typer.Option("--list", help="Print the claims and measure nothing.")
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(
            help="With --model: tokens of the longest inputs; 2,048 if left out, or "
            "what the model was made for."
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            help="With --model: windows of text, and examples of each task; 20 if left "
            "out. More of them go on where fewer ended."
        ),
    ] = None,
    cut: Annotated[
        int | None,
        typer.Option(
            help="With --model: methods keep one in so many tokens; 8 if left out."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="With --model: rows together; 8,192 tokens if left out."),
    ] = None,
    text: TextOption = None,
    ruler_text: RulerTextOption = "shipped",
    chat: AskChatOption = False,
    results: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Folder of recorded runs; those of benchmarks/results if left out."
        ),
    ] = None,
    out: Annotated[
        pathlib.Path, typer.Option(help="Folder for report.html and results.json.")
    ] = pathlib.Path("kvjax-reproduce"),
    go_on: Annotated[
        bool,
        typer.Option(
            "--continue", help="Go on with the run in --out: keep what it has measured."
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="With --model: replace the run in --out."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measures the papers' claims on the embedded models or another, with verdicts."""
    from kvjax.evaluation import claims

    given = dict(context=context, n=n, cut=cut, batch=batch, text=text)
    given |= dict(chat=chat or None, overwrite=overwrite or None)
    if model is None:
        _refuse({"ruler_text": ruler_text} if ruler_text != "shipped" else {}, given)
        chosen = claims.named(claim or ())
    else:
        chosen = claims.on(model, claim or ())
    if as_list:
        _print_list(chosen, as_json)
        return
    if results is not None and not results.is_dir():
        raise ValueError(f"--results {results} is not a folder.")
    files.check_writable(out)
    if model is None:
        run = _embedded(quick, results)
    else:
        positive(**{name: x for name, x in given.items() if isinstance(x, int)})
        earlier.check_free(out, overwrite=overwrite, go_on=go_on)
        texts = given_text(text, model), ruler_text
        run = _of_model(model, given, texts, out, quick=quick, results=results)
        if overwrite:
            _remove(out)
    document = _measured(chosen, run, out, quick=quick, go_on=go_on)
    _say(document, out, as_json)


class _Run(NamedTuple):
    """The session that measures, and what the document says of it."""

    shared: Any  # a session
    manifest: dict[str, Any]
    about: dict[str, Any]  # of another model than the embedded ones


def _refuse(*given: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is of --model alone."""
    for name, value in [pair for options in given for pair in options.items()]:
        if value is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is of one model: add --model, or leave it "
                "out for the embedded ones, whose sizes are fixed."
            )


def _embedded(quick: bool, results: pathlib.Path | None) -> _Run:
    from kvjax.evaluation.claims import session

    shared = session.session(
        lambda name: load(name, "float32"),
        registry.parse,
        held_out_text(),
        quick=quick,
        results=results,
    )
    names = ", ".join((session.SOFTMAX, session.ENTMAX, session.REFRESHED))
    return _Run(shared, _manifest(names, shared.sizes._asdict()), {})


def _manifest(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    return documents.manifest(
        version=kvjax.__version__,
        model=model,
        arguments=arguments_given.get(),
        settings=settings,
    )


def _of_model(
    model: str,
    given: Mapping[str, Any],
    texts: tuple[tuple[str, str], str],
    out: pathlib.Path,
    *,
    quick: bool,
    results: pathlib.Path | None,
) -> _Run:
    """One model's run; refuses sizes that do not fit it before any work."""
    from kvjax.evaluation import compare_inputs
    from kvjax.evaluation.claims import samples, session
    from kvjax.evaluation.claims.measure import steps
    from kvjax.evaluation.claims.measure import texts as measured
    from kvjax.evaluation.tasks import chat

    (content, text_name), which = texts
    source = ruler_texts(which)
    if which == "published" and given["text"] is None:
        content, text_name = " ".join(source.prose()), "essays"
    language_model = load(model, "float32")
    decoder = language_model.decoder
    context = given["context"]
    if context is None:
        longest = QUICK_CONTEXT if quick else CONTEXT
        context = min(longest, decoder.context // 16 * 16)
    compare_inputs.check_context(language_model, context)
    if given["chat"]:
        chat.turn(language_model.tokenizer, "Any question?")
    n = given["n"] or (QUICK_N if quick else N)
    batch = given["batch"] or min(max(MOST_AT_ONCE // context, 1), 4, n)
    cut = given["cut"] or 8
    sizes = session.fitted(context, n=n, cut=cut, batch=batch, quick=quick)
    roles = session.roles(model, decoder.alpha)
    shared = session.session(
        lambda name: language_model,
        registry.parse,
        content,
        sizes=sizes,
        results=results,
        samples=samples.Samples(out / samples.FOLDER, ended=steps.drop_programs),
        models=roles,
        source=source,
        is_chat=bool(given["chat"]),
    )
    for role in roles:  # whether the text has so many windows
        measured.windows(shared, role)
    asked = {"text": text_name, "ruler_text": which, "chat": bool(given["chat"])}
    settings = sizes._asdict() | asked | {"seed": session.SEED}
    about = {"model": model, "context": context, "n": n}
    return _Run(shared, _manifest(language_model.name, settings), about)


def _remove(out: pathlib.Path) -> None:
    from kvjax.evaluation.claims import samples

    (out / earlier.DATA).unlink(missing_ok=True)
    shutil.rmtree(out / samples.FOLDER, ignore_errors=True)


def _earlier(chosen: Sequence, run: _Run, out: pathlib.Path) -> tuple[dict, dict]:
    """Rows of the run in a folder: those that stand, and those of other claims.

    A row stands if it was measured of as many samples. What is not measured is tried
    again.
    """
    from kvjax.evaluation import claims
    from kvjax.evaluation.claims import session
    from kvjax.evaluation.claims.claim import of_dict
    from kvjax.report import claims_page

    found = earlier.read(out)
    if not found:
        return {}, {}
    is_other = bool(run.about)
    free = session.COUNTS if is_other else ()
    earlier.check_alike(out, found[0], run.manifest, claims_page.FORMAT, free)
    before, now = found[0]["manifest"]["settings"], run.manifest["settings"]
    is_same = all(before.get(name) == now.get(name) for name in session.COUNTS)
    every = claims.on(run.about["model"]) if is_other else claims.ALL
    known, names = {one.name: one for one in every}, [one.name for one in chosen]
    rows = {
        row["name"]: of_dict(known[row["name"]], row)
        for row in found[0]["rows"]
        if row["name"] in known
    }
    stand = {
        name: row
        for name, row in rows.items()
        if name in names and row.found is not None and is_same
    }
    others = {name: row for name, row in rows.items() if name not in names}
    return stand, others


def _measured(
    chosen: Sequence, run: _Run, out: pathlib.Path, *, quick: bool, go_on: bool
) -> dict[str, Any]:
    """Judges the claims, and writes every row when it is there."""
    from kvjax.evaluation import claims
    from kvjax.evaluation.claims import runner
    from kvjax.report import claims_page

    stand, others = _earlier(chosen, run, out) if go_on else ({}, {})
    order = [one.name for one in (*claims.ALL, *claims.MORE)]

    def document_of(rows):
        known = others | {row.claim.name: row for row in rows}
        every = [known[name] for name in order if name in known] if others else rows
        asked = len(chosen) + len(others)
        return claims_page.document(
            every, run.manifest, quick=quick, asked=asked, about=run.about
        )

    if run.about:  # of what is killed before its first row, samples are known by it
        files.check_writable(out)
        claims_page.write_results(out, document_of(list(stand.values())))
    total = PARTS * (len(chosen) - len(stand)) if run.about else len(chosen)
    with show_progress(max(total, 1)) as progress:
        shown = _Parts(progress, run) if run.about else _Rows(progress)

        def finished(rows):
            # Row by row: what is interrupted keeps what it has.
            claims_page.write_results(out, document_of(rows))
            if rows[-1].claim.name not in stand:
                shown.finished(rows[-1])

        rows = runner.run(
            chosen,
            run.shared,
            quick=quick,
            earlier=stand,
            is_tolerant=bool(run.about),
            started=shown.started,
            finished=finished,
        )
    return document_of(rows)


class _Rows:
    """Claims as parts of the progress that is shown."""

    def __init__(self, progress: Update):
        self._progress = progress

    def started(self, claim: Any) -> None:
        self._progress(claim.name, 0.0)

    def finished(self, row: Any) -> None:
        self._progress(row.claim.name, 1.0)


class _Parts:
    """Measurements of claims as parts of the progress, but for those done before."""

    def __init__(self, progress: Update, run: _Run):
        self._progress, self._claim, self._count = progress, "", 0
        run.shared.samples.report(self._begun, self._sampled)

    def started(self, claim: Any) -> None:
        self._claim, self._count = claim.name, 0
        self._progress(self._part(1), 0.0)

    def finished(self, row: Any) -> None:
        if not self._count:  # no samples: a clock, a formula or a recorded run
            self._count = 1
            self._progress(self._part(1), 1.0 if row.cpu_seconds > 5 else None)
        for number in range(self._count, PARTS):
            self._progress(self._part(number + 1), None)

    def _part(self, number: int) -> str:
        return f"{self._claim} {number}"

    def _begun(self, kept: int, missing: int) -> None:
        del kept
        self._count += 1
        self._progress(self._part(self._count), 0.0 if missing else None)

    def _sampled(self, done: float) -> None:
        self._progress(self._part(self._count), done)


def _say(document: dict[str, Any], out: pathlib.Path, as_json: bool) -> None:
    from kvjax.report import claims_page

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
