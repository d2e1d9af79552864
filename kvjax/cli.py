"""The command line: the one place where methods and models meet. stdout is the result.

Progress goes to stderr. What a user can put right is one line on stderr and exit code
2; anything else is a fault of ours and keeps its traceback.
"""

import contextlib
import contextvars
import dataclasses
import json
import os
import pathlib
import sys
import time
import traceback
from typing import Annotated

import typer

import kvjax
from kvjax import registry, report
from kvjax.describe import describe

app = typer.Typer(
    name="kvjax",
    help="Decoding with long contexts in JAX, without drowning in KV-cache traffic.",
    epilog="Example: kvjax compare --budget 128",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Of the command that runs, for the manifest.
_arguments: contextvars.ContextVar[list[str]] = contextvars.ContextVar("arguments")

_MODEL_HELP = "Folder or hub id of a Llama; the embedded model if left out."
_METHOD_HELP = "Method and options, for example quest:budget=1024,page_size=16."
ModelOption = Annotated[str | None, typer.Option("--model", help=_MODEL_HELP)]
MethodOption = Annotated[str, typer.Option("--method", help=_METHOD_HELP)]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="Of weights and cache; on CPU float32 if left out."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text.")
]
ContextOption = Annotated[int, typer.Option("--context", help="Tokens of an input.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of every random choice.")]
BatchOption = Annotated[int, typer.Option("--batch", help="Rows decoded together.")]
TextOption = Annotated[
    pathlib.Path | None,
    typer.Option("--text", help="UTF-8 file the inputs are made of; held-out text."),
]
NewTokensOption = Annotated[
    int, typer.Option("--new-tokens", help="Tokens of an input that follow the prompt.")
]


def main() -> None:
    """Runs the command line: exit code 0, 1 (interrupted) or 2 (a user's mistake)."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; faults of ours are raised."""
    _arguments.set(arguments)
    try:
        code = app(
            args=arguments or ["--help"], prog_name="kvjax", standalone_mode=False
        )
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted.", 1)
    except BrokenPipeError:
        # Whoever read the output has enough. Keep Python from flushing into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _complain(error)
    except (ValueError, ImportError) as error:
        if not (_is_ours(error) or isinstance(error, UnicodeDecodeError)):
            raise
        return _complain(error)
    except Exception as error:
        # Usage errors of typer, whose class moved between its versions.
        if getattr(error, "exit_code", None) != 2:
            raise
        return _complain(error.format_message())
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
    print(f"kvjax: error: {line}", file=sys.stderr)
    return code


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


@app.command(epilog="Example: kvjax methods")
def methods(as_json: JsonOption = False) -> None:
    """Every method and transform: what it does, its options, what a step reads."""
    names = (*registry.names(), *registry.transforms())
    known = [describe(registry.get(name)) for name in names]
    if as_json:
        print(json.dumps([entry._asdict() for entry in known], indent=2))
        return
    for entry in known:
        options = [f"{name}={value}" for name, value in entry.options.items()]
        print(f"{entry.name:<15}{entry.summary}")
        print(f"{'':<15}options: {', '.join(options) or 'none'}")
        print(f"{'':<15}reads per step and layer: {entry.reads}")


@app.command(epilog="Example: kvjax cite quest")
def cite(
    name: Annotated[str, typer.Argument(help="A method or transform.")],
    as_json: JsonOption = False,
) -> None:
    """The paper a method comes from, and where the method deviates from it."""
    entry = describe(registry.get(name))
    if as_json:
        keys = ("name", "source", "deviations")
        print(json.dumps({key: getattr(entry, key) for key in keys}, indent=2))
        return
    print(entry.source)
    print(f"Deviations: {entry.deviations}")


@app.command(
    epilog="Example: kvjax generate --method quest:budget=256 --prompt 'def main('"
)
def generate(
    model: ModelOption = None,
    method: MethodOption = "full",
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[
        pathlib.Path | None, typer.Option(help="UTF-8 file with the text; - is stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens kept; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Probability kept; 1 is all.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    seed: SeedOption = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template.")] = False,
    chunk_size: Annotated[int, typer.Option(help="Prompt tokens at once.")] = 512,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continues a prompt under a method, streaming the text to stdout."""
    from kvjax.generate import generate as run_generate
    from kvjax.sampling import Sampling, validate

    parsed = registry.parse(method)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    validate(sampling)
    text = _prompt(prompt, prompt_file)
    language_model = _load(model, dtype)
    tokens = _tokenize(language_model, text, chat)

    def show(row: int, piece: str) -> None:
        del row
        sys.stdout.write(piece)
        sys.stdout.flush()

    start = time.perf_counter()
    (generation,) = run_generate(
        language_model,
        parsed,
        [tokens],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=tuple(stop or ()),
        seed=seed,
        chunk_size=chunk_size,
        on_text=None if as_json else show,
    )
    if not as_json:
        print()
        return
    document = {
        "model": language_model.name,
        "method": method,
        "prompt_tokens": len(tokens),
        **generation._asdict(),
        "sampling": sampling._asdict(),
        "seed": seed,
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(document, indent=2))


@app.command(epilog="Example: kvjax score --method snapkv:budget=256 --text book.txt")
def score(
    text: Annotated[
        pathlib.Path, typer.Option("--text", help="UTF-8 file; - is stdin.")
    ],
    model: ModelOption = None,
    method: MethodOption = "full",
    prefill: Annotated[
        int | None,
        typer.Option(help="Tokens read as the prompt; all but the last 256, or half."),
    ] = None,
    chunk_size: Annotated[int, typer.Option(help="Prompt tokens at once.")] = 512,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a text: the prompt, then what the decode path predicts."""
    import numpy as np

    from kvjax.scoring import score as run_score

    parsed = registry.parse(method)
    content = _read(text)
    language_model = _load(model, dtype)
    tokens = _tokenize(language_model, content)
    if len(tokens) < 3:
        raise ValueError(
            f"{text} has {len(tokens)} tokens, but a prompt, a token to feed and a "
            "token to predict take 3: give a longer text."
        )
    if prefill is None:
        prefill = len(tokens) - min(256, len(tokens) // 2)
    if not 1 <= prefill <= len(tokens) - 2:
        raise ValueError(
            f"{prefill=} must be in [1, {len(tokens) - 2}]: the text has {len(tokens)} "
            "tokens, and at least one must be fed and one predicted after the prompt."
        )
    scores = run_score(
        language_model, parsed, [tokens], prefill=prefill, chunk_size=chunk_size
    )
    log_probs = scores.log_probs[0]
    decoded = log_probs[prefill:]
    summary = {
        "model": language_model.name,
        "method": method,
        "tokens": len(tokens),
        "prefill": prefill,
        "perplexity": float(np.exp(-decoded.mean())),
        "predicted_by_decode_steps": len(decoded),
        "perplexity_of_prompt": float(np.exp(-log_probs[:prefill].mean())),
    }
    if as_json:
        listed = {"token_ids": tokens, "log_probs": log_probs.tolist()}
        print(json.dumps(report.json_ready(summary | listed), indent=2))
        return
    print(
        f"perplexity {summary['perplexity']:.4f} over {len(decoded)} tokens decoded "
        f"under {method} (prompt of {prefill}: {summary['perplexity_of_prompt']:.4f})"
    )


@app.command(
    "eval",
    epilog="Example: kvjax eval --task passkey --method quest:budget=128 --n 20",
)
def evaluate(
    task: Annotated[
        str, typer.Option(help="passkey, multikey, perplexity or fidelity.")
    ],
    method: MethodOption = "full",
    model: ModelOption = None,
    context: ContextOption = 512,
    n: Annotated[int, typer.Option(help="Examples, or windows of text.")] = 20,
    seed: SeedOption = 0,
    new_tokens: NewTokensOption = 64,
    batch: BatchOption = 8,
    text: TextOption = None,
    chunk_size: Annotated[int, typer.Option(help="Prompt tokens at once.")] = 1024,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """One task under one method, with its interval."""
    from kvjax.evaluation import single

    single.check_task(task)
    _positive(n=n, context=context, batch=batch)
    parsed, full = registry.parse(method), registry.parse("full")
    content = _heldout() if text is None else _read(text)
    language_model = _load(model, dtype)
    with report.progress() as progress:
        result = single.run(
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
            progress=lambda fraction: progress(method, fraction),
        )
    arguments = {"context": context, "n": n, "seed": seed, "model": language_model.name}
    document = {"task": task, "method": method, **arguments, **result}
    if as_json:
        print(json.dumps(report.json_ready(document), indent=2))
    else:
        report.print_task(document)


@app.command(epilog="Example: kvjax compare --budget 64 --method quest --method h2o")
def compare(
    model: ModelOption = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=_METHOD_HELP + " May be repeated; every method if left out."),
    ] = None,
    context: ContextOption = 512,
    budget: Annotated[
        int, typer.Option(help="Tokens per KV head, where a method does not say.")
    ] = 128,
    n: Annotated[int, typer.Option(help="Examples of each retrieval task.")] = 15,
    windows: Annotated[int, typer.Option(help="Windows of held-out text.")] = 8,
    new_tokens: NewTokensOption = 64,
    batch: BatchOption = 8,
    seed: SeedOption = 0,
    text: TextOption = None,
    out: Annotated[
        pathlib.Path, typer.Option(help="Folder for report.html and results.json.")
    ] = pathlib.Path("kvjax-report"),
    chunk_size: Annotated[int, typer.Option(help="Prompt tokens at once.")] = 1024,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decodes the same inputs under each method: what is read, what is lost."""
    from kvjax.evaluation import compare as comparison

    settings = comparison.Settings(
        context=context,
        new_tokens=new_tokens,
        examples=n,
        windows=windows,
        batch=batch,
        seed=seed,
        chunk_size=chunk_size,
    )
    parsed = _methods(method, context, budget)
    report.check_writable(out)
    content = _heldout() if text is None else _read(text)
    language_model = _load(model, dtype)
    inputs = comparison.make_inputs(language_model, content, settings)
    with report.progress() as progress:
        rows = comparison.compare(
            language_model, parsed, inputs, settings, progress=progress
        )
    arguments = dataclasses.asdict(settings) | {"budget": budget, "dtype": dtype}
    about = report.manifest(
        version=kvjax.__version__,
        model=language_model.name,
        arguments=_arguments.get(),
        settings=arguments,
    )
    results = report.results(rows, about)
    page, data = report.write(out, results)
    if as_json:
        print(data.read_text(encoding="utf-8"), end="")
    else:
        report.print_table(results)
    print(f"wrote {page} and {data}", file=sys.stderr)


def _methods(
    given: list[str] | None, context: int, budget: int
) -> dict[str, kvjax.Method]:
    """Methods by their full spec strings, `full` first."""
    _positive(context=context, budget=budget)
    if budget >= context:
        raise ValueError(
            f"{budget=} must be below {context=}: otherwise nothing is left out and "
            "every method is exact."
        )
    parsed = {"full": registry.parse("full")}
    for spec in given or registry.names():
        outer, plus, innermost = spec.rpartition("+")
        name, _, options = innermost.partition(":")
        takes_budget = "budget" in registry.options(name.strip())
        if takes_budget and "budget=" not in options:
            all_options = filter(None, [f"budget={budget}", options])
            innermost = f"{name}:{','.join(all_options)}"
        spec = outer + plus + innermost
        try:
            parsed[spec] = registry.parse(spec)
        except ValueError as error:
            raise ValueError(f"{spec}: {error}") from error
    return parsed


def _load(model: str | None, dtype: str | None) -> kvjax.LanguageModel:
    """The model, with compiled code kept between runs."""
    import jax

    import models
    from models import embedded

    _keep_compiled_code()
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{dtype=} must be float32, bfloat16 or float16.")
    if dtype is None and jax.default_backend() == "cpu":
        # XLA's CPU backend converts whole bfloat16 buffers at every step.
        dtype = "float32"
    path = embedded.path("softmax") if model is None else model
    loaded = models.load(path, dtype=dtype)
    if model is None:
        loaded = loaded._replace(name="embedded softmax")
    return loaded


def _keep_compiled_code() -> None:
    """Turns JAX's persistent compilation cache on; without a folder it stays off."""
    import jax

    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home) / "kvjax" / "xla"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _heldout() -> str:
    from models import embedded

    return embedded.heldout_text()


def _prompt(prompt: str | None, prompt_file: pathlib.Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give either --prompt or --prompt-file, and only one of them.")
    text = prompt if prompt_file is None else _read(prompt_file)
    if not text:
        raise ValueError(
            "the prompt is empty: give --prompt some text, or --prompt-file a file "
            "with some."
        )
    return text


def _read(path: pathlib.Path) -> str:
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset "
            f"{error.start}; convert it to UTF-8 first."
        ) from error


def _tokenize(model: kvjax.LanguageModel, text: str, chat: bool = False) -> list[int]:
    if not chat:
        return model.tokenizer.encode(text)
    return model.tokenizer.apply_chat_template([{"role": "user", "content": text}])


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
