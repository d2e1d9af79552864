"""The weights that training starts from, and the tokenizer beside them.

    python -m models.embedded.start --out runs/start

Random, but for two layers. A random model of this size needs tens of millions of tokens
before its first induction heads appear; here the heads of layer 0 begin by looking a
fixed distance back, through biases that only RoPE turns, and those of layer 1 begin by
looking for the places where layer 0 has put the token they are at. That is the circuit
of Olsson et al., "In-context Learning and Induction Heads", 2022, arXiv:2209.11895, as
a mimetic initialisation (Trockman and Kolter, ICML 2023, arXiv:2305.09828). Everything
is trained afterwards, and nothing holds it in place.
"""

import argparse
import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import models
from kvjax.interface import LanguageModel, Params
from kvjax.rope import Rope
from kvjax.training.data import text
from models.embedded import tokenizer
from models.llama import tokenizer as hf_tokenizer
from models.llama.config import LlamaConfig
from models.llama.model import LlamaDecoder

CONFIG = LlamaConfig(
    vocab_size=tokenizer.VOCAB_SIZE,
    width=128,
    num_layers=4,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=256,
    context=8192,
    # So slow that half of a head's pairs turn less than half a radian in 8K tokens,
    # and can tell tokens apart by content wherever they are.
    rope=Rope(head_dim=64, theta=1e8),
    qkv_bias=True,  # what a head needs to look at positions rather than tokens
    output_bias=True,
    tied_embeddings=True,
)

EMBEDDING = 0.9  # norm of a token's embedding: residuals start at this size
LOOK_BACK = 7.7  # size of the biases, in each of the fastest pairs
NUM_FAST = 8
SHARPNESS = 1.5  # of the matching heads
COPYING = 2.0  # how much louder a copied token is than the one it lands on


def params(config: LlamaConfig, seed: int = 0) -> Params:
    """Random parameters of `config` with the first two layers as the module says.

    Raises:
        ValueError: if the shape does not fit: two layers, biases, two KV heads whose
            dims make up the width.
    """
    heads, kv, size = config.num_q_heads, config.num_kv_heads, config.head_dim
    if config.num_layers < 2 or not config.qkv_bias or 2 * size != config.width:
        raise ValueError(
            f"{config.num_layers=}, {config.qkv_bias=}, num_kv_heads * head_dim = "
            f"{kv * size} and {config.width=}: the start needs two layers, biases, and "
            "KV heads that make up the width."
        )
    group, pairs = heads // kv, size // 2
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(np.array, LlamaDecoder(config).init(seed))
    # The residual stream starts as two halves: the token itself, and, one head of layer
    # 0 after the other in ever fewer dims, what stood before it.
    basis = np.linalg.qr(rng.standard_normal((config.width,) * 2))[0]
    half = config.width // 2
    token, before = basis[:, :half], []
    start = half
    for head in range(heads):
        count = max(half >> (head + 1), half >> (heads - 1))
        before.append(basis[:, start : start + count])
        start += count
    codes = rng.standard_normal((config.vocab_size, half))
    tree["embedding"][...] = EMBEDDING * half**-0.5 * codes @ token.T

    first = tree["layers"][0]["attention"]
    for name in ("q", "k"):
        first[name]["kernel"] *= 0.1
    speed = config.rope.theta ** -(np.arange(NUM_FAST) / pairs)
    k_bias = first["k"]["bias"].reshape(kv, 2, pairs)
    k_bias[:, 0, :NUM_FAST] = LOOK_BACK
    q_bias = first["q"]["bias"].reshape(heads, 2, pairs)
    for head in range(heads):  # head h looks h + 1 tokens back
        q_bias[head, 0, :NUM_FAST] = LOOK_BACK * np.cos(speed * (head + 1))
        q_bias[head, 1, :NUM_FAST] = -LOOK_BACK * np.sin(speed * (head + 1))
    # Values have unit dims, as all that comes out of a norm.
    first["v"]["kernel"][...] = np.tile(token, kv)
    output = first["o"]["kernel"].reshape(heads, size, config.width)
    for head, block in enumerate(before):
        output[head] *= 0.1
        output[head, : block.shape[1]] += EMBEDDING * half**-0.5 * block.T

    second = tree["layers"][1]["attention"]
    # Only pairs that hardly turn compare content at any distance.
    slow = np.concatenate([np.arange(pairs // 2, pairs) + at for at in (0, pairs)])
    k_kernel = second["k"]["kernel"].reshape(config.width, kv, size)
    q_kernel = second["q"]["kernel"].reshape(config.width, kv, group, size)
    k_kernel *= 0.1
    q_kernel *= 0.1
    wide, narrow = before[0].shape[1], before[1].shape[1]
    # The first KV head finds what followed this token, the others what followed this
    # token and the one before it.
    k_kernel[:, 0, slow[:wide]] += SHARPNESS * before[0]
    q_kernel[:, 0][:, :, slow[:wide]] += SHARPNESS * token[:, None, :wide]
    both_k = np.concatenate([before[0][:, :narrow], before[1]], 1)
    both_q = np.concatenate([token[:, :narrow], before[0][:, :narrow]], 1)
    for index in range(1, kv):
        k_kernel[:, index, slow[: 2 * narrow]] += SHARPNESS * both_k
        q_kernel[:, index][:, :, slow[: 2 * narrow]] += SHARPNESS * both_q[:, None]
    second["v"]["kernel"][...] = np.tile(token, kv)
    output = second["o"]["kernel"].reshape(heads, size, config.width)
    output *= 0.1
    output[:, :half] += COPYING * EMBEDDING * half**-0.5 / heads * token.T
    return jax.tree.map(lambda x: jnp.asarray(x, config.dtype), tree)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.embedded.start")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="of entmax attention; 1 is softmax"
    )
    parser.add_argument(
        "--corpus", nargs="+", help="UTF-8 files; the standard library if left out"
    )
    args = parser.parse_args(argv)
    backend = tokenizer.train(text.read(args.corpus or text.STDLIB))
    changes = {} if args.alpha == 1 else {"attention_alpha": args.alpha}
    config = dataclasses.replace(CONFIG, vocab_size=backend.get_vocab_size(), **changes)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(backend, pathlib.Path(folder), config.context)
        loaded = hf_tokenizer.load(pathlib.Path(folder))
    model = LanguageModel(
        decoder=LlamaDecoder(config),
        params=params(config, args.seed),
        tokenizer=loaded,
        eos_ids=(tokenizer.EOS,),
    )
    models.save_pretrained(model, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
