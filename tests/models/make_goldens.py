"""Writes goldens/*.npz: what transformers computes on the tiny checkpoints.

Run from the repository root, with torch and transformers installed:

    python tests/models/make_goldens.py
"""

import inspect
import tempfile
from pathlib import Path

import checkpoints
import numpy as np

from kvjax import files

GOLDENS = Path(__file__).parent / "goldens" / "logits.npz"
FAMILIES = GOLDENS.with_name("families.npz")


def reference(directory: Path, tokens: np.ndarray, dtype: str = "float32"):
    """Logits `(T, V)` in one pass, and the last ones again token by token."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        DynamicCache,
    )

    def model():  # a fresh one each time: dynamic scaling remembers what it has seen
        config = AutoConfig.from_pretrained(directory)
        sees = hasattr(config, "vision_config")
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        return kind.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()

    ids = torch.tensor(tokens[None].astype(np.int64))
    with torch.no_grad():
        whole = model()(ids, use_cache=False).logits[0].float().numpy()
        stepping, half = model(), len(tokens) // 2
        # Renamed in transformers 5; the cache is written in place.
        parameters = inspect.signature(stepping.forward).parameters
        name = "cache" if "cache" in parameters else "past_key_values"
        cache, steps = {name: DynamicCache(config=stepping.config)}, []
        for chunk in (ids[:, :half], *ids[:, half:].split(1, dim=1)):
            out = stepping(chunk, use_cache=True, **cache)
            steps.append(out.logits[0, -1].float().numpy())
    return whole, np.stack(steps[1:])


def main():
    arrays = {}
    for name, config in checkpoints.CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = checkpoints.write(Path(folder), config)
            whole, steps = reference(directory, checkpoints.tokens(config))
        arrays[f"{name}/prefill"], arrays[f"{name}/decode"] = whole, steps
        print(f"{name:24s} std {whole.std():.2f} largest {np.abs(whole).max():.2f}")
        if "dynamic" not in name:
            # Stepping says nothing new without dynamic scaling: stored once.
            np.testing.assert_allclose(steps, whole[-len(steps) :], atol=2e-5)
            del arrays[f"{name}/decode"]
    files.save_npz(GOLDENS, arrays)

    arrays = {}
    for name, twin in checkpoints.FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = checkpoints.write_family(Path(folder), name)
            whole, steps = reference(directory, checkpoints.tokens(twin.plain))
        np.testing.assert_allclose(steps, whole[-len(steps) :], atol=2e-5)
        arrays[name] = whole
    files.save_npz(FAMILIES, arrays)
    for file in (GOLDENS, FAMILIES):
        print(f"{file.name}: {file.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
