# %% [markdown]
# # kvjax in five minutes
#
# To decode one token a model reads its whole KV cache: at 100,000 tokens that traffic
# is the cost. Methods that read less differ in what they lose. Here SmolLM2 of 135M
# parameters decodes under several of them, or, where it cannot be fetched, a small
# Llama that ships with the package.

# %%
import models
from kvjax.decoding.generate import generate
from models import embedded, published

NAME = "smollm2"
try:
    published.fetch(NAME)  # once: 93 MB, Apache-2.0
except (OSError, ImportError) as error:
    NAME = embedded.DEFAULT
    print(f"{error}\nGoing on with {NAME}.")
model = models.load(NAME)  # or a Hugging Face folder, a GGUF file, or a hub id
method = kvjax.parse("quest:budget=128,page_size=16")  # or kvjax.quest(budget=128)
text = embedded.heldout_text()

# Prompts of one batch may differ in length; a row never depends on its neighbours.
prompts = [model.tokenizer.encode(text[:end]) for end in (2000, 500)]
results = generate(model, method, prompts, max_new_tokens=32)
for result in results:
    print(repr(result.text), result.finish_reason)

# %% [markdown]
# ## What a token costs
#
# Bytes of cache that one decode step of this model reads and holds when 8,192 tokens
# are cached, metadata included: one accounting for all methods, from shapes alone.

# %%
from kvjax import accounting, registry
from kvjax.report import table

print(f"{'method':<15}{'read per token':>16}{'held':>12}")
for name in registry.names(alpha=model.decoder.alpha):
    costs = kvjax.parse(name, budget=256)
    read = accounting.bytes_read(costs, model.decoder, 8192)
    held = accounting.bytes_held(costs, model.decoder, 8192, 0)
    print(f"{name:<15}{table.format_bytes(read):>16}{table.format_bytes(held):>12}")

# %% [markdown]
# ## What each method keeps
#
# A column is a token of the text, a line a moment while it is read. What is dark is
# attended to then, by one head of the last layer: a window that slides behind four
# sinks, a cascade whose older tokens stand ever further apart, and pages chosen for the
# newest query. The model is the small one that ships with kvjax: its few layers compile
# in seconds.

# %%
from kvjax.report.figures import kept

small = models.load(embedded.DEFAULT)
kept.of_methods(
    small,
    {
        "streaming_llm": kvjax.streaming_llm(budget=64),
        "cascade": kvjax.cascade(budget=64),
        "quest": kvjax.quest(budget=64, page_size=8),
    },
    small.tokenizer.encode(text)[:256],
    every=32,
)

# %% [markdown]
# ## Read once, go on often
#
# What a prompt leaves in the caches can be kept on disk, and decoding goes on from
# there bit for bit, on another day if you like. More of the prompt may follow.

# %%
import tempfile

from kvjax.decoding import saved_prompt

name = registry.canonical("quest:budget=128,page_size=16")
with tempfile.TemporaryDirectory() as folder:
    read = saved_prompt.read(model, method, prompts, room=32)
    saved_prompt.save(f"{folder}/read", model, read, method_name=name)
    again = saved_prompt.restore(f"{folder}/read", model, method, method_name=name)

assert saved_prompt.generate(model, method, again) == results
print("the same", sum(len(result.tokens) for result in results), "tokens")

# %% [markdown]
# On the command line: `kvjax compare` puts every method side by side, `kvjax plan`
# says what fits your device, `kvjax prefill --save` and `kvjax generate --resume` do
# the last cell's work. `kvjax --help` lists the rest.
