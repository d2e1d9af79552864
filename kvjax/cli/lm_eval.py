"""`kvjax lm-eval`: tasks of the lm-evaluation-harness under a method."""

import contextlib
import importlib.util
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

import kvjax
from kvjax import files
from kvjax.cli.methods import answering, fitting
from kvjax.cli.options import (
    ChunkOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelOption,
    SeedOption,
    load,
    positive,
)
from kvjax.cli.progress import show_progress
from kvjax.report import terminal

HEADINGS = ("task", "metric", "value", "stderr", "n")
NOT_MEASURED = -1  # of a length that a task of RULER was not asked at
# What is kept of the harness's results.
_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


def lm_eval(
    tasks: Annotated[
        str, typer.Option(help="Names of tasks or groups, with commas between them.")
    ],
    model: ModelOption = None,
    method: MethodOption = "full",
    limit: Annotated[
        int | None, typer.Option(help="Examples of each task; all if left out.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples shown before each; the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows decoded together.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(help="Most tokens of a request; the model's context."),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Use the model's chat template."),
    ] = False,
    include_path: Annotated[
        pathlib.Path | None, typer.Option(help="Folder of more tasks, in YAML.")
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option(
            help="JSON for tasks that take it: '{\"max_seq_lengths\": [4096]}' is of "
            "RULER's; their tokenizer is the model's."
        ),
    ] = None,
    output: Annotated[
        pathlib.Path | None, typer.Option(help="File for the results, as JSON.")
    ] = None,
    seed: SeedOption = 0,
    chunk_size: ChunkOption = 512,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Runs tasks of the lm-evaluation-harness under a method.

    A context is the prompt; what follows it goes through decode steps.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "kvjax lm-eval needs the lm-evaluation-harness: pip install "
            "'kvjax[lm-eval]'."
        )
    counts = {"limit": limit, "batch_size": batch_size, "chunk_size": chunk_size}
    positive(**{name: value for name, value in counts.items() if value is not None})
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"{num_fewshot=} must be at least 0.")
    answering(method)  # mistakes first
    about = _metadata(metadata)
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"--include-path {include_path} is no folder.")
    _check_free(output)
    with tempfile.TemporaryDirectory() as folder:
        names, manager = _manager(tasks, include_path, about, folder)
        language_model = load(model, dtype)
        _save_tokenizer(language_model, folder)
        with show_progress() as progress:
            from kvjax.lm_eval import KvjaxLM

            harness_model = KvjaxLM(
                language_model,
                fitting(method, language_model.decoder),
                batch_size=batch_size,
                max_length=max_length,
                chunk_size=chunk_size,
                seed=seed,
                progress=lambda done: progress(method, done),
            )
            if apply_chat_template:
                harness_model.chat_template(True)  # a mistake before the work
            results = _evaluate(
                harness_model,
                names,
                manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
            )
    document = _document(results, harness_model, method, limit)
    if harness_model.num_cut:
        print(
            f"kvjax: note: {harness_model.num_cut} contexts were too long and lost "
            "their oldest tokens",
            file=sys.stderr,
        )
    text = json.dumps(files.json_ready(document), indent=2, default=str)
    if output is not None:
        files.write_text(output, text + "\n")
    if as_json:
        print(text)
    else:
        _print(document)


def _metadata(text: str | None) -> dict[str, Any]:
    """The object of `--metadata`."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"--metadata {text} is no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"--metadata {text} must be an object, as "
            "'{\"max_seq_lengths\": [4096]}'."
        )
    return found


def _check_free(output: pathlib.Path | None) -> None:
    """Tries the folder of `--output`, and refuses a file that is there."""
    if output is None:
        return
    files.check_writable(output.parent, "--output")
    if output.exists():
        raise FileExistsError(
            f"{output} is there already: remove it, or give --output another file."
        )


def _manager(
    tasks: str, include_path: pathlib.Path | None, about: Mapping[str, Any], folder: str
) -> tuple[list[str], Any]:
    """The names of tasks, and what finds them; a name that it lacks is a mistake."""
    with contextlib.redirect_stdout(sys.stderr):
        from lm_eval.tasks import TaskManager

        manager = TaskManager(
            include_path=None if include_path is None else str(include_path),
            metadata={"tokenizer": folder} | dict(about),
        )
        asked = [name.strip() for name in tasks.split(",") if name.strip()]
        names = manager.match_tasks(asked)
        missing = [name for name in asked if not manager.match_tasks([name])]
    if missing or not asked:
        raise ValueError(
            f"unknown tasks {', '.join(missing) or repr(tasks)}: the harness has "
            f"{len(manager.all_tasks):,}, listed by lm-eval ls tasks; --include-path "
            "adds a folder of yours."
        )
    return names, manager


def _save_tokenizer(model: kvjax.LanguageModel, folder: str) -> None:
    """Writes the model's tokenizer where tasks that count tokens look for it."""
    import models

    models.save_tokenizer(model, folder)


def _evaluate(model, names: Sequence[str], manager, **options: Any) -> dict[str, Any]:
    """Runs the harness; what it prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        from lm_eval import simple_evaluate

        found = simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            log_samples=False,
            **options,
        )
    if found is None:
        raise ValueError("the harness gave no results: this is not its first process.")
    return found


def _document(results, model, method: str, limit: int | None) -> dict[str, Any]:
    """The document: how it was measured, and the harness's results."""
    import importlib.metadata

    return {
        "model": model.model.name,
        "method": method,
        "kvjax": kvjax.__version__,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": limit,
        "batch_size": model.batch_size,
        "max_length": model.max_length,
        "chat_template": results.get("chat_template"),
        "contexts_cut": model.num_cut,
        **{key: results[key] for key in _KEPT if key in results},
    }


def rows(document: Mapping[str, Any]) -> list[list[str]]:
    """The cells under `HEADINGS`: a row a metric of a task, or of a group."""
    table = []
    for task, metrics in document["results"].items():
        counts = document.get("n-samples", {}).get(task, {})
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or value == NOT_MEASURED:
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            metric = name if kind == "none" else f"{name} ({kind})"
            table.append(
                [
                    task,
                    metric,
                    _number(value),
                    _number(error) if isinstance(error, float) else "-",
                    str(counts.get("effective", "-")),
                ]
            )
    return table


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _print(document: Mapping[str, Any]) -> None:
    terminal.show(HEADINGS, rows(document))
    print()
    shown = (
        "all examples" if document["limit"] is None else f"--limit {document['limit']}"
    )
    terminal.say(
        f"{document['model']} under {document['method']}, {shown}; lm-eval "
        f"{document['lm_eval']}. A context is the prompt; what follows it goes through "
        "decode steps."
    )
