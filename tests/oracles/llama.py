"""A Llama in float64, from the tensors of a checkpoint, in plain loops over rows."""

import numpy as np


def logits(tensors, config, tokens, factors=None):
    """Logits `(T, V)` of a softmax model without rope scaling.

    Args:
        tensors: by the names of the Hugging Face layout, matrices outputs first.
        config: keys of `config.json`.
        factors: {module: (down, up, scale)}, whose product is added to the module's:
            the matrices are never summed.
    """
    wide = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    head = config["hidden_size"] // config["num_attention_heads"]
    groups = config["num_attention_heads"] // config["num_key_value_heads"]

    def norm(x, name):
        size = np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / size * wide[f"{name}.weight"]

    def linear(x, name):
        out = x @ wide[f"{name}.weight"].T
        if name in (factors or {}):
            down, up, scale = factors[name]
            out = out + scale * (
                (x @ down.T.astype(np.float64)) @ up.T.astype(np.float64)
            )
        return out

    def turned(x):  # (T, heads, D): element i with i + D / 2
        half = head // 2
        angles = np.outer(
            np.arange(len(x)), config["rope_theta"] ** (-np.arange(half) / half)
        )[:, None]
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate(
            [first * cos - second * sin, second * cos + first * sin], -1
        )

    x = wide["model.embed_tokens.weight"][tokens]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        inner = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            linear(inner, f"{layer}.self_attn.{part}_proj").reshape(len(x), -1, head)
            for part in "qkv"
        )
        q, k = turned(q), turned(k)
        out = np.empty_like(q)
        for row in range(len(x)):
            for number in range(config["num_attention_heads"]):
                scores = k[: row + 1, number // groups] @ q[row, number] / head**0.5
                weights = np.exp(scores - scores.max())
                seen = v[: row + 1, number // groups]
                out[row, number] = weights / weights.sum() @ seen
        x = x + linear(out.reshape(len(x), -1), f"{layer}.self_attn.o_proj")
        inner = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(inner, f"{layer}.mlp.gate_proj")
        up = linear(inner, f"{layer}.mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{layer}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")
