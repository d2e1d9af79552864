"""`kvjax distill`: a feature map for `topk_completion`, trained and calibrated."""

import json
import pathlib
import sys
import warnings
from typing import Annotated, Any, Literal

import numpy as np
import typer

from kvjax import files as kvjax_files
from kvjax import interrupts
from kvjax.cli.options import JsonOption, ModelOption, SeedOption, load, read_text

AT_BUDGET = "topk_completion:budget={},charge=none"
FILE = "map.safetensors"
LEARNED = "learned"
MOST_TOKENS = 1_000_000  # of the standard library's text


def distill(
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the run.")],
    model: ModelOption = None,
    text: Annotated[
        pathlib.Path | None,
        typer.Option(help="UTF-8 file to train on; Python's standard library."),
    ] = None,
    feature_map: Annotated[
        str,
        typer.Option(
            "--map", help="learned, or a map to calibrate alone: anchor, mean, ..."
        ),
    ] = LEARNED,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths to train for, in turns.")
    ] = "1024,2048,4096",
    steps: Annotated[int, typer.Option(help="Of training, all heads together.")] = 1500,
    features: Annotated[int, typer.Option(help="Features of the map.")] = 16,
    width: Annotated[int, typer.Option(help="Of the networks.")] = 32,
    dtype: Annotated[
        Literal["bfloat16", "float32"],
        typer.Option(help="Of the networks' matrices in the file, read every step."),
    ] = "bfloat16",
    loss: Annotated[
        Literal["output", "paper"],
        typer.Option(help="Error of the output, or KL, band, false positives, mass."),
    ] = "output",
    budget: Annotated[
        int | None,
        typer.Option(help="Tokens to calibrate at; 2% of the longest prompt."),
    ] = None,
    windows: Annotated[int, typer.Option(help="To calibrate on.")] = 2,
    seed: SeedOption = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUT.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Trains a feature map for topk_completion, and says which heads it helps."""
    try:
        from kvjax.files import arrays
        from kvjax.training import run_folder
        from kvjax.training.feature_maps import distill as feature_maps_distill
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("optax", "orbax"):
            raise
        raise ImportError(
            f"training needs {error.name.split('.')[0]}: pip install 'kvjax[train]'."
        ) from error
    from kvjax import registry
    from kvjax.methods.topk_completion import feature_maps, linear_attention, map_files

    known = (LEARNED, "moment", *feature_maps.NAMES)
    if feature_map not in known:
        raise ValueError(f"--map {feature_map!r} must be one of {', '.join(known)}.")
    if windows < 1:
        raise ValueError(f"{windows=} must be at least 1.")
    settings = feature_maps_distill.Settings(
        steps=steps,
        lengths=_lengths(lengths),
        features=features,
        width=width,
        hidden=width,
        loss=loss,
        seed=seed,
    )
    longest = max(settings.lengths)
    if budget is None:
        budget = linear_attention.budget_tokens(longest, 0.02)
    try:
        # What the map is calibrated at, once it is trained.
        registry.parse(f"{AT_BUDGET.format(budget)},lam=0")
    except ValueError as error:
        raise ValueError(f"--budget {budget} of --lengths {lengths}: {error}") from None
    if feature_map == LEARNED:
        run_folder.check(out, resume=resume)
    kvjax_files.check_writable(out.parent)
    language_model = load(model, None)
    tokens, held_out = feature_maps_distill.split(_tokens(language_model, text, seed))
    file = map_files.MapFile(feature_map, longest, None, None, {})
    if feature_map == LEARNED:
        result = feature_maps_distill.train(
            language_model, tokens, settings, out, resume=resume
        )
        if not result.finished:
            return 1
        file = feature_maps_distill.as_file(result, language_model, settings)
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILE
    # A map that no head can abstain from must not pass for one that is finished, nor
    # what a kill leaves of it.
    draft = out / f".uncalibrated.{FILE}"
    try:
        map_files.save(draft, file, dtype)
        calibrated = _calibrated(
            language_model, draft, held_out, longest, budget, windows, seed
        )
    except (KeyboardInterrupt, interrupts.Interrupted):
        if feature_map == LEARNED:
            print(
                "trained, but not calibrated: run the same command with --resume.",
                file=sys.stderr,
            )
        raise
    finally:
        draft.unlink(missing_ok=True)
    about = file.about | {
        "model": language_model.name,
        "weights": arrays.digest(language_model.params),
        "calibrated_at": budget,
    }
    map_files.save(path, file._replace(gain=calibrated.gain, about=about), dtype)
    _print(calibrated, path, budget, as_json)
    return 0


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--lengths {text!r} must be numbers of tokens, such as 1024,4096."
        ) from None


def _tokens(model: Any, text: pathlib.Path | None, seed: int) -> np.ndarray:
    if text is not None:
        return np.asarray(model.tokenizer.encode(read_text(text)), np.int32)
    from kvjax.training.data import text as texts

    files = texts.read(texts.STDLIB)
    tokens: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(files)):
        tokens += model.tokenizer.encode(files[int(index)])
        if len(tokens) > MOST_TOKENS:
            break
    return np.asarray(tokens, np.int32)


def _calibrated(model, path, held_out, longest, budget, windows, seed):
    from kvjax import registry
    from kvjax.evaluation import head_gains
    from kvjax.text.encoding import added
    from kvjax.training.feature_maps import distill as feature_maps_distill

    new_tokens = 32
    size = longest + new_tokens
    if size > min(model.decoder.context, len(held_out)):
        size = min(model.decoder.context, len(held_out))
    rng = np.random.default_rng([seed, 1])
    before = added(model.tokenizer.encode).before
    rows = [
        feature_maps_distill.window(rng, held_out, size, before) for _ in range(windows)
    ]
    method = AT_BUDGET.format(budget)
    with warnings.catch_warnings():
        # Room is made in whole chunks, which the longest prompt does not fill.
        warnings.filterwarnings("ignore", "the feature map was trained for prompts")
        return head_gains.calibrate(
            model,
            registry.parse("full"),
            registry.parse(f"{method},lam=0"),
            registry.parse(f"{method},feature_map={path}"),
            rows,
            new_tokens=new_tokens,
        )


def _print(found, path, budget, as_json) -> None:
    from kvjax.evaluation import head_gains

    if as_json:
        by_head = {"gain": found.gain, **found._asdict()}
        document = {"file": str(path), "budget": budget}
        document |= {name: x.tolist() for name, x in by_head.items()}
        print(json.dumps(kvjax_files.json_ready(document), indent=2))
        return
    print("\n".join([*head_gains.summary(found), f"wrote {path}"]))
