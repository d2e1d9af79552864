"""`kvjax stream`: text without end, scored as it comes, then continued."""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from kvjax import files
from kvjax.cli.methods import answering, fitting
from kvjax.cli.options import (
    METHOD_HELP,
    DtypeOption,
    ModelOption,
    SeedOption,
    load,
    positive,
)

BLOCK = 1 << 16  # bytes read at once


def stream(
    text: Annotated[
        pathlib.Path,
        typer.Option("--text", help="UTF-8 file of any size; - is stdin."),
    ] = pathlib.Path("-"),
    model: ModelOption = None,
    method: Annotated[
        str, typer.Option("--method", help=METHOD_HELP + " Of constant memory.")
    ] = "cascade:budget=1024",
    every: Annotated[
        int,
        typer.Option(
            help="Least tokens between two lines of output, which come at the ends of "
            "pieces of up to 64 Ki characters; one always comes at the end."
        ),
    ] = 16_384,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Tokens to go on with at the end.")
    ] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Probability kept; 1 is all.")] = 1.0,
    seed: SeedOption = 0,
    chunk_size: Annotated[int, typer.Option(help="Tokens read at once.")] = 512,
    dtype: DtypeOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines instead of text.")
    ] = False,
) -> None:
    """Scores text without end in constant memory, and goes on with it.

    One line now and then: tokens read, bits per byte so far and since the last line,
    perplexity. With --new-tokens these lines go to stderr, and what the model goes on
    with to stdout.
    """
    from kvjax.decoding import endless
    from kvjax.decoding.sampling import Sampling, validate

    answering(method)  # mistakes first
    positive(every=every, chunk_size=chunk_size)
    if new_tokens < 0:
        raise ValueError(f"{new_tokens=} must be at least 0.")
    sampling = Sampling(temperature=temperature, top_p=top_p)
    validate(sampling)
    if not new_tokens and sampling != Sampling():
        raise ValueError(
            "--temperature and --top-p are of what the model goes on with: give "
            "--new-tokens too."
        )
    blocks = _blocks(text)
    first = next(blocks, b"")  # a file that is not there is known before the model
    language_model = load(model, dtype)
    parsed = fitting(method, language_model.decoder)
    endless.check_method(language_model, parsed, method)

    def all_blocks():
        yield first
        yield from blocks

    found = endless.read(
        language_model,
        parsed,
        endless.pieces(all_blocks(), name=str(text)),
        chunk_size=chunk_size,
        room=max(new_tokens, 1),
    )
    to = sys.stdout if as_json or not new_tokens else sys.stderr
    start, shown, latest = time.perf_counter(), None, None
    try:
        while True:
            with _told(as_json):
                latest = next(found)
            if shown is None or latest.tokens - shown.tokens >= every:
                _show(latest, shown, start, to, as_json)
                shown = latest
    except StopIteration as end:
        read = end.value
    if latest is not shown:
        _show(latest, shown, start, to, as_json)
    if not new_tokens:
        return
    events = endless.extend(
        language_model,
        parsed,
        read,
        max_new_tokens=new_tokens,
        sampling=sampling,
        seed=seed,
    )
    try:
        while True:
            with _told(as_json):
                _, piece = next(events)
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except StopIteration as end:
        (generation,) = end.value
    if as_json:
        print(json.dumps(generation._asdict()), flush=True)
    else:
        print()


@contextlib.contextmanager
def _told(as_json: bool) -> Iterator[None]:
    """Ends JSON lines by the error: whoever reads them learns why they end."""
    from kvjax.decoding.finite import NotFiniteError

    try:
        yield
    except NotFiniteError as error:
        if as_json:
            print(json.dumps({"error": str(error)}), flush=True)
        raise


def _blocks(path: pathlib.Path) -> Iterator[bytes]:
    """Reads what is there, as soon as there is any."""
    if str(path) == "-":
        stdin: Any = sys.stdin.buffer
        yield from iter(lambda: stdin.read1(BLOCK), b"")
        return
    files.check_file(path)
    with path.open("rb") as file:
        yield from iter(lambda: file.read1(BLOCK), b"")


def _show(latest: Any, shown: Any, start: float, to: Any, as_json: bool) -> None:
    last = latest if shown is None else latest.since(shown)
    seconds = time.perf_counter() - start
    document = {
        "tokens": latest.tokens,
        "bytes": latest.num_bytes,
        "nats": latest.nats,
        "bits_per_byte": _number(latest.bits_per_byte),
        "bits_per_byte_last": _number(last.bits_per_byte),
        "perplexity": _number(latest.perplexity),
        "seconds": round(seconds, 3),
    }
    if as_json:
        print(json.dumps(document), file=to, flush=True)
        return
    print(
        f"{latest.tokens:>14,} tokens  {latest.bits_per_byte:.4f} bits/byte  "
        f"{last.bits_per_byte:.4f} last  perplexity {latest.perplexity:.3f}  "
        f"{latest.tokens / seconds:,.0f} tokens/s",
        file=to,
        flush=True,
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN and no infinity
