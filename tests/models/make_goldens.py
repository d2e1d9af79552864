"""Writes goldens/logits.npz: what transformers computes on the tiny checkpoints.

Run from the repository root, with torch and transformers installed:

    python tests/models/make_goldens.py
"""

import tempfile
from pathlib import Path

import checkpoints
import numpy as np

GOLDENS = Path(__file__).parent / "goldens" / "logits.npz"


def reference(directory: Path, tokens: np.ndarray, dtype: str = "float32"):
    """Logits `(T, V)` in one pass, and the last ones again token by token."""
    import torch
    from transformers import AutoModelForCausalLM

    def model():  # a fresh one each time: dynamic scaling remembers what it has seen
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()

    ids = torch.tensor(tokens[None].astype(np.int64))
    with torch.no_grad():
        whole = model()(ids, use_cache=False).logits[0].float().numpy()
        stepping, cache, half = model(), None, len(tokens) // 2
        steps = []
        for chunk in (ids[:, :half], *ids[:, half:].split(1, dim=1)):
            out = stepping(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
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
    np.savez_compressed(GOLDENS, **arrays)
    print(f"{GOLDENS.name}: {GOLDENS.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
