"""Writes goldens/smollm2.npz: what transformers computes with SmolLM2-135M-Instruct.

The tokens are those of a tokenizer that is put together here, because transformers
splits numbers of this model's files otherwise than the model was trained to. Run from
the repository root, with torch and transformers installed:

    python tests/models/smollm2_reference.py $(kvjax fetch smollm2)
"""

import sys
from pathlib import Path

import numpy as np

from kvjax import files

GOLDENS = Path(__file__).parent / "goldens" / "smollm2.npz"
TEXT = (
    "The lighthouse of Ar-Men was built between 1867 and 1881 on a rock that the sea\n"
    "leaves bare for a few hours a year. In the first season the workers landed seven\n"
    "times and could stay for eight hours in all; they bored fifteen holes. The lamp,\n"
    "33.5 metres above high water, was lit on 31 August 1881.\n"
)
CHAT = [
    {"role": "user", "content": "Name three planets, and say what 12 * 12 is."},
    {"role": "assistant", "content": "Mercury, Venus and Mars. 144."},
    {"role": "user", "content": "Now tell me a story about one of the planets."},
]
NUM_TOKENS = 300  # whose log-probabilities are kept
NUM_GENERATED = 100
POSITIONS = range(9, NUM_TOKENS - 1, 18)  # where the likeliest tokens are kept too
LIKELIEST = 5


def passage() -> str:
    """The text that is scored: prose, a list of numbers, and a function."""
    table = "".join(f"{i}\t{i * i * 7919 % 1000:03d}  {i / 7:.4f}\n" for i in range(16))
    code = (
        "def median(values):\n"
        '    """The middle of the sorted values."""\n'
        "    ordered = sorted(values)\n"
        "    half = len(ordered) // 2\n"
        "    if len(ordered) % 2:\n"
        "        return ordered[half]\n"
        "    return (ordered[half - 1] + ordered[half]) / 2\n"
    )
    return f"{TEXT}\n{table}\n{code}"


def tokenizer(file: Path):
    """The file's tokenizer, of its metadata: digits one by one, then GPT-2's pattern.

    Says nothing of tokens that are no control tokens, and needs neither kvjax nor
    transformers.
    """
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    fields = gguf.GGUFReader(file).fields
    tokens, merges, kinds = (
        fields[f"tokenizer.ggml.{key}"].contents()
        for key in ("tokens", "merges", "token_type")
    )
    made = Tokenizer(
        BPE(
            {token: index for index, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in merges],
        )
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    return made


def main():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(sys.argv[1])
    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    ours = tokenizer(file)
    tokens = np.array(ours.encode(passage()).ids[:NUM_TOKENS], np.int64)
    assert len(tokens) == NUM_TOKENS

    chat = AutoTokenizer.from_pretrained(file.parent, **options).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    prompt = ours.encode(chat).ids
    with torch.no_grad():
        logits = model(torch.tensor(tokens[None])).logits[0]
        log_probs = torch.log_softmax(logits, -1).numpy()
        generated, margins = list(prompt), []
        out = model(torch.tensor([prompt]), use_cache=True)
        for _ in range(NUM_GENERATED):
            best = torch.topk(out.logits[0, -1], 2)
            margins.append(float(best.values[0] - best.values[1]))
            generated.append(int(best.indices[0]))
            out = model(
                torch.tensor([generated[-1:]]),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
    generated = generated[len(prompt) :]
    at = np.array(POSITIONS)
    likeliest = np.argsort(-log_probs[at], axis=1)[:, :LIKELIEST]
    arrays = {
        "tokens": tokens.astype(np.int32),
        "log_probs": log_probs[np.arange(NUM_TOKENS - 1), tokens[1:]],
        "positions": at.astype(np.int32),
        "likeliest": likeliest.astype(np.int32),
        "likeliest_log_probs": np.take_along_axis(log_probs[at], likeliest, 1),
        "chat": np.array(chat),
        "generated": np.array(generated, np.int32),
    }
    files.save_npz(GOLDENS, arrays)
    print(chat)
    print(ours.decode(generated))
    print("smallest margin of a greedy choice", min(margins))
    print("eos at", [i for i, t in enumerate(generated) if t in (0, 2)])
    print(f"{GOLDENS.name}: {GOLDENS.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
