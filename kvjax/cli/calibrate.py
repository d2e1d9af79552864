"""`kvjax calibrate`: the cheapest method and budget that keeps a loss below a bound."""

import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import typer

import kvjax
from kvjax import files, registry
from kvjax.attention.choices import check_choice
from kvjax.cli.methods import fitting, for_model, print_method_notes
from kvjax.cli.options import (
    METHOD_HELP,
    AskChatOption,
    BatchOption,
    ChunkOption,
    ContextOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    NewTokensOption,
    SeedOption,
    given_text,
    load,
    positive,
    questions_of,
    shown_name,
    whole_numbers,
    with_budget,
)
from kvjax.cli.progress import show_progress
from kvjax.report import table, terminal

if TYPE_CHECKING:
    from kvjax.evaluation.calibrate import Calibration, Candidate

Loss, Cost = Literal["kl", "answer"], Literal["read", "held"]
HEADINGS = ("method", "bytes", "loss", "below", "outcome")
# Where no method is given; of entmax models the other.
METHODS, ENTMAX_METHODS = ("quest", "snapkv", "streaming_llm"), ("entmaxkv",)
SHARES = (2, 4, 8)  # of the longest prompt, the budgets where none is given
STEP = 64  # that those are multiples of
WINDOWS = 200  # of a text, at most, where --n does not say

PromptsOption = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--text",
        help="Your prompts: FILE.jsonl, an object a line, with prompt, or with "
        "question, answer and perhaps context; or any text, whose windows are the "
        "prompts. Python sources that ship if left out.",
    ),
]
LossOption = Annotated[
    str,
    typer.Option(
        "--loss",
        help="kl: divergence from full attention, nats a token; answer: the share of "
        "questions answered wrong.",
    ),
]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help=f"{METHOD_HELP} May be repeated; {', '.join(METHODS)} if left out, of an "
        f"entmax model {ENTMAX_METHODS[0]}.",
    ),
]


class _Settings(NamedTuple):
    """The settings of a search."""

    loss: str
    at_most: float
    confidence: float
    clip: float
    by: str
    n: int | None
    context: int
    new_tokens: int
    batch: int
    seed: int
    is_chat: bool
    chunk_size: int

    @property
    def scale(self) -> float:
        """The largest loss of a prompt."""
        return self.clip if self.loss == "kl" else 1.0


class _Inputs(NamedTuple):
    """The prompts, tokens or questions, and where they are from."""

    prompts: list[Any]
    length: int  # of the longest, and what follows it
    name: str


def calibrate(
    model: ModelOption = None,
    text: PromptsOption = None,
    loss: LossOption = "kl",
    at_most: Annotated[
        float, typer.Option(help="The bound of the expected loss.")
    ] = 0.05,
    confidence: Annotated[
        float, typer.Option(help="Probability that what is said to hold does.")
    ] = 0.95,
    clip: Annotated[
        float,
        typer.Option(
            help="Of --loss kl: a prompt's divergence counts as this at most."
        ),
    ] = 1.0,
    by: Annotated[
        str,
        typer.Option(help="The cost: bytes read by a step, or held while decoding."),
    ] = "read",
    method: MethodsOption = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Budgets with commas, where a method does not say; a half, a quarter "
            "and an eighth of the longest prompt if left out."
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            help=f"Prompts, chosen by --seed; all, of a text {WINDOWS} windows at most."
        ),
    ] = None,
    context: ContextOption = 512,
    new_tokens: NewTokensOption = 64,
    batch: BatchOption = 8,
    seed: SeedOption = 0,
    chat: AskChatOption = False,
    chunk_size: ChunkOption = 1024,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Finds the cheapest method whose loss on your prompts stays below a bound.

    What holds does so together, for prompts drawn as these were, with the confidence.
    """
    settings = _Settings(
        loss=loss,
        at_most=at_most,
        confidence=confidence,
        clip=clip,
        by=by,
        n=n,
        context=context,
        new_tokens=new_tokens,
        batch=batch,
        seed=seed,
        is_chat=chat,
        chunk_size=chunk_size,
    )
    _check(settings, text)
    budgets = None if budget is None else whole_numbers("--budget", budget)
    for spec in method or []:
        for tokens in budgets or [1024]:
            registry.parse(with_budget(spec, tokens))
    print_method_notes(method or [])
    if loss == "answer":
        questions = questions_of(text)
        loaded = load(model, dtype)
        inputs = _asked(loaded, questions, text, settings)
    else:
        content, name = given_text(text, model)
        loaded = load(model, dtype)
        inputs = _read(loaded, content, name, settings)
    families = _families(loaded, method, budgets, inputs.length, settings)
    found, full_cost = _run(loaded, families, inputs, settings)
    document = {
        "model": loaded.name,
        "text": inputs.name,
        **settings._asdict(),
        "n": len(inputs.prompts),
        "longest": inputs.length,
        "full_bytes": full_cost,
        "level": found.level,
        "choice": found.choice,
        "rows": _rows(found, settings.scale),
    }
    if found.choice is None:
        raise ValueError(_refusal(document))
    if as_json:
        print(json.dumps(files.json_ready(document), indent=2))
    else:
        show(document)


def _check(settings: _Settings, text: pathlib.Path | None) -> None:
    """Raises ValueError for settings that nothing can be found under."""
    check_choice("loss", settings.loss, Loss)
    check_choice("by", settings.by, Cost)
    at_most, confidence, clip = settings.at_most, settings.confidence, settings.clip
    if not 0 < confidence < 1:
        raise ValueError(f"{confidence=} must be in (0, 1).")
    if not 0 < clip < float("inf"):
        raise ValueError(f"{clip=} must be above 0 and finite.")
    if not 0 < at_most < settings.scale:
        raise ValueError(
            f"{at_most=} must be above 0 and below {settings.scale:g}, which no loss "
            "exceeds."
        )
    counts = ("context", "batch", "chunk_size", *([] if settings.n is None else ["n"]))
    positive(**{name: getattr(settings, name) for name in counts})
    new_tokens, context = settings.new_tokens, settings.context
    if not 2 <= new_tokens < context:
        raise ValueError(f"{new_tokens=} must be in [2, {context=}).")
    if settings.loss == "kl" and settings.is_chat:
        raise ValueError("--loss kl asks nothing: leave --chat out.")
    if settings.loss == "answer" and text is None:
        raise ValueError(
            "--loss answer takes questions of yours: give --text FILE.jsonl."
        )


def _read(
    model: kvjax.LanguageModel, content: str, name: str, settings: _Settings
) -> _Inputs:
    """The prompts of `--loss kl`."""
    from kvjax.evaluation import calibrate as calibration
    from kvjax.evaluation import compare_inputs

    if name.endswith(".jsonl"):
        prompts = calibration.prompts_of_lines(
            model, content, name, new_tokens=settings.new_tokens
        )
        prompts = _chosen(prompts, settings)
    else:
        compare_inputs.check_context(model, settings.context)
        prompts = calibration.windows_of(
            model.tokenizer,
            content,
            context=settings.context,
            n=settings.n,
            most=WINDOWS,
            seed=settings.seed,
        )
    return _Inputs(prompts, max(map(len, prompts)), name)


def _asked(
    model: kvjax.LanguageModel,
    questions: list,
    path: pathlib.Path | None,
    settings: _Settings,
) -> _Inputs:
    """The questions of `--loss answer`."""
    from kvjax.evaluation import compare_inputs
    from kvjax.evaluation.tasks import own

    compare_inputs.check_context(model, settings.context)
    asked = own.prompts(
        model.tokenizer,
        _chosen(questions, settings),
        context=settings.context,
        new_tokens=settings.new_tokens,
        is_chat=settings.is_chat,
    )
    longest = max(len(example.prompt) for example in asked) + settings.new_tokens
    return _Inputs(asked, longest, "" if path is None else shown_name(path))


def _chosen(items: list, settings: _Settings) -> list:
    """Returns as many of the items as are asked for, by chance."""
    n = settings.n
    if n is None:
        return items
    if n > len(items):
        raise ValueError(f"{n=} exceeds the prompts that there are, {len(items)}.")
    places = np.random.default_rng(settings.seed).permutation(len(items))[:n]
    return [items[place] for place in places.tolist()]


def _families(
    model: kvjax.LanguageModel,
    methods: Sequence[str] | None,
    budgets: Sequence[int] | None,
    length: int,
    settings: _Settings,
) -> list[list["Candidate"]]:
    """A family a method: its candidates, by budget."""
    from kvjax.evaluation.calibrate import Candidate, cost

    decoder = model.decoder
    if not methods:
        methods = METHODS if decoder.alpha == 1 else ENTMAX_METHODS
    if budgets is None:
        budgets = [max(length // share // STEP * STEP, STEP) for share in SHARES]
    families = []
    methods = [for_model(method, decoder) for method in methods]
    for method in dict.fromkeys(methods):
        family = []
        for spec in dict.fromkeys(
            with_budget(method, budget) for budget in sorted(budgets, reverse=True)
        ):
            one = registry.parse(spec)
            count = cost(one, decoder, length, settings.new_tokens, settings.by)
            family.append(Candidate(spec, one, count))
        families.append(family)
    return families


def _run(
    model: kvjax.LanguageModel,
    families: list[list["Candidate"]],
    inputs: _Inputs,
    settings: _Settings,
) -> tuple["Calibration", int]:
    """Runs the search; returns it, and the bytes of full attention."""
    from kvjax.evaluation import calibrate as calibration
    from kvjax.evaluation import compare_runs

    full = fitting("full", model.decoder)
    full_cost = calibration.cost(
        full, model.decoder, inputs.length, settings.new_tokens, settings.by
    )
    with show_progress(sum(map(len, families))) as progress:

        def measure(candidate: "Candidate"):
            options: dict[str, Any] = {
                "batch": settings.batch,
                "chunk_size": settings.chunk_size,
                "progress": lambda done: progress(candidate.spec, done),
            }
            if settings.loss == "answer":
                return calibration.wrong_answers(
                    model, candidate.method, inputs.prompts, **options
                )
            nats = calibration.divergences(
                model,
                full,
                candidate.method,
                inputs.prompts,
                new_tokens=settings.new_tokens,
                **options,
            )
            compare_runs.drop_programs()  # of 30 layers, 100 MB each
            return np.minimum(nats, settings.clip) / settings.clip

        found = calibration.run(
            families,
            measure,
            at_most=settings.at_most / settings.scale,
            confidence=settings.confidence,
            full_cost=full_cost,
            prompts=len(inputs.prompts),
        )
    return found, full_cost


def _rows(found: "Calibration", scale: float) -> list[dict[str, Any]]:
    """A row a candidate, losses in their own unit."""
    return [
        {
            "method": row.spec,
            "bytes": row.cost,
            "loss": None if row.mean is None else row.mean * scale,
            "upper": None if row.upper is None else row.upper * scale,
            "outcome": row.outcome,
        }
        for row in found.rows
    ]


def _refusal(document: dict[str, Any]) -> str:
    """The line that says that nothing holds."""
    tested = [row for row in document["rows"] if row["loss"] is not None]
    nearest = min(tested, key=lambda row: row["upper"])
    return (
        f"no method is known to lose at most {document['at_most']:g} with "
        f"confidence={document['confidence']:g} on these {document['n']} prompts: the "
        f"nearest is {nearest['method']}, whose loss of {nearest['loss']:.3g} may be "
        f"{nearest['upper']:.3g}; give larger budgets, more prompts, or a wider bound."
    )


def show(document: dict[str, Any]) -> None:
    """Prints the table, what it says, and last of all the choice."""
    rows = [
        [
            row["method"],
            table.format_bytes(row["bytes"]),
            "-" if row["loss"] is None else f"{row['loss']:.3g}",
            "-" if row["upper"] is None else f"{row['upper']:.3g}",
            row["outcome"],
        ]
        for row in document["rows"]
    ]
    terminal.show(HEADINGS, rows)
    print()
    terminal.say(_caption(document))
    print()
    print(document["choice"])


def _caption(document: dict[str, Any]) -> str:
    """Says what the table holds, and what is guaranteed."""
    what = "share of questions answered wrong"
    if document["loss"] == "kl":
        what = (
            f"KL to full attention over the last {document['new_tokens']} tokens of a "
            f"prompt, nats a token, {document['clip']:g} at most of a prompt"
        )
    verb = "read by a step" if document["by"] == "read" else "held while decoding"
    return (
        f"{document['model']}, {document['n']} prompts of {document['text']}. Loss: "
        f"{what}; mean, and what its expectation is below but for a probability of "
        f"{document['level']:.3g}. Together, and with confidence "
        f"{document['confidence']:g}, all that hold lose at most "
        f"{document['at_most']:g} in expectation on prompts drawn as these were. Bytes "
        f"of cache of one row of {document['longest']:,} tokens, {verb}; full "
        f"attention: {table.format_bytes(document['full_bytes'])}. The cheapest that "
        "holds:"
    )
