"""Writes goldens/adapters: what PEFT saves, and computes with it, on a tiny Llama.

Run from the repository root, with torch, transformers and peft installed:

    python tests/models/make_adapters.py

And the other way round, to see that PEFT loads what is written here: the first where
kvjax runs, the second where PEFT does.

    python tests/models/make_adapters.py ours FOLDER
    python tests/models/make_adapters.py check FOLDER
"""

import json
import sys
import tempfile
from pathlib import Path

import checkpoints
import numpy as np

from kvjax import files

FOLDER = Path(__file__).parent / "goldens" / "adapters"
LOGITS = "logits.npz"
CONFIG = checkpoints.CONFIGS["gqa"]
COUNT = 12  # tokens
# Arguments of peft.LoraConfig.
CASES = {
    "names": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5},
    "linear": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": "all-linear",
        "modules_to_save": ["input_layernorm"],
    },
    "patterns": {
        "r": 2,
        "target_modules": r".*\.mlp\.(gate|up|down)_proj",
        "exclude_modules": ["down_proj"],
        "rank_pattern": {"gate_proj": 3},
        "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 5},
    },
    "layers": {"r": 1, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}
# As `lora` of a training config.
OURS = {
    "linear": {
        "rank": 3,
        "alpha": 4.0,
        "modules_to_save": ("post_attention_layernorm",),
    },
    "names": {
        "rank": 2,
        "alpha": 4.0,
        "use_rslora": True,
        "target_modules": ("k_proj",),
    },
    "expression": {
        "rank": 2,
        "alpha": 1.0,
        "target_modules": r".*1\.self_attn\.o_proj",
    },
}


def tokens() -> np.ndarray:
    return checkpoints.tokens(CONFIG, count=COUNT)


def logits_of(model) -> np.ndarray:
    import torch

    ids = torch.tensor(tokens()[None].astype(np.int64))
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits[0].float().numpy()


def base(folder: Path):
    from transformers import AutoModelForCausalLM

    checkpoints.write(folder, CONFIG)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def write() -> None:
    import peft
    import torch

    arrays = {}
    for case, arguments in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = peft.LoraConfig(task_type="CAUSAL_LM", **arguments)
            model = peft.get_peft_model(base(Path(folder)), config)
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            for index, (name, parameter) in enumerate(named):
                noise = checkpoints.uniform(500 + index, parameter.numel())
                scale, mean = (0.1, 1.0) if "norm" in name else (0.15, 0.0)
                array = mean + scale * noise.reshape(parameter.shape)
                parameter.data = torch.tensor(array)
            arrays[case] = logits_of(model)
            saved = Path(folder) / "saved"
            model.save_pretrained(saved)
            (FOLDER / case).mkdir(parents=True, exist_ok=True)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (FOLDER / case / name).write_bytes((saved / name).read_bytes())
            path = FOLDER / case / "adapter_config.json"
            # The model was in a temporary folder.
            content = json.loads(path.read_text("utf-8"))
            content["base_model_name_or_path"] = "tiny-llama"
            files.write_text(path, json.dumps(content, indent=2) + "\n")
    files.save_npz(FOLDER / LOGITS, arrays)


def ours(folder: Path) -> None:
    """Writes adapters as `kvjax train` does, and the logits of the merged models."""
    import oracles.llama

    from models import llama
    from models.llama import adapters, merged, tensors

    place = checkpoints.write(folder / "base", CONFIG)
    decoder, weights = llama.load(place, CONFIG)
    arrays = {}
    for case, given in OURS.items():
        sizes = {key: given[key] for key in given if not key.endswith(("ules", "save"))}
        targets = {key: given[key] for key in given if key.endswith(("ules", "save"))}
        options = adapters.Options(**sizes, targets=adapters.Targets(**targets))
        beside = llama.AdaptedDecoder(decoder, options)
        params = {
            name: value
            + 0.2 * checkpoints.uniform(index, value.size).reshape(value.shape)
            for index, (name, value) in enumerate(beside.init(0, weights).items())
        }
        beside.save(params, folder / case, made_for="base")
        adapter = adapters.read(folder / case)
        found = merged.merge(tensors.from_safetensors(place), adapter)
        sums = {name: found.read(name) for name in found.files}
        arrays[case] = oracles.llama.logits(sums, CONFIG, tokens())
    files.save_npz(folder / LOGITS, arrays)


def check(folder: Path) -> None:
    """Loads with PEFT what `ours` wrote, and compares logits."""
    import peft

    with np.load(folder / LOGITS) as arrays:
        for case in arrays.files:
            model = base(folder / "base")
            plain = logits_of(model)
            model = peft.PeftModel.from_pretrained(model, folder / case)
            difference = np.abs(logits_of(model) - arrays[case]).max()
            change = np.abs(plain - arrays[case]).max()
            print(f"{case:12s} differs by {difference:.1e}, the base by {change:.2f}")
            assert difference < 2e-5 < 0.01 < change, case


def main() -> None:
    if len(sys.argv) == 1:
        write()
        return
    {"ours": ours, "check": check}[sys.argv[1]](Path(sys.argv[2]))


if __name__ == "__main__":
    main()
