"""`kvjax bench decode`: steps of a model under its methods, beside their rooflines."""

import json

import jax

import kvjax
from kvjax import files, registry
from kvjax.cli.methods import for_model
from kvjax.cli.options import arguments_given, held_out_text, load, with_budget
from kvjax.cli.progress import show_progress
from kvjax.cost import bench_decode
from kvjax.report import documents, table, terminal

METHODS = ("full", "quest", "snapkv", "streaming_llm")
ENTMAX_METHODS = ("entmax_full", "entmaxkv")
CONTEXT = 4096  # where nobody says; the model's own if that is less


def decode(
    *,
    model: str | None,
    methods: list[str] | None,
    contexts: list[int] | None,
    budget: int,
    steps: int,
    repeats: int,
    batch: int,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Times decode steps of a model, and prints them."""
    for spec in methods or ():
        registry.parse(with_budget(spec, budget))  # mistakes first
    loaded = load(model, dtype)
    if not methods:
        methods = list(METHODS if loaded.decoder.alpha == 1 else ENTMAX_METHODS)
    methods = [for_model(spec, loaded.decoder) for spec in methods]
    specs = dict.fromkeys(with_budget(spec, budget) for spec in methods)
    if contexts is None:
        contexts = [min(CONTEXT, loaded.decoder.context)]
    tokens = loaded.tokenizer.encode(held_out_text()[: 8 * max(contexts)])
    with show_progress(len(specs) * len(contexts)) as progress:
        rows = bench_decode.run(
            loaded,
            list(specs),
            tokens,
            contexts=contexts,
            steps=steps,
            repeats=repeats,
            batch=batch,
            progress=progress,
        )
    settings = {"context": contexts, "budget": budget, "steps": steps}
    settings |= {"repeats": repeats, "batch": batch}
    settings |= {"dtype": jax.numpy.dtype(loaded.decoder.cache_spec(1, 1).dtype).name}
    manifest = documents.manifest(
        version=kvjax.__version__,
        model=loaded.name,
        arguments=arguments_given.get(),
        settings=settings,
    )
    weights = bench_decode.weight_bytes(loaded)
    document = {"manifest": manifest, "weights_read": weights}
    document |= {"rows": [row._asdict() for row in rows]}
    document = files.json_ready(document)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        _print(document)


def _print(document) -> None:
    headings = ["method", "context", "cache read", "read / step", "floor ms", "ms"]
    headings += ["quartiles", "tokens/s", "of floor", "x full", "prompt tokens/s"]
    is_sparse = any(row["prompt_share"] < 1 for row in document["rows"])
    headings += ["prompt pairs"] * is_sparse
    rows = [
        [
            row["method"],
            f"{row['context']:,}",
            table.format_bytes(row["cache_bytes"]),
            table.format_bytes(row["num_bytes"]),
            f"{1e3 * row['floor']:.3f}",
            f"{1e3 * row['median']:.3f}",
            f"{1e3 * row['low']:.3f}-{1e3 * row['high']:.3f}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['floor'] / row['median']:.0%}",
            "-" if row["times_full"] is None else f"{row['times_full']:.2f}",
            f"{row['prompt_tokens_per_second']:,.0f}",
            *[f"{row['prompt_share']:.0%}"] * is_sparse,
        ]
        for row in document["rows"]
    ]
    terminal.show(headings, rows)
    print()
    about = document["manifest"]
    settings = about["settings"]
    terminal.say(
        f"{about['model']} on {about['device']} ({about['backend']}), jax "
        f"{about['jax']}, {settings['dtype']}, {settings['batch']} rows; "
        f"{table.format_bytes(document['weights_read'])} of weights are read a step. "
        f"{settings['repeats']} samples of {settings['steps']} steps, greedy, the last "
        "at the context. Floor: the bytes at the speed of a copy, timed in the same "
        "run; arithmetic is not counted."
    )
