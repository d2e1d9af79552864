"""A model's answers, kept in a file: a JSON object a line, written as answers come.

A line says the model, the method, the task, the example's number in it, the prompt by
its digest and its last words, what was expected, what was generated, and the score.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Collection
from typing import Any

from kvjax import files
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.files import check_writable

SHOWN = 120  # characters of a prompt's end

# (method, task, the example's number in it, the example, what was generated)
Answered = Callable[[str, str, int, Prompted, str], None]


def ignore(*answer: Any) -> None:
    """Keeps no answer."""
    del answer


def check_free(
    path: pathlib.Path | None, *, overwrite: bool = False, go_on: bool = False
) -> None:
    """Tries the folder, and refuses a file that is there, before the work.

    Raises:
        FileExistsError: if there is a file, to be neither replaced nor gone on with.
        PermissionError, NotADirectoryError: if nothing can be written there.
    """
    if path is None:
        return
    check_writable(path.parent, "--save-answers")
    if path.is_dir() or (path.exists() and not (overwrite or go_on)):
        raise FileExistsError(
            f"{path} is there already: remove it, or give --save-answers another file."
        )


def begin(path: pathlib.Path, known: Collection[tuple[str, str]] = ()) -> None:
    """Begins a file, with those lines of an earlier one whose method is done.

    What an interruption left of other methods goes: they are run again.

    Args:
        path: of the file.
        known: model and method of the answers that stay.
    """
    kept = []
    if known:
        for line in files.read_text(path).splitlines() if path.exists() else ():
            try:
                found = json.loads(line)
                is_known = (found["model"], found["method"]) in known
            except (ValueError, KeyError, TypeError):
                is_known = False  # cut short
            if is_known:
                kept.append(line + "\n")
    files.write_text(path, "".join(kept))


def keeper(path: pathlib.Path | None, model: str) -> Answered:
    """A function that adds an answer to the file at once; without one, to nothing."""
    if path is None:
        return ignore

    def keep(method, task, index, example, generated):
        found = record(model, method, task, index, example, generated)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")

    return keep


def record(
    model: str, method: str, task: str, index: int, example: Prompted, generated: str
) -> dict[str, Any]:
    """A line of the file."""
    accepted = getattr(example, "answers", (example.answer,))
    return {
        "model": model,
        "method": method,
        "task": task,
        "example": index,
        "prompt_tokens": len(example.prompt),
        "prompt_sha256": hashlib.sha256(example.text.encode()).hexdigest(),
        "prompt_end": example.text[-SHOWN:],
        "expected": accepted[0] if len(accepted) == 1 else list(accepted),
        "generated": generated,
        "score": example.score(generated),
    }
