"""`kvjax generate` and `kvjax score`: one model, one method, one text."""

import json
import pathlib
import sys
import time
from typing import Annotated, Any

import typer

from kvjax import copies, files
from kvjax.cli import conversation, drafts, mesh
from kvjax.cli.methods import answering, fitting
from kvjax.cli.options import (
    METHOD_HELP,
    ChunkOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelOption,
    SeedOption,
    SystemOption,
    first_messages,
    load,
    positive,
    read_prompt,
    read_text,
    tokenize,
)
from kvjax.cli.prefix import Turn, resumed
from kvjax.text import encoding

NEW_TOKENS = 128
ONLY_SAMPLED = ("top_k", "top_p", "min_p")  # options that greedy decoding has no use of


@drafts.with_draft_options
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
    instruction: Annotated[
        str | None,
        typer.Option(
            help="Text behind the prompt that says what is wanted of it, for methods "
            "that select by it, as citrus does."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens to generate; 128, or what --resume has room for."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy, the default.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Likeliest tokens kept; 0 is all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Probability kept; 1 is all.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Least share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.")] = None,
    seed: SeedOption = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Use the model's chat template, and the sampling of its "
            "generation_config.json where no option says otherwise.",
        ),
    ] = False,
    system: SystemOption = None,
    chunk_size: ChunkOption = 512,
    resume: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Folder of kvjax prefill, or of --save; a prompt is then what follows "
            "it, with --chat the next turn."
        ),
    ] = None,
    save: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="With --chat: folder for the conversation, the reply in it; that of "
            "--resume is replaced."
        ),
    ] = None,
    room: Annotated[
        int | None,
        typer.Option(
            help="With --save: tokens that may follow the first turn, 2048 if left "
            "out; with --resume it is read anew, with room for so many."
        ),
    ] = None,
    timings: Annotated[
        bool,
        typer.Option(
            "--timings", help="A line on stderr, as in a terminal, of where time went."
        ),
    ] = False,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continues a prompt under a method, streaming the text to stdout."""
    from kvjax.decoding import timing

    asked = _asked(
        chat=chat,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    counts = {"max_new_tokens": max_new_tokens, "chunk_size": chunk_size, "room": room}
    positive(**{name: value for name, value in counts.items() if value is not None})
    _check_conversation(chat, resume, save, room, system)
    _check_instruction(instruction, resume, save)
    drafts.check("--resume" if resume else "--save" if save else None)
    has_text = prompt is not None or prompt_file is not None
    text = read_prompt(prompt, prompt_file) if has_text or resume is None else None
    start = time.perf_counter()

    def options(language_model):
        nonlocal start
        start = time.perf_counter()  # the model is there, and nothing read yet
        return {
            "max_new_tokens": max_new_tokens,
            "sampling": _sampling(language_model, asked, chat),
            "stop": tuple(stop or ()),
            "seed": seed,
        }

    wanted = {
        "model": model,
        "method": method,
        "dtype": dtype,
        "text": text,
        "chunk_size": chunk_size,
        "options": options,
    }
    with timing.timed() as clock:
        turn = _turn(resume, save, chat, system, room, instruction, wanted)
        generation = _written(turn.events, quietly=as_json)
        seconds = time.perf_counter() - start
    if not as_json:
        print(flush=True)
    if timings or (not as_json and sys.stderr.isatty()):
        told = timing.line(clock, start) + drafts.line(generation)
        print(f"kvjax: {told}", file=sys.stderr)
    if turn.keep is not None:
        turn.keep(generation)
    if as_json:
        _print_document(turn, generation, seed, seconds, timing.document(clock, start))


def _turn(resume, save, chat, system, room, instruction, wanted) -> Turn:
    """A turn by what it goes on from and what is kept of it."""
    if resume is not None and chat:
        return conversation.gone_on(resume, save, room=room, **wanted)
    if resume is not None:
        return resumed(resume, **wanted)
    if save is not None:
        return conversation.begun(save, system=system, room=room, **wanted)
    return _alone(chat, system, instruction, **wanted)


def _asked(*, chat: bool, **options: Any) -> dict[str, Any]:
    """The options of sampling that were asked for, checked.

    A chat's temperature may be that of the checkpoint.
    """
    from kvjax.decoding.sampling import Sampling, validate

    asked = {name: value for name, value in options.items() if value is not None}
    validate(Sampling(**asked))
    greedy = asked.get("temperature", 0 if not chat else None) == 0
    if greedy and (idle := [name for name in ONLY_SAMPLED if name in asked]):
        option = "--" + idle[0].replace("_", "-")
        raise ValueError(
            f"{option} {asked[idle[0]]:g} changes nothing where decoding is greedy: "
            "give --temperature above 0 too."
        )
    return asked


def _print_document(turn: Turn, generation, seed, seconds, timings) -> None:
    document = {
        "model": turn.model.name,
        "method": turn.method,
        "prompt_tokens": turn.prompt_tokens,
        **generation._asdict(),
        "sampling": turn.options["sampling"]._asdict(),
        "seed": seed,
        "seconds": seconds,
        "timings": timings,
    }
    del document["drafts"]
    print(json.dumps(document | drafts.document(generation), indent=2))


def _alone(
    chat, system, instruction, *, model, method, dtype, text, chunk_size, options
) -> Turn:
    """A prompt of which nothing is kept."""
    from kvjax.decoding.generate import stream

    method = "full" if method is None else method
    answering(method)  # mistakes first
    drafts.check_method()
    whole = text + (instruction or "")
    messages = first_messages(whole, chat, system)
    loaded = load(model, dtype)
    parsed = fitting(method, loaded.decoder)
    tokens, told = tokenize(loaded, whole, messages), None
    if instruction is not None:
        context = tokenize(loaded, text, first_messages(text, chat, system))
        told = len(tokens) - encoding.shared(context, tokens)
    chosen = options(loaded)
    chosen["max_new_tokens"] = chosen["max_new_tokens"] or NEW_TOKENS
    events = stream(
        loaded,
        parsed,
        [tokens],
        chunk_size=chunk_size,
        instruction=told,
        **chosen,
        **drafts.wanted(dtype),
    )
    return Turn(loaded, method, len(tokens), events, chosen)


def _check_instruction(instruction, resume, save) -> None:
    """Raises ValueError for an instruction that nobody would be told of in time."""
    if instruction is None:
        return
    if not instruction:
        raise ValueError("--instruction is empty: give some text, or leave it out.")
    if resume is not None or save is not None:
        option = "--resume" if resume is not None else "--save"
        raise ValueError(
            f"--instruction is told before a prompt is read, and one of {option} is "
            "read for any question: leave either out."
        )


def _check_conversation(chat, resume, save, room, system) -> None:
    """Raises ValueError for options that have nothing to say to each other."""
    if mesh.over_mesh.get() is not None and (resume or save) is not None:
        option = "--save" if resume is None else "--resume"
        raise ValueError(
            f"--mesh {mesh.over_mesh.get()} splits a cache over devices, and {option} "
            "keeps it in one piece: leave either out."
        )
    if save is not None and not chat:
        raise ValueError("--save keeps a conversation: add --chat.")
    if room is not None and save is None and not (chat and resume is not None):
        raise ValueError("--room is that of a conversation: add --chat and --save.")
    if system is not None and resume is not None:
        raise ValueError(
            "--system is the beginning of a conversation, which --resume goes on with: "
            "give it where the conversation begins."
        )


def _sampling(model, asked, chat):
    """The sampling asked for; in a chat, the rest as `generation_config.json` says."""
    from kvjax.decoding import generation_config
    from kvjax.decoding.sampling import Sampling

    written = (chat and model.generation) or {}
    wanted = generation_config.read(written)
    taken = {name: x for name, x in wanted.sampling.items() if name not in asked}
    if asked.get("temperature") == 0:  # of the others only this has an effect then
        taken = {n: x for n, x in taken.items() if n == "repetition_penalty"}
    notes = [
        f"{name}={value:g}" + (" (default)" if written.get(name) is None else "")
        for name, value in taken.items()
    ]
    if wanted.others:
        notes.append(f"without {', '.join(wanted.others)}, which kvjax does not have")
    if notes:
        print(
            "kvjax: note: sampling as generation_config.json says: " + ", ".join(notes),
            file=sys.stderr,
        )
    return Sampling(**(taken | asked))


def _written(events, *, quietly: bool):
    """Writes a row's text to stdout as it comes; returns what the generator returns."""
    while True:
        try:
            _, piece = next(events)
        except StopIteration as end:
            (generation,) = end.value
            return generation
        if not quietly:
            print(piece, end="", flush=True)


def score(
    text: Annotated[
        pathlib.Path, typer.Option("--text", help="UTF-8 file; - is stdin.")
    ],
    model: ModelOption = None,
    method: MethodOption = "full",
    prefill: Annotated[
        int | None,
        typer.Option(
            help="Tokens read as the prompt; if left out, all but the last 256, and of "
            "fewer than 512 the first half."
        ),
    ] = None,
    chunk_size: ChunkOption = 512,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a text: the prompt, then what the decode path predicts."""
    import numpy as np

    from kvjax.decoding.scoring import score as run_score

    answering(method)  # mistakes first
    content = read_text(text)
    language_model = load(model, dtype)
    parsed = fitting(method, language_model.decoder)
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
    predicts = copies.of(language_model.decoder) is None  # a prompt its own tokens
    scores = run_score(
        language_model,
        parsed,
        [tokens],
        prefill=prefill,
        chunk_size=chunk_size,
        prompt_scores=predicts,
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
        print(json.dumps(files.json_ready(summary | listed), indent=2))
        return
    of_prompt = f": {summary['perplexity_of_prompt']:.4f}" if predicts else ""
    print(
        f"perplexity {summary['perplexity']:.4f} over {len(decoded)} tokens decoded "
        f"under {method} (prompt of {prefill}{of_prompt})"
    )
