"""Files that are not the weights one takes them for are named for what they are."""

import checkpoints
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers_made import write_byte_level

import models
from kvjax import files

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path):
    written = checkpoints.write(tmp_path / "checkpoint", checkpoints.BASE)
    return write_byte_level(written)


@pytest.mark.parametrize(
    ("beside", "kind"),
    [
        (f"{Q0}_scale_inv", "an FP8 checkpoint"),
        (f"{Q0}_scale", "an FP8 checkpoint"),
        (Q0.replace("weight", "input_scale"), "an FP8 checkpoint"),
        (Q0.replace("weight", "qweight"), "an AWQ or GPTQ checkpoint"),
        (Q0.replace("weight", "g_idx"), "an AWQ or GPTQ checkpoint"),
        (f"{Q0}.absmax", "a bitsandbytes checkpoint"),
        (f"{Q0}.quant_map", "a bitsandbytes checkpoint"),
        (Q0.replace("weight", "scales"), "quantized by MLX"),
        (Q0.replace("weight", "weight_packed"), "a compressed-tensors checkpoint"),
    ],
)
def test_quantized_weights_are_named_for_what_they_are(directory, beside, kind):
    tensors = load_file(directory / WEIGHTS) | {beside: np.ones(2, np.float32)}
    files.save_tensors(directory / WEIGHTS, tensors)
    message = f"checkpoint is {kind}: {beside}; use the unquantized checkpoint"
    with pytest.raises(ValueError, match=message):
        models.load(directory)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976\n"


@pytest.mark.parametrize(
    "name",
    [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", INDEX],
)
def test_a_pointer_of_git_lfs_is_named(directory, name):
    if name == INDEX:
        (directory / WEIGHTS).unlink()
    (directory / name).write_text(POINTER)
    message = f"{name} is a Git LFS pointer, not the file itself; run `git lfs pull`"
    with pytest.raises(ValueError, match=message) as caught:
        models.load(directory)
    assert "\n" not in str(caught.value)
