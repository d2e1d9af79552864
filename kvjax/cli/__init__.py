"""The command line: the one place where methods and models meet. stdout is the result.

Progress goes to stderr. What a user can put right is one line on stderr and exit code
2; anything else is a fault of ours and keeps its traceback.
"""

import contextlib
import os
import pathlib
import sys
import traceback
from typing import Annotated, Any

import typer

import kvjax
from kvjax import interrupts, registry
from kvjax.cli import (
    bench,
    calibrate,
    compare,
    convert,
    decode,
    distill,
    evaluate,
    export_tasks,
    fetch,
    heads,
    info,
    lm_eval,
    plan,
    prefix,
    reproduce,
    stream,
    train,
)
from kvjax.cli.options import arguments_given, checks_text, shown, with_model_options

app = typer.Typer(
    name="kvjax",
    help="Decoding with long contexts in JAX, without drowning in KV-cache traffic.",
    epilog="Example: kvjax compare --budget 128",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; faults of ours are raised."""
    arguments_given.set(list(map(shown, arguments)))
    with contextlib.suppress(OSError):  # the folder is gone
        registry.folders[:] = [os.getcwd()]
    try:
        code = app(
            args=arguments or ["--help"], prog_name="kvjax", standalone_mode=False
        )
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted.", interrupts.CODE)
    except (BrokenPipeError, SystemExit):  # typer exits over a pipe that closed
        # Whoever read the output has enough.
        _close_stdout()
        return 0
    except OSError as error:
        if not _flushed():
            _close_stdout()
        return _complain(error)
    except (ValueError, ImportError) as error:
        if not (_is_ours(error) or isinstance(error, UnicodeDecodeError)):
            raise
        return _complain(error)
    except Exception as error:
        # Usage errors of typer, whose class moved between its versions.
        if getattr(error, "exit_code", None) != 2:
            raise
        usage: Any = error
        return _complain(usage.format_message())
    if code == interrupts.CODE:  # newer versions of typer end so, without a word
        return _complain("interrupted.", interrupts.CODE)
    return code if isinstance(code, int) else 0


def _is_ours(error: Exception) -> bool:
    # A check of ours raises from our own files; one from inside a library is a bug that
    # somebody must be able to find.
    rooms = pathlib.Path(kvjax.__file__).parent.parent
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    path = pathlib.Path(frame.f_code.co_filename)
    ours = ("kvjax", "models", "pallas_kernels")
    return any(path.is_relative_to(rooms / room) for room in ours)


def _complain(message: object, code: int = 2) -> int:
    line = " ".join(str(message).split())
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"kvjax: error: {line}", file=sys.stderr)
    return code


def _close_stdout() -> None:
    """Keeps Python from writing into it on its way out, where that is an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flushed() -> bool:
    """Says if what was printed could be written: a disk may be full."""
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"kvjax {kvjax.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    del version  # its callback has done all there is


_EXAMPLES = {
    info.methods: "kvjax methods",
    info.cite: "kvjax cite quest h2o",
    decode.generate: ("kvjax generate --method quest:budget=256 --prompt 'def main('"),
    prefix.prefill: "kvjax prefill --prompt-file book.txt --save book-read",
    decode.score: "kvjax score --method snapkv:budget=256 --text book.txt",
    stream.stream: "kvjax stream --text book.txt --method cascade:budget=1024",
    evaluate.evaluate: "kvjax eval --task passkey --method quest:budget=128 --n 20",
    export_tasks.export_tasks: (
        "kvjax export-tasks --task ruler --context 2048 --out ruler.jsonl"
    ),
    compare.compare: "kvjax compare --budget 64 --method quest --method h2o",
    calibrate.calibrate: "kvjax calibrate --text prompts.jsonl --method snapkv",
    lm_eval.lm_eval: "kvjax lm-eval --tasks arc_easy --method snapkv --limit 20",
    heads.heads: "kvjax heads --context 512 --out heads.png",
    convert.convert: "kvjax convert model.gguf model",
    fetch.fetch: "kvjax fetch smollm2",
    plan.plan: "kvjax plan --model embedded-softmax --context 8192 --budget 512",
    reproduce.reproduce: "kvjax reproduce --quick --claim completion-error",
    bench.bench: "kvjax bench kernels --context 131072 --budget 2048",
    train.train: "kvjax train --config toy --set optimizer.lr=2e-3 --out runs/toy",
    distill.distill: "kvjax distill --model embedded-softmax --out runs/map",
}
for _command, _example in _EXAMPLES.items():
    _, _name, *_ = _example.split()
    _whole = checks_text(with_model_options(_command))
    app.command(_name, epilog=f"Example: {_example}")(_whole)
