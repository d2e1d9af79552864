"""`kvjax eval`: one task under one method, with its interval."""

import json
import pathlib
from typing import Annotated

import typer

from kvjax import files
from kvjax.cli.methods import answering, fitting
from kvjax.cli.options import (
    AnswersOption,
    AskChatOption,
    BatchOption,
    ChunkOption,
    ContextOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelOption,
    NewTokensOption,
    QuestionOption,
    RulerTextOption,
    SeedOption,
    TasksOption,
    TextOption,
    given_text,
    load,
    positive,
    questions_of,
    ruler_texts,
    shown_name,
)
from kvjax.cli.progress import show_progress
from kvjax.report import table


def evaluate(
    task: Annotated[
        str | None,
        typer.Option(
            help="passkey, multikey, variables, chain, extraction, countdown, "
            "path_traversal, perplexity or fidelity; ruler, or one of its 13, such as "
            "niah_single_1; or a .jsonl or .parquet file, or a folder of them, in "
            "kvpress's columns. Or give --tasks."
        ),
    ] = None,
    tasks: TasksOption = None,
    method: MethodOption = "full",
    model: ModelOption = None,
    context: ContextOption = 512,
    n: Annotated[
        int | None,
        typer.Option(
            help="Examples (of each of RULER's tasks), or windows of text; 20 if left "
            "out, of --tasks and files all."
        ),
    ] = None,
    seed: SeedOption = 0,
    new_tokens: NewTokensOption = 64,
    batch: BatchOption = 8,
    text: TextOption = None,
    ruler_text: RulerTextOption = "shipped",
    question: QuestionOption = "seen",
    chat: AskChatOption = False,
    save_answers: AnswersOption = None,
    chunk_size: ChunkOption = 1024,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """One task under one method, with its interval."""
    from kvjax.evaluation import answers, one_task
    from kvjax.evaluation.tasks import chat as as_chat

    if (task is None) == (tasks is None):
        raise ValueError("give either --task or --tasks, and only one of them.")
    if n is not None:
        positive(n=n)
    questions = questions_of(tasks)
    if tasks is not None:
        if text is not None:
            raise ValueError("--tasks has texts of its own: leave --text out.")
        if n is not None and n > len(questions):
            raise ValueError(
                f"{n=} exceeds the questions of {shown_name(tasks)}, "
                f"{len(questions)}: lower it or leave it out."
            )
        questions = questions[:n]
    task = one_task.OWN if task is None else task
    rows = _rows(task, n) if not questions else []
    n = len(questions) or len(rows) or n or 20
    if not questions and not rows:
        one_task.check_task(task)
    source = _source(task, rows, text, ruler_text)
    one_task.check_question(task, question, questions)
    if task in ("perplexity", "fidelity") and (chat or save_answers):
        option = "--chat" if chat else "--save-answers"
        raise ValueError(f"--task {task} answers nothing: leave {option} out.")
    positive(context=context, batch=batch, new_tokens=new_tokens)
    answering(method)  # mistakes first
    answers.check_free(save_answers)
    content, text_name = given_text(text, model)
    language_model = load(model, dtype)
    parsed, full = (fitting(m, language_model.decoder) for m in (method, "full"))
    if chat:  # no work before a refusal
        as_chat.turn(language_model.tokenizer, "Any question?")
    keep = answers.keeper(save_answers, language_model.name)
    with show_progress() as progress:
        result = one_task.run(
            task,
            language_model,
            parsed,
            full,
            content,
            context=context,
            n=n,
            seed=seed,
            new_tokens=new_tokens,
            batch=batch,
            chunk_size=chunk_size,
            questions=questions,
            rows=rows,
            source=source,
            is_chat=chat,
            question=question,
            on_answer=lambda index, example, said: keep(
                method, getattr(example, "task", task), index, example, said
            ),
            progress=lambda fraction: progress(method, fraction),
        )
    arguments = {
        "context": context,
        "n": n,
        "seed": seed,
        "model": language_model.name,
    }
    if rows:
        arguments["rows"] = len(rows)
    elif source is not None:
        arguments["ruler_text"] = ruler_text
    else:
        arguments["text"] = text_name if tasks is None else shown_name(tasks)
    document = {"task": task, "method": method, **arguments, **result}
    if as_json:
        print(json.dumps(files.json_ready(document), indent=2))
    else:
        table.print_task(document)


def _rows(task: str, n: int | None) -> list:
    """The rows of a task that is a file or a folder; none of any other task."""
    from kvjax.evaluation import one_task
    from kvjax.evaluation.tasks import interchange

    if task in one_task.TASKS or not interchange.is_path(task):
        return []
    return interchange.read(task, n=n)


def _source(task: str, rows: list, text: pathlib.Path | None, ruler_text: str):
    """The texts of RULER's tasks; None of other tasks."""
    from kvjax.evaluation import one_task

    is_ruler = task in one_task.MATCHED and not rows
    if (is_ruler or rows) and text is not None:
        raise ValueError(f"--task {task} has texts of its own: leave --text out.")
    if is_ruler:
        return ruler_texts(ruler_text)
    if ruler_text != "shipped":
        raise ValueError("--ruler-text is of RULER's tasks: leave it out.")
    return None
