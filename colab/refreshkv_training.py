# %% [markdown]
# # Training a model for the cache it will have
#
# RefreshKV decodes most steps from a small cache and refills it now and then with a
# full step. A model that was trained with all of its cache has never seen that.
# Continued pretraining shows it: the end of every row attends as RefreshKV would
# decode it, all steps at once. This notebook does it end to end. At toy size it shows
# that it runs, not what it gains: raise `STEPS`, `LENGTH` and `TOKENS` on an
# accelerator.

# %%
import json
import tempfile

import models
from kvjax.evaluation import one_task
from models import embedded

on_accelerator = jax.default_backend() != "cpu"
STEPS, LENGTH, TOKENS = (200, 1024, 8192) if on_accelerator else (4, 96, 192)
RATE, WARMUP = (1e-3, 10) if on_accelerator else (1e-4, 1)
DECODED, BUDGET, STRIDE = LENGTH // 4, LENGTH // 4, 8

folder = pathlib.Path(tempfile.mkdtemp())
text = embedded.heldout_text()
_ = (folder / "book.txt").write_text(text[: len(text) // 2], encoding="utf-8")
_ = (folder / "config.yaml").write_text(f"""
model: {{checkpoint: embedded-softmax}}
data: {{corpus: {folder}/book.txt, held_out: {folder}/book.txt, threads: 0}}
stages:
  - {{steps: {STEPS}, tokens: {TOKENS}, lengths: {{{LENGTH}: 1}}, mixture: {{text: 1}}}}
refreshkv:
  {{decoded: {DECODED}, budget: {BUDGET}, stride: {STRIDE}, schedule: fixed,
   group_reduce: mean, eviction: exact}}
optimizer: {{lr: {RATE}, warmup: {WARMUP}}}
evaluate: {{every: 0}}
log: {{every: 1, tensorboard: false}}
""")

# %% [markdown]
# The command line does the rest. Killed at any moment, the same command with
# `--resume` goes on bit for bit.

# %%
out = folder / "run"
command = [sys.executable, "-m", "kvjax", "train", "--setting", "refreshkv"]
command += ["--config", folder / "config.yaml", "--out", out]
done = subprocess.run(command, capture_output=True, text=True)
if done.returncode:
    raise RuntimeError(done.stderr[-2000:])

lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
print("loss:", *(f"{line['loss']:.3f}" for line in lines))

# %% [markdown]
# The result is a checkpoint in the Hugging Face layout. Decoded with RefreshKV on the
# other half of the text, before and after:

# %%
method = kvjax.refreshkv(
    budget=BUDGET, stride=STRIDE, schedule="fixed", group_reduce="mean"
)
for name in ("embedded-softmax", out / "model"):
    found = one_task.run(
        "perplexity",
        models.load(name, dtype="float32"),
        method,
        kvjax.full(),
        text[len(text) // 2 :],
        context=LENGTH,
        n=4,
        batch=4,
        new_tokens=DECODED,
    )
    print(f"{pathlib.Path(name).name:<18}perplexity {found['perplexity']['mean']:.2f}")

# %% [markdown]
# Is a gain of the setting, or of the text? The control is the same run without it:
# `kvjax train --config CONFIG --set refreshkv=null --out control`.
