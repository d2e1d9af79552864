"""A tiny model, toy sources and a config for tests of training; also a program.

`python toys.py OUT CONFIG [--resume]` trains in a process of its own, to be killed.
"""

import os
import pathlib
import sys
import time

import numpy as np
import yaml

from kvjax.training import config_files
from kvjax.training.batch import Sample

VOCAB = 40

BASE = {
    "model": {"config": {"model_type": "llama"}, "tokenizer": "train"},
    "stages": [
        {"steps": 6, "tokens": 64, "lengths": {16: 1}, "mixture": {"count": 1}},
        {
            "steps": 6,
            "tokens": 64,
            "lengths": {32: 1},
            "shortest": 5,
            "mixture": {"count": 0.5, "noise": 0.5},
        },
    ],
    "optimizer": {"lr": 1e-2, "warmup": 3, "average": 0.9},
    "data": {"threads": 0},
    "evaluate": {"every": 5, "tokens": 64, "checks": ["count@16", "noise@16"]},
    "checkpoint": {"every_steps": 4},
    "log": {"every": 3, "tensorboard": False},
}


class Count:
    """Counts upwards from anywhere: every token but the first can be known."""

    def draw(self, rng, length):
        time.sleep(float(os.environ.get("TOYS_SLEEP", "0")))
        tokens = (rng.integers(VOCAB) + np.arange(length + 1)) % VOCAB
        answers = np.arange(length) > 0
        return Sample(tokens.astype(np.int32), np.ones(length, np.float32), answers)


class Noise:
    """Random tokens, a random number of them, with weights, and nothing to answer."""

    def draw(self, rng, length):
        length = int(rng.integers(max(1, length // 2), length + 1))
        tokens = rng.integers(VOCAB, size=length + 1).astype(np.int32)
        weights = rng.integers(3, size=length).astype(np.float32)
        return Sample(tokens, weights, np.zeros(length, bool))


SOURCES = {"count": Count(), "noise": Noise()}


def config(*changes, **sections):
    """`BASE` with whole sections replaced, then `key=value` changes."""
    return config_files.parse(yaml.safe_dump(BASE | sections), "test", changes)


def decoder(**overrides):
    from tiny import tiny_config

    from models.llama.model import LlamaDecoder

    sizes = {"vocab_size": VOCAB, "width": 16, "num_q_heads": 2, "num_kv_heads": 1}
    sizes |= {"mlp_width": 24, "num_layers": 1, "context": 64}
    return LlamaDecoder(tiny_config(**(sizes | overrides)))


def attention(rope, *, alpha=1.0, segments=None, positions=None):
    """Softmax over every pair that may see each other: compiles in a fraction of the
    time of the library's, and is an oracle for it.
    """
    import jax
    import jax.numpy as jnp

    if alpha != 1.0:
        raise ValueError(f"{alpha=} must be 1.")

    def attend(layer, q, k, v):
        del layer
        batch, num_q_heads, length, size = q.shape
        where = positions
        if where is None:
            where = jnp.broadcast_to(
                jnp.arange(length, dtype=jnp.int32), (batch, length)
            )
        seen = jnp.tril(jnp.ones((length, length), bool))[None]
        if segments is not None:
            seen &= segments[:, :, None] == segments[:, None, :]
        q, k = rope(q, where), rope(k, where)
        k, v = (jnp.repeat(x, num_q_heads // x.shape[1], axis=1) for x in (k, v))
        scores = jnp.einsum("bhtd,bhsd->bhts", q, k).astype(jnp.float32) * size**-0.5
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), -1)
        return jnp.einsum("bhts,bhsd->bhtd", weights.astype(v.dtype), v)

    return attend


def save(params, folder):
    """All weights as one file of bytes."""
    import jax

    folder.mkdir()
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    (folder / "weights").write_bytes(b"".join(leaves))


def train(out, settings, **options):
    from kvjax.training import loop

    model = options.pop("decoder", decoder())
    defaults = {"init": lambda shardings: model.init(0), "sources": SOURCES}
    return loop.train(model, settings, out, save=save, **(defaults | options))


def main():
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ["TOYS_CACHE"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    from kvjax.training import step

    step.causal_attention = attention
    out, file, *flags = sys.argv[1:]
    settings = config_files.load(file)
    if "TOYS_LIMIT" in os.environ:
        import resource

        limit = int(os.environ["TOYS_LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        result = train(pathlib.Path(out), settings, resume="--resume" in flags)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}")
        return 2
    return 0 if result.finished else 1


if __name__ == "__main__":
    sys.exit(main())
