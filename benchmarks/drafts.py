r"""Drafts that lose nothing, against plain decoding of the same tokens, on a machine.

    python benchmarks/drafts.py --model smollm2 --context 2048 --json F
    python benchmarks/drafts.py --context 4096 --new-tokens 200 --json F

One entry a prompt, draft and length, added to the file as it is measured: a call that
was interrupted is repeated, and what is there is left out. A drafted run stands between
two plain ones, so that what else the machine does slows all three: the ratio is what
counts. Compiling is not in it, and a run that compiled is not timed.
"""

import argparse
import gc
import json
import pathlib

from entries import add

import kvjax
import models
from kvjax import accounting
from kvjax.decoding import timing
from kvjax.decoding.generate import drop_programs, generate
from models import embedded

ROOT = pathlib.Path(__file__).parents[1]
DRAFTS = (
    "lookup",
    "streaming_llm:budget=256",
    "streaming_llm:budget=512",
    "snapkv:budget=256",
    "h2o:budget=256",
    "quest:budget=256",
)


def prompts_of(model, context):
    """Tokens of a text in English and of one in Python, both with more to come."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {
        "text": "\n".join(page.read_text("utf-8") for page in pages),
        "code": embedded.heldout_text(),
    }
    return {name: model.tokenizer.encode(x)[:context] for name, x in texts.items()}


def decoded(model, prompt, new_tokens, **options):
    """A row, and its tokens a second, the prompt and compiling left out."""
    with timing.timed() as clock:
        (row,) = generate(
            model, "full", [prompt], max_new_tokens=new_tokens, eos_ids=(), **options
        )
    return row, timing.document(clock)["decode_tokens_per_second"]


def measured(model, prompt, new_tokens, draft, draft_tokens):
    """The entry of a prompt under a draft, between two plain runs."""
    options = {"draft": draft, "draft_tokens": draft_tokens}
    decoded(model, prompt, new_tokens, **options)  # compiles
    plain, before = decoded(model, prompt, new_tokens)
    row, rate = decoded(model, prompt, new_tokens, **options)
    _, after = decoded(model, prompt, new_tokens)
    pairs = zip(row.tokens, plain.tokens, strict=True)
    middle = len(prompt) + new_tokens // 2
    full = kvjax.parse("full")
    return {
        "tokens_per_second": rate,
        "plain_tokens_per_second": [before, after],
        "times_as_fast": 2 * rate / (before + after),
        "differing_tokens": sum(a != b for a, b in pairs),
        "accepted_per_pass": row.drafts.accepted_per_pass,
        "plain_bytes_per_token": accounting.bytes_read(full, model.decoder, middle),
        **row.drafts._asdict(),
    }


def done(path, key):
    """Says whether the file has an entry with all that the key has."""
    if not path.exists():
        return False
    entries = json.loads(path.read_text("utf-8"))["entries"]
    return any(key.items() <= entry.items() for entry in entries)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--draft", action="append", help="may be repeated")
    parser.add_argument("--draft-tokens", default="6", help="lengths, with commas")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    given = parser.parse_args()
    model = models.load(given.model, dtype="float32")
    prompts = prompts_of(model, given.context)
    for draft in given.draft or DRAFTS:
        for draft_tokens in map(int, given.draft_tokens.split(",")):
            for name, prompt in prompts.items():
                key = {
                    "model": given.model,
                    "context": given.context,
                    "new_tokens": given.new_tokens,
                    "prompt": name,
                    "draft": draft,
                    "draft_tokens": draft_tokens,
                }
                if done(given.json, key):
                    continue
                found = measured(model, prompt, given.new_tokens, draft, draft_tokens)
                add(given.json, key | found)
                print(json.dumps(key | found), flush=True)
        drop_programs()
        gc.collect()


if __name__ == "__main__":
    main()
