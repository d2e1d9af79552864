"""`kvjax train`: a config, a folder, and the model and text that the config names."""

import dataclasses
import functools
import glob
import hashlib
import importlib
import pathlib
import re
import sys
import sysconfig
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

import kvjax
from kvjax.cli.compiled import keep_compiled_code
from kvjax.cli.options import held_out_text, model_name, print_notes

if TYPE_CHECKING:
    from kvjax.training.config import Config

# What the extra brings.
_EXTRA = ("grain", "optax", "orbax", "pydantic", "tensorboardX", "yaml")


def train(
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the run.")],
    config: Annotated[
        str | None,
        typer.Option(
            help="YAML file or preset; with --resume, the run's own if left out."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the config; may be repeated."),
    ] = None,
    setting: Annotated[
        Literal["refreshkv"] | None,
        typer.Option(
            help="Attention to train for: refreshkv, as the paper does unless the "
            "config or --set refreshkv.KEY=value says how."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint in --out."),
    ] = False,
) -> int:
    """Trains a model, resumable at any moment; the result is the folder OUT/model.

    With --set lora.rank=8 its weights stay as they are, low-rank matrices beside them
    are trained, and the result is OUT/adapter, for --adapter and for PEFT.
    """
    config_files, loop, run_folder = map(
        require, ("config_files", "loop", "run_folder")
    )
    run_folder.check(out, resume=resume)
    if config is None and not resume:
        known = ", ".join(config_files.presets())
        raise ValueError(f"give --config a YAML file or a preset ({known}).")
    source, overrides = config or out / run_folder.CONFIG, changes or []
    settings = config_files.load(source, overrides)
    if setting is not None and settings.refreshkv is None:
        settings = config_files.load(source, [f"{setting}={{}}", *overrides])
    settings = config_files.located(settings)
    texts = _texts(settings)
    keep_compiled_code()
    model = _model(settings, texts, out, resume)
    sources, held_out, data_id = _data(settings, texts, model)
    result = loop.train(
        model.decoder,
        settings,
        out,
        init=model.init,
        frozen=model.frozen,
        sources=sources,
        held_out=held_out,
        save=model.save,
        resume=resume,
        data_id=data_id,
    )
    if result.finished:
        print(out / (run_folder.ADAPTER if settings.lora else run_folder.MODEL))
    return 0 if result.finished else 1


def require(name: str) -> ModuleType:
    """Returns a module of `kvjax.training`.

    Raises:
        ImportError: if the extra that it needs is not installed.
    """
    try:
        return importlib.import_module(f"kvjax.training.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA:
            raise
        raise ImportError(
            f"training needs {error.name.split('.')[0]}: pip install 'kvjax[train]'."
        ) from error


class _Texts(NamedTuple):
    training: list[str]
    held_out: list[str]
    which: str  # the held-out ones are


class _Model(NamedTuple):
    decoder: Any
    tokenizer: Any
    init: Any  # of loop.train
    save: Any
    frozen: Any = None


def decoder_of(settings: "Config") -> Any:
    """Returns the decoder that a config trains, its weights float32, without them."""
    import models
    from models import llama

    section = settings.model
    if section.checkpoint is None:
        config = llama.from_hf(section.config or {}, dtype="float32")
        return llama.LlamaDecoder(_changed(config, section))
    name = model_name(section.checkpoint)
    decoder: Any = models.load_decoder(name, dtype="float32")
    decoder = llama.LlamaDecoder(_changed(decoder.config, section))
    return decoder if settings.lora is None else _beside(decoder, name, settings.lora)


def _changed(config: Any, section: Any) -> Any:
    """Returns a model's config with what the section `model` has otherwise."""
    wanted = {
        "attention_alpha": section.alpha,
        "copies": section.copies,
        "copy_window": section.copy_window,
        "copy_chunk": section.copy_chunk,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    return dataclasses.replace(config, **given)


def _beside(decoder: Any, name: str, section: Any) -> Any:
    """Returns the decoder whose adapters a section `lora` trains."""
    import models
    from models import llama
    from models.llama import adapters

    models.check_adaptable(name)
    targets = adapters.Targets(section.target_modules, section.modules_to_save)
    options = adapters.Options(section.rank, section.alpha, section.use_rslora, targets)
    return llama.AdaptedDecoder(decoder, options)


def _model(
    settings: "Config", texts: _Texts, out: pathlib.Path, resume: bool
) -> _Model:
    import jax
    import jax.numpy as jnp

    import models
    from models import llama

    section = settings.model
    if settings.lora is not None:
        return _adapter(settings)
    if section.checkpoint is not None:
        name = model_name(section.checkpoint)
        own_decoder: Any = models.load_decoder(name)
        own = own_decoder.config.dtype
        loaded = models.load(name, dtype="float32")
        print_notes(loaded.decoder)
        loaded = loaded._replace(decoder=decoder_of(settings))
        init = functools.partial(jax.device_put, loaded.params)
    else:
        own = llama.from_hf(section.config or {}).dtype
        decoder = decoder_of(settings)
        tokenizer = _tokenizer(settings, texts, out, decoder, resume)
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        loaded = kvjax.LanguageModel(decoder, None, tokenizer, eos)
        init = functools.partial(_drawn_weights, decoder, settings.seed)

    dtype = jnp.dtype(section.dtype or own).name
    if dtype != "float32":
        _notice(
            f"{out / 'model'} will be {dtype}, which rounds what float32 has learned: "
            "model.dtype=float32 keeps it."
        )
    trained: Any = loaded.decoder
    config = dataclasses.replace(trained.config, dtype=dtype)

    def save(params, folder):
        written = loaded._replace(decoder=llama.LlamaDecoder(config), params=params)
        models.save_pretrained(written, folder)

    return _Model(loaded.decoder, loaded.tokenizer, init, save)


def _adapter(settings: "Config") -> _Model:
    """Returns what trains an adapter: weights that are given away once, and its own."""
    import jax

    import models

    decoder, section = decoder_of(settings), settings.model
    loaded = models.load(model_name(section.checkpoint), dtype="float32")
    print_notes(loaded.decoder)
    first = decoder.init(settings.seed, loaded.params)
    weights = [loaded.params]  # which nobody else keeps
    is_own_alpha = decoder.alpha == loaded.decoder.alpha
    save = functools.partial(
        decoder.save,
        made_for=str(section.checkpoint),
        dtype=section.dtype or "float32",
        attention_alpha=None if is_own_alpha else decoder.alpha,
    )
    return _Model(
        decoder,
        loaded.tokenizer,
        functools.partial(jax.device_put, first),
        save,
        lambda shardings: jax.device_put(weights.pop(), shardings),
    )


def _drawn_weights(decoder: Any, seed: int, shardings: Any) -> Any:
    import jax

    return jax.jit(lambda: decoder.init(seed), out_shardings=shardings)()


def _tokenizer(settings: "Config", texts: _Texts, out, decoder, resume: bool) -> Any:
    from models import embedded, llama

    name, folder = str(settings.model.tokenizer), out / "tokenizer"
    if name != "train":
        is_ours = name.startswith(embedded.PREFIX)
        folder = embedded.path(name) if is_ours else pathlib.Path(name)
    elif not resume:  # what lies there without a run is left of one that never began
        from models.embedded import tokenizer

        folder.mkdir(parents=True, exist_ok=True)
        trained = tokenizer.train(texts.training, decoder.vocab_size)
        tokenizer.save(trained, folder, decoder.context)
    loaded = llama.tokenizer.load(folder)
    if loaded.vocab_size > decoder.vocab_size:
        raise ValueError(
            f"the tokenizer has {loaded.vocab_size} tokens and the model "
            f"vocab_size={decoder.vocab_size}: raise model.config.vocab_size."
        )
    return loaded


def _corpus(given: tuple[str, ...]) -> str | list[str]:
    if given == ("stdlib",):
        return "stdlib"
    root = glob.escape(sysconfig.get_paths()["stdlib"])
    return [re.sub(r"^stdlib(?=/)", lambda _: root, pattern) for pattern in given]


def _texts(settings: "Config") -> _Texts:
    from kvjax.training.data import text

    section = settings.data
    field = section.field
    _check_apart(settings)
    texts = text.read(_corpus(section.corpus), field=field)
    if section.held_out is not None:
        aside = text.read(_corpus(section.held_out), field=field, key="data.held_out")
        return _Texts(texts, aside, f"data.held_out={', '.join(section.held_out)}")
    if section.corpus == (text.STDLIB,):
        aside = [held_out_text()]
        return _Texts(texts, aside, "modules of the library that are not in it")
    training, aside = text.split(texts)
    return _Texts(training, aside, "its last twentieth, which is not trained on")


def _check_apart(settings: "Config") -> None:
    """Raises if a file is trained on and checked by, under whatever names."""
    from kvjax.training.data import text

    section = settings.data
    if section.held_out is None or not settings.checks:
        return
    aside = text.paths(_corpus(section.held_out), key="data.held_out")
    trained = {path.resolve() for path in text.paths(_corpus(section.corpus))}
    both = [path for path in aside if path.resolve() in trained]
    if both:
        more = f" (and {len(both) - 1} more)" if len(both) > 1 else ""
        raise ValueError(
            f"{both[0]}{more} of data.held_out is in data.corpus too, and the checks "
            "would be of what is trained on: keep it where no pattern of data.corpus "
            "finds it, or set data.held_out=null (the corpus' end) or evaluate.every=0."
        )


def _data(settings: "Config", texts: _Texts, model: _Model):
    from kvjax.training import data
    from kvjax.training.data import text

    backend = model.tokenizer.backend
    corpus = text.make(texts.training, backend)
    size = len(corpus.tokens)
    longest = max(length for stage in settings.stages for length in stage.lengths)
    if size <= longest:
        raise ValueError(
            f"the corpus has {size:,} tokens to train on, and a row of stages.lengths "
            f"takes {longest + 1:,}: give more text, or shorten the rows."
        )
    most = max(stage.tokens for stage in settings.stages)
    _notice(f"corpus: {size:,} tokens, of which a step takes up to {most:,}.")
    aside = text.make(texts.held_out, backend) if texts.held_out else None
    _check_held_out(settings, texts, 0 if aside is None else len(aside.tokens))
    digest = hashlib.sha256(corpus.tokens.tobytes())
    digest.update(backend.to_str().encode())
    held_out = None if aside is None else data.sources(aside)
    return data.sources(corpus), held_out, digest.hexdigest()[:16]


def _check_held_out(settings: "Config", texts: _Texts, size: int) -> None:
    longest = max([0, *(length for _, length in settings.checks)])
    if settings.checks and size <= longest:
        raise ValueError(
            f"the text of the checks ({texts.which}) has {size:,} tokens and a check "
            f"takes {longest + 1:,}: give more text, name some by data.held_out, "
            "shorten evaluate.checks, or set evaluate.every=0."
        )
    _notice(f"text of the checks: {size:,} tokens, {texts.which}.")


def _notice(line: str) -> None:
    print(f"kvjax: {line}", file=sys.stderr)
