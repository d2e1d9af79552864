"""`kvjax generate` and `kvjax score`: one model, one method, one text."""

import json
import pathlib
import sys
import time
from typing import Annotated

import typer

from kvjax import registry, report
from kvjax.cli.common import (
    METHOD_HELP,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelOption,
    SeedOption,
    load,
    read_prompt,
    read_text,
    tokenize,
)
from kvjax.cli.prefix import resumed


def generate(
    model: ModelOption = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help=METHOD_HELP + " full, or what is resumed."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[
        pathlib.Path | None, typer.Option(help="UTF-8 file with the text; - is stdin.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens to generate; 128, or what --resume has room for."
        ),
    ] = None,
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
    resume: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder of kvjax prefill; a prompt is then what follows it."),
    ] = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continues a prompt under a method, streaming the text to stdout."""
    from kvjax.generate import stream
    from kvjax.sampling import Sampling, validate

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    validate(sampling)
    options = {
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "stop": tuple(stop or ()),
        "seed": seed,
    }
    if resume is not None:
        if chat:
            raise ValueError(
                "--chat begins a conversation and --resume goes on with one: give "
                "--chat to kvjax prefill."
            )
        has_more = prompt is not None or prompt_file is not None
        more = read_prompt(prompt, prompt_file) if has_more else None
        language_model, method, prompt_tokens, events = resumed(
            resume, model, method, dtype, more, chunk_size, options
        )
    else:
        method = method or "full"
        if max_new_tokens is None:
            options["max_new_tokens"] = 128
        parsed = registry.parse(method)
        text = read_prompt(prompt, prompt_file)
        language_model = load(model, dtype)
        tokens = tokenize(language_model, text, chat)
        prompt_tokens = len(tokens)
        events = stream(
            language_model, parsed, [tokens], chunk_size=chunk_size, **options
        )
    start = time.perf_counter()
    generation = _written(events, quietly=as_json)
    if not as_json:
        print()
        return
    document = {
        "model": language_model.name,
        "method": method,
        "prompt_tokens": prompt_tokens,
        **generation._asdict(),
        "sampling": sampling._asdict(),
        "seed": seed,
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(document, indent=2))


def _written(events, *, quietly: bool):
    """Writes a row's text to stdout as it comes; returns what the generator returns."""
    while True:
        try:
            _, piece = next(events)
        except StopIteration as end:
            (generation,) = end.value
            return generation
        if not quietly:
            sys.stdout.write(piece)
            sys.stdout.flush()


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
    content = read_text(text)
    language_model = load(model, dtype)
    tokens = tokenize(language_model, content)
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
