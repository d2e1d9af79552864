"""`kvjax train`: a config, a folder, and the model and text that the config names."""

import dataclasses
import hashlib
import pathlib
import re
import sysconfig
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

import kvjax
from kvjax.cli.common import (
    held_out_text,
    keep_compiled_code,
    model_name,
    print_notes,
)

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
    """Trains a model, resumable at any moment; the result is the folder OUT/model."""
    try:
        from kvjax.training import config_files, loop, run_folder
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA:
            raise
        raise ImportError(
            f"training needs {error.name.split('.')[0]}: pip install 'kvjax[train]'."
        ) from error

    run_folder.check(out, resume=resume)
    if config is None and not resume:
        known = ", ".join(config_files.presets())
        raise ValueError(f"give --config a YAML file or a preset ({known}).")
    source, changes = config or out / run_folder.CONFIG, changes or ()
    settings = config_files.load(source, changes)
    if setting is not None and settings.refreshkv is None:
        settings = config_files.load(source, [f"{setting}={{}}", *changes])
    keep_compiled_code()
    model = _model(settings, out, resume)
    sources, held_out, data_id = _data(settings, model)
    result = loop.train(
        model.decoder,
        settings,
        out,
        init=model.init,
        sources=sources,
        held_out=held_out,
        save=model.save,
        resume=resume,
        data_id=data_id,
    )
    if result.finished:
        print(out / run_folder.MODEL)
    return 0 if result.finished else 1


class _Model(NamedTuple):
    decoder: Any
    tokenizer: Any
    init: Any  # of loop.train
    save: Any


def _model(settings: "Config", out: pathlib.Path, resume: bool) -> _Model:
    import jax

    import models
    from models import llama

    section = settings.model
    if section.checkpoint is not None:
        loaded = models.load(model_name(section.checkpoint), dtype="float32")
        print_notes(loaded.decoder)
        if section.alpha is not None:
            config = dataclasses.replace(
                loaded.decoder.config, attention_alpha=section.alpha
            )
            loaded = loaded._replace(decoder=llama.LlamaDecoder(config))

        def init(shardings):
            return jax.device_put(loaded.params, shardings)

    else:
        decoder = llama.LlamaDecoder(llama.from_hf(section.config, dtype="float32"))
        tokenizer = _tokenizer(settings, out, decoder, resume)
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        loaded = kvjax.LanguageModel(decoder, None, tokenizer, eos)

        def init(shardings):
            return jax.jit(
                lambda: decoder.init(settings.seed), out_shardings=shardings
            )()

    def save(params, folder):
        models.save_pretrained(loaded._replace(params=params), folder)

    return _Model(loaded.decoder, loaded.tokenizer, init, save)


def _tokenizer(settings: "Config", out: pathlib.Path, decoder, resume: bool) -> Any:
    from kvjax.training.data import text
    from models import embedded, llama

    name, folder = settings.model.tokenizer, out / "tokenizer"
    if name != "train":
        is_ours = name.startswith(embedded.PREFIX)
        folder = embedded.path(name) if is_ours else pathlib.Path(name)
    elif not resume:  # what lies there without a run is left of one that never began
        from models.embedded import tokenizer

        texts = text.read(_corpus(settings.data.corpus))
        folder.mkdir(parents=True, exist_ok=True)
        trained = tokenizer.train(texts, decoder.vocab_size)
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
    root = sysconfig.get_paths()["stdlib"]
    return [re.sub(r"^stdlib(?=/)", lambda _: root, pattern) for pattern in given]


def _data(settings: "Config", model: _Model):
    from kvjax.training import data
    from kvjax.training.data import text

    backend = model.tokenizer.backend
    corpus = data.load_corpus(_corpus(settings.data.corpus), backend)
    held_out = settings.data.held_out
    if held_out is None:
        aside = text.make([held_out_text()], backend)
    else:
        aside = data.load_corpus(_corpus(held_out), backend)
    digest = hashlib.sha256(corpus.tokens.tobytes())
    digest.update(backend.to_str().encode())
    return data.sources(corpus), data.sources(aside), digest.hexdigest()[:16]
