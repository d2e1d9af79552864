"""Decode speed against the transformers library: same weights, same prompt, greedy.

One random Llama a size goes through both, in float32 on the CPU:
`kvjax.decoding.generate` under the `full` method, and `model.generate` with a static
cache and SDPA. Runs alternate, so that a busy machine slows both; the time of the
prompt is measured alone and subtracted.
"""

import argparse
import json
import os
import platform
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
import transformers

from kvjax.decoding.generate import generate
from kvjax.interface import LanguageModel
from kvjax.methods.full import full
from kvjax.rope import Rope
from models.llama.config import LlamaConfig
from models.llama.model import LlamaDecoder

# width, layers, query heads, KV heads, MLP width, vocabulary
SIZES = {
    "1M": (128, 4, 4, 2, 384, 1024),
    "10M": (320, 6, 5, 5, 896, 4096),
    "30M": (512, 8, 8, 4, 1408, 8192),
    "100M": (768, 12, 12, 4, 2048, 16384),
}
PROMPT, NEW = 128, 128


class Numbers:
    """A tokenizer for models that never saw text."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def build(size):
    """The same random weights in both libraries, and their number."""
    width, layers, q_heads, kv_heads, mlp, vocab = SIZES[size]
    head_dim = width // q_heads
    config = LlamaConfig(
        vocab_size=vocab,
        width=width,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=mlp,
        context=4096,
        rope=Rope(head_dim),
        norm_epsilon=1e-5,
    )
    decoder = LlamaDecoder(config)
    params = decoder.init(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=q_heads,
            num_key_value_heads=kv_heads,
            intermediate_size=mlp,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    ).eval()
    theirs.load_state_dict(state_dict(params, width))
    model = LanguageModel(decoder, params, Numbers(), (), size)
    return model, theirs, sum(leaf.size for leaf in jax.tree.leaves(params))


def state_dict(params, width):
    """Our parameters under the names and layouts of the transformers library."""

    def tensor(array):
        return torch.from_numpy(np.array(array))

    out = {
        "model.embed_tokens.weight": tensor(params["embedding"]),
        "model.norm.weight": tensor(params["norm"]["weight"]),
        "lm_head.weight": tensor(params["output"]["kernel"].T),
    }
    for index, layer in params["layers"].items():
        name = f"model.layers.{index}."
        attention, mlp = layer["attention"], layer["mlp"]
        for part in "qkv":
            kernel = attention[part]["kernel"].reshape(width, -1)
            out[f"{name}self_attn.{part}_proj.weight"] = tensor(kernel.T)
        kernel = attention["o"]["kernel"].reshape(-1, width)
        out[f"{name}self_attn.o_proj.weight"] = tensor(kernel.T)
        for part in ("gate", "up", "down"):
            out[f"{name}mlp.{part}_proj.weight"] = tensor(mlp[part]["kernel"].T)
        out[name + "input_layernorm.weight"] = tensor(layer["attention_norm"]["weight"])
        out[name + "post_attention_layernorm.weight"] = tensor(
            layer["mlp_norm"]["weight"]
        )
    return out


def compare(size, batch, repeats):
    """Median decode tokens/s of both, and the median of the ratios of paired runs."""
    model, theirs, num_params = build(size)
    method = full()
    vocab = model.decoder.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocab, (batch, PROMPT))
    inputs = torch.from_numpy(prompts)
    rows = prompts.tolist()

    def ours(new):
        done = generate(model, method, rows, max_new_tokens=new, eos_ids=())
        return [row.tokens for row in done]

    def other(new):
        with torch.inference_mode():
            out = theirs.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                cache_implementation="static",
                disable_compile=True,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[:, PROMPT:].tolist()

    def seconds(run):
        def timed(new):
            start = time.perf_counter()
            run(new)
            return time.perf_counter() - start

        return timed(NEW) - timed(1)

    same = ours(NEW) == other(NEW)
    ours(1), other(1)  # compiles, and warms both
    # Who goes first alternates too.
    times = []
    for repeat in range(repeats):
        if repeat % 2:
            b = seconds(other)
            a = seconds(ours)
        else:
            a = seconds(ours)
            b = seconds(other)
        times.append((a, b))
    tokens = batch * (NEW - 1)
    return {
        "size": size,
        "parameters": num_params,
        "batch": batch,
        "kvjax_tokens_per_s": round(tokens / statistics.median(t[0] for t in times), 1),
        "transformers_tokens_per_s": round(
            tokens / statistics.median(t[1] for t in times), 1
        ),
        "speedup": round(statistics.median(b / a for a, b in times), 2),
        "same_tokens": same,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()

    results = []
    print(
        f"prompt {PROMPT}, {NEW} new tokens, greedy, float32, median of {args.repeats}"
    )
    print("size   batch   kvjax tok/s   transformers tok/s   speedup   same tokens")
    for size in args.sizes:
        for batch in args.batches:
            row = compare(size, batch, args.repeats)
            results.append(row)
            print(
                f"{size:<5}{batch:>7}{row['kvjax_tokens_per_s']:>14}"
                f"{row['transformers_tokens_per_s']:>21}{row['speedup']:>10}"
                f"{row['same_tokens']!s:>14}",
                flush=True,
            )
    versions = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    machine = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": args.threads,
    }
    print(json.dumps({"results": results} | machine | versions))


if __name__ == "__main__":
    main()
