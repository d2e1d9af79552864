"""Writes goldens/kvpress.npz: the tokens that kvpress keeps of one prompt.

In an environment of its own, because it is capped at old releases of transformers; of
ours nothing but what writes the checkpoint is imported. From the repository root, on
Python 3.11:

    pip install kvpress==0.5.5 'transformers==5.2.*' 'tokenizers==0.22.*' \
        'huggingface_hub<2' torch==2.13
    PYTHONPATH=.:tests/models python tests/models/make_kvpress.py
"""

import importlib.metadata
import tempfile
from pathlib import Path

import checkpoints
import numpy as np

from kvjax import files

GOLDENS = Path(__file__).parent / "goldens" / "kvpress.npz"
CONFIG = checkpoints.BASE | {
    "vocab_size": 256,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
}
BUDGET, LENGTH = 24, 96
# What a press is called here: its class, and its options.
PRESSES = {
    "snapkv": ("SnapKVPress", {"window_size": 8, "kernel_size": 5}),
    "tova": ("TOVAPress", {}),
    "observed": ("ObservedAttentionPress", {}),
    "streaming_llm": ("StreamingLLMPress", {"n_sink": 4}),
    "knorm": ("KnormPress", {}),
    "keydiff": ("KeyDiffPress", {}),
    "expected_attention": (
        "ExpectedAttentionPress",
        {"n_sink": 4, "n_future_positions": 512, "epsilon": 0.01},
    ),
}
VERSIONS = ("kvpress", "transformers", "torch")


def prompt() -> np.ndarray:
    """Tokens that are all different: equal ones would have keys of equal norm."""
    order = np.argsort(checkpoints.uniform(7, CONFIG["vocab_size"]), kind="stable")
    return order[:LENGTH].astype(np.int32)


def read(model, tokens: np.ndarray) -> list[np.ndarray]:
    """The keys `(Hkv, N, D)` that every layer has after the prompt."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor(tokens[None].astype(np.int64)), past_key_values=cache)
    return [layer.keys[0].numpy().copy() for layer in cache.layers]


def positions_of(kept: np.ndarray, keys: np.ndarray) -> list[int]:
    """Where the kept keys `(N, D)` are among all `(S, D)`: found by their bits."""
    found = [np.flatnonzero((keys == key).all(-1)) for key in kept]
    assert all(len(places) == 1 for places in found)
    return sorted(int(places[0]) for places in found)


def main() -> None:
    import kvpress
    from transformers import AutoModelForCausalLM

    tokens = prompt()
    with tempfile.TemporaryDirectory() as folder:
        directory = checkpoints.write(Path(folder), CONFIG)
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="float32", attn_implementation="eager"
        ).eval()
    whole, arrays = read(model, tokens), {}
    for name, (press, options) in PRESSES.items():
        ratio = 1 - BUDGET / LENGTH
        made = getattr(kvpress, press)(compression_ratio=ratio, **options)
        with made(model):
            layers = read(model, tokens)
        pairs = zip(layers, whole, strict=True)
        kept = [list(map(positions_of, some, keys)) for some, keys in pairs]
        arrays[name] = np.array(kept, np.int16)
        assert arrays[name].shape == (*arrays[name].shape[:2], BUDGET)
        print(f"{name:20s} {arrays[name][-1, 0].tolist()}")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in VERSIONS]
    files.save_npz(GOLDENS, arrays | {"versions": np.array(versions)})
    print(*versions, f"{GOLDENS.name}: {GOLDENS.stat().st_size} bytes", sep=", ")


if __name__ == "__main__":
    main()
