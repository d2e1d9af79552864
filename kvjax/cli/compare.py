"""`kvjax compare`: what methods read and what they lose, side by side."""

import dataclasses
import hashlib
import itertools
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

import kvjax
from kvjax import copies, files, registry
from kvjax.cli.methods import print_method_notes
from kvjax.cli.options import (
    METHOD_HELP,
    AnswersOption,
    AskChatOption,
    ChunkOption,
    ContextOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    NewTokensOption,
    SeedOption,
    TasksOption,
    TextOption,
    arguments_given,
    given_text,
    load,
    load_decoder,
    model_name,
    packing,
    positive,
    questions_of,
    shown_name,
    whole_numbers,
    with_budget,
)
from kvjax.cli.progress import show_progress
from kvjax.registry.specs import names as names_in
from kvjax.report import documents, earlier, html_page, table, terminal

if TYPE_CHECKING:
    from kvjax.evaluation.compare_inputs import Inputs, Settings

# Compared with its own reference below the default model, whose attention is softmax.
ENTMAX = "embedded-entmax"


def compare(
    model: ModelOption = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=METHOD_HELP + " May be repeated. If left out: every method that suits "
            "the model, but for citrus, kvzip and baselines such as random, and Quest "
            f"under Retro; without --model also EntmaxKV, on {ENTMAX}."
        ),
    ] = None,
    context: ContextOption = 512,
    budget: Annotated[
        str,
        typer.Option(
            help="Tokens per KV head, where a method does not say; several, as "
            "64,128,256, for a row of each."
        ),
    ] = "128",
    n: Annotated[int, typer.Option(help="Examples of each retrieval task.")] = 15,
    windows: Annotated[int, typer.Option(help="Windows of the text.")] = 8,
    new_tokens: NewTokensOption = 64,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Rows decoded together, fewer where memory is short; at most 8 if "
            "left out."
        ),
    ] = None,
    seed: SeedOption = 0,
    question: Annotated[
        str,
        typer.Option(
            help="When questions are asked: seen, as the prompt ends; after a method "
            "has chosen what to keep of it; or both."
        ),
    ] = "seen",
    text: TextOption = None,
    tasks: TasksOption = None,
    chat: AskChatOption = False,
    save_answers: AnswersOption = None,
    out: Annotated[
        pathlib.Path,
        typer.Option(help="Folder for report.html, its data and its figures."),
    ] = pathlib.Path("kvjax-report"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a report that is there.")
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Keep the rows of a report, add others.")
    ] = False,
    chunk_size: ChunkOption = 1024,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decodes the same inputs under each method: what is read, what is lost."""
    from kvjax.evaluation import answers, compare_inputs
    from kvjax.evaluation.tasks import own

    positive(n=n, windows=windows)
    settings = compare_inputs.Settings(
        context=context,
        new_tokens=new_tokens,
        examples=n,
        windows=windows,
        batch=1 if batch is None else batch,
        seed=seed,
        chunk_size=chunk_size,
        question=question,
    )
    budgets = list(dict.fromkeys(whole_numbers("--budget", budget)))
    _methods(method or [], context, budgets)  # mistakes first
    print_method_notes(method or [])
    questions = questions_of(tasks)
    if question != "seen":
        own.check_contexts(questions)
    earlier.check_free(out, overwrite=overwrite, go_on=go_on)
    files.check_writable(out)
    before = earlier.read(out) if go_on else []
    # Without a report that says which answers are whole, none could be kept.
    answers.check_free(save_answers, overwrite=overwrite, go_on=bool(before))
    content, text_name = given_text(text, model)
    call = _Call(
        methods=method or [],
        budgets=budgets,
        batch=batch,
        dtype=dtype,
        settings=settings,
        tasks=tasks,
        questions=questions,
        chat=chat,
        content=content,
        text_name=text_name,
        out=out,
    )
    parts = [_part(call, model, before[0] if before else None)]
    if model is None and not method:
        parts.append(_part(call, ENTMAX, before[1] if len(before) > 1 else None))
    # Of an earlier report what this call does not run stays as it is.
    report = _Report(out, parts, before[len(parts) :], is_chosen=bool(method))
    for one in parts:
        print(
            f"kvjax: methods on {one.model.name}: {one.missing}; {context:,} tokens, "
            f"rows together: {one.settings.batch}",
            file=sys.stderr,
        )
    html_page.begin(out, report.document())
    if save_answers is not None and save_answers.exists():
        answers.begin(save_answers, report.answered())
    _run(report, save_answers)
    results = report.document([_kept(one) for one in parts], complete=True)
    page, data = html_page.write(out, results)
    if as_json:
        print(data.read_text(encoding="utf-8"), end="")
    else:
        table.print_table(results)
    print(f"wrote {page} and {data}", file=sys.stderr)


class _Call(NamedTuple):
    """A call of the command: what does not depend on the model."""

    methods: list[str]  # spec strings; none for all that suit
    budgets: list[int]
    batch: int | None
    dtype: str | None
    settings: "Settings"
    tasks: pathlib.Path | None
    questions: list
    chat: bool
    content: str  # of the text
    text_name: str
    out: pathlib.Path


class _Part(NamedTuple):
    """The comparison on one model."""

    model: kvjax.LanguageModel
    methods: dict[str, kvjax.Method]
    inputs: "Inputs"
    settings: "Settings"
    room: int
    about: dict[str, Any]  # its manifest
    rows: dict[str, Any]  # by method; those of this call are added to an earlier one's

    @property
    def missing(self) -> int:
        """Methods that have no row yet."""
        return len(self.methods.keys() - self.rows.keys())

    def in_order(self) -> list:
        """The rows there are, those of this call's methods first."""
        names = dict.fromkeys([*self.methods, *self.rows])
        return [self.rows[name] for name in names if name in self.rows]


class _Report(NamedTuple):
    """The document that a call writes: its parts, and those that stay as they are."""

    out: pathlib.Path
    parts: list[_Part]
    others: list[dict[str, Any]]
    is_chosen: bool  # methods were named: none is said to be left out

    def document(
        self, kept: Iterable[list] = (), complete: bool = False
    ) -> dict[str, Any]:
        """The document as far as rows are there; `kept` are for the pictures."""
        pictures = [*kept, *([] for _ in self.parts)]
        first, *more = (
            documents.results(one.in_order(), one.about, picture, complete=complete)
            for one, picture in zip(self.parts, pictures, strict=False)
        )
        specs = [name for one in self.parts for name in (*one.methods, *one.rows)]
        left_out = {} if self.is_chosen else _left_out(specs)
        return first | {"sections": [*more, *self.others], "left_out": left_out}

    def answered(self) -> set[tuple[str, str]]:
        """Models and methods whose rows are there, and their answers with them."""
        known = {(one.model.name, name) for one in self.parts for name in one.rows}
        return known | {
            (one["manifest"]["model"], row["method"])
            for one in self.others
            for row in one["rows"]
        }


def _part(call: _Call, name: str | None, before: Mapping[str, Any] | None) -> _Part:
    """The comparison on the model of that name, going on with what is there of it."""
    from kvjax.evaluation import compare_inputs

    decoder = load_decoder(name, call.dtype)
    copies.refuse(copies.of(decoder), "kvjax compare")
    specs = call.methods or _every(decoder.alpha)
    methods = _methods(specs, call.settings.context, call.budgets)
    fixed, room = _fitted(decoder, name, methods, call.settings, call.batch, before)
    language_model = load(name, call.dtype)
    about = documents.manifest(
        version=kvjax.__version__,
        model=language_model.name,
        arguments=arguments_given.get(),
        settings=dataclasses.asdict(fixed)
        | {
            "budget": _one_or_all(call.budgets),
            "dtype": str(decoder.cache_spec(1, 1).dtype),
            "weights": _fingerprint(language_model.params),
            "text_sha256": hashlib.sha256(call.content.encode()).hexdigest(),
        }
        | _asked_otherwise(call.tasks, call.questions, call.chat),
    )
    about["text"] = call.text_name
    rows = {} if before is None else earlier.rows(call.out, before, about)
    inputs = compare_inputs.make_inputs(
        language_model,
        call.content,
        fixed,
        questions=call.questions,
        is_chat=call.chat,
    )
    return _Part(language_model, methods, inputs, fixed, room, about, rows)


def _run(report: _Report, save_answers: pathlib.Path | None) -> None:
    """Runs the methods that have no row, and writes the report after each."""
    from kvjax.evaluation import answers
    from kvjax.evaluation import compare as comparison

    parts = report.parts
    with show_progress(sum(one.missing for one in parts)) as progress:
        for one in parts:

            def keep(row, one=one):
                one.rows[row.method] = row
                documents.write_data(report.out, report.document())

            def at(name, fraction, one=one):
                # Both have a `full`.
                beside = "" if one is parts[0] else f" on {one.model.name}"
                progress(name + beside, fraction)

            comparison.compare(
                one.model,
                one.methods,
                one.inputs,
                one.settings,
                known=tuple(name for name in one.rows if name in one.methods),
                room=one.room,
                on_row=keep,
                on_answer=answers.keeper(save_answers, one.model.name),
                progress=at,
            )


def _fitted(
    decoder,
    name: str | None,
    methods,
    settings,
    batch: int | None,
    before: Mapping[str, Any] | None,
) -> tuple["Settings", int]:
    """The settings with a batch that memory has room for, and the room for states.

    Says on stderr where that is fewer rows than were asked for.

    Args:
        batch: that was asked for.
        before: the comparison that is gone on with, if any, whose rows had one.

    Raises:
        ValueError: if what one row takes, temporaries aside, exceeds the memory.
    """
    import models
    from kvjax.evaluation import compare as comparison
    from kvjax.evaluation import memory

    room = _room()
    had = earlier.batch(before) if before and batch is None else None
    wanted = batch or had
    if wanted is None:
        wanted = comparison.batch_that_fits(decoder, methods, settings, room)
    footprint = models.footprint(decoder, packing.get(), model_name(name))
    free = memory.free_bytes()
    fit = memory.fit(
        decoder,
        methods,
        dataclasses.replace(settings, batch=wanted),
        weights=footprint.held,
        mlp_width=footprint.mlp_width,
        room=room,
        free=free,
    )
    takes = ", ".join(
        f"{name} {table.format_bytes(count)}"
        for name, count in fit.need._asdict().items()
    )
    if free is not None and fit.need.weights + fit.need.states > free:
        raise ValueError(
            f"comparing at context={settings.context} takes more than this machine "
            f"has: {takes} for one row; {table.format_bytes(free)} are free: lower "
            "--context, or use a machine with more memory."
        )
    if free is not None and fit.need.total > free:
        print(
            f"kvjax: one row at a time may take more than the "
            f"{table.format_bytes(free)} that are free: {takes}",
            file=sys.stderr,
        )
    if fit.batch < wanted and had is None:
        print(
            f"kvjax: {fit.batch} rows together instead of {wanted}, to fit the "
            f"{table.format_bytes(free or 0)} that are free: {takes}",
            file=sys.stderr,
        )
    return dataclasses.replace(settings, batch=had or fit.batch), fit.room


def _asked_otherwise(
    tasks: pathlib.Path | None, questions: list, chat: bool
) -> dict[str, Any]:
    """Settings that only some comparisons have: reports without them stay theirs."""
    settings: dict[str, Any] = {"chat": True} if chat else {}
    if tasks is not None:
        digest = hashlib.sha256(repr(questions).encode()).hexdigest()
        settings |= {"tasks": shown_name(tasks), "tasks_sha256": digest}
    return settings


def _one_or_all(budgets: list[int]) -> int | list[int]:
    return budgets[0] if len(budgets) == 1 else budgets


def _fingerprint(params) -> str:
    """A digest of the sums of all weights: other weights have another one."""
    import jax
    import jax.numpy as jnp

    sums = [float(jnp.sum(x, dtype=jnp.float32)) for x in jax.tree.leaves(params)]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def _room() -> int:
    """Bytes for the states of methods that read together: half of what is free."""
    import jax

    from kvjax.evaluation import compare as comparison

    stats = jax.devices()[0].memory_stats() or {}  # of a CPU there are none
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    return max(free // 2, comparison.ROOM)


def _kept(part: _Part) -> list:
    """Returns what methods of constant memory hold of a text, for the picture.

    Of the rows of one method, which differ in budget, it is the first.
    """
    from kvjax import accounting
    from kvjax.evaluation import kept_tokens

    tokens = part.inputs.windows[0]
    every = max(len(tokens) // 16, 1)
    rows: dict[str, str] = {}
    for name in part.rows:
        rows.setdefault(terminal.without_value(name, "budget"), name)
    methods = {name: registry.parse(name) for name in rows.values()}
    return [
        kept_tokens.kept(part.model, method, tokens, every=every, name=name)
        for name, method in methods.items()
        if not accounting.grows_with_prompt(method, part.model.decoder)
    ]


# More than one way of a method that is worth a line of its own.
VARIANTS = {"entmaxkv": ("selector=gaussian", "certified=true")}
# Transforms of methods for softmax that are worth one too.
TRANSFORMED = ("retro+quest",)
# What has a row when it is named: each adds to the minutes of all others. Baselines,
# KVzip, which reads prompts twice, and the systems that RefreshKV is beside.
BY_NAME = ("expected_attention", "keydiff", "knorm", "kvzip", "random")
BY_NAME += ("citrus", "hip", "squeezed", "subgen")
# What `full` is, on a model for entmax.
SAME = "entmax_full"


def _every(alpha: float) -> list[str]:
    """Spec strings of what a model of that alpha can be compared under (1: softmax)."""
    specs = []
    for name in registry.names(alpha):
        if name in BY_NAME or name == SAME:
            continue
        variants = VARIANTS.get(name, ())
        specs += [name, *(f"{name}:{options}" for options in variants)]
    return [*specs, *(TRANSFORMED if alpha == 1 else ())]


def _left_out(specs: Iterable[str]) -> dict[str, list[str]]:
    """Registered methods that none of the specs has, by the reason."""
    rows = {name for spec in specs for name in names_in(spec)}
    left = [name for name in registry.names() if name not in rows]
    names = [name for name in left if name not in BY_NAME]
    has_entmax = any(name in rows for name in registry.names(1.5) if name != "full")
    reasons = {
        "full is the same on an entmax model": [SAME]
        if has_entmax and SAME in names
        else [],
        "for entmax models": [
            name
            for name in names
            if name in registry.names(1.5) and not (has_entmax and name == SAME)
        ],
        "for softmax models": [n for n in names if n in registry.names(1.0)],
        "for softmax models, when named: --method random": [
            name for name in left if name in BY_NAME
        ],
        "made of another method: --method refresh+quest": [
            name for name in registry.transforms() if name not in rows
        ],
    }
    return {reason: names for reason, names in reasons.items() if names}


def _methods(
    given: Sequence[str], context: int, budgets: Sequence[int]
) -> dict[str, kvjax.Method]:
    """Methods by their full spec strings, `full` first, then each at every budget."""
    positive(context=context)
    is_used = not given or any(with_budget(spec, 1) != spec for spec in given)
    for budget in budgets:
        positive(budget=budget)
        if is_used and budget >= context:
            raise ValueError(
                f"--budget {budget} must be below --context {context}: otherwise "
                "nothing is left out and every method is exact. A quarter would be "
                f"--budget {max(context // 4, 1)}."
            )
    parsed = {"full": registry.parse("full")}
    for spec, budget in itertools.product(given, budgets):
        spec = with_budget(spec, budget)
        if spec not in parsed:  # it may say one itself, or have none
            parsed[spec] = registry.parse(spec)
    return parsed
