"""What people see who also do other JAX work: JAX_ENABLE_X64 changes no token.

Each method's own arrays are the contract's (`test_contract.py`); here is what is around
them, with a method that merges, one that chooses and one that forgets.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL, TEXT, tiny_model

from kvjax import registry
from kvjax.decoding import endless, generate, saved_prompt, scoring, speculative
from kvjax.decoding.sampling import Sampling
from kvjax.evaluation import heads

MODEL = tiny_model(num_layers=1)
ENTMAX = tiny_model(num_layers=1, attention_alpha=1.5)
FULL = registry.parse("full")
SAMPLING = Sampling(0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2)


def both(run):
    """The results without the flag and with it."""
    plain = run()
    with jax.enable_x64(True):
        return plain, run()


@pytest.mark.parametrize("name", ["full", "cascade", "entmaxkv"])
def test_generation(name):
    model = ENTMAX if name == "entmaxkv" else MODEL
    sampling = SAMPLING if name == "full" else Sampling()
    options = {**SMALL, "stride": 16} if name == "cascade" else SMALL
    method = registry.parse(name, **options)
    plain, wide = both(
        lambda: generate.generate(
            model,
            method,
            [TEXT[:50], list(range(9))],
            max_new_tokens=6,
            sampling=sampling,
            eos_ids=(),
            chunk_size=32,
        )
    )
    assert wide == plain


def test_scores_and_prefixes_and_endless_text():
    method = registry.parse("cascade", **SMALL, stride=16)
    tokens = list(TEXT[:70].encode())

    def run():
        scores = scoring.score(MODEL, method, [tokens], prefill=50, return_logits=True)
        one = saved_prompt.read(MODEL, FULL, [tokens[:40]], room=16)
        one = saved_prompt.extend(MODEL, FULL, one, [tokens[40:50]])
        (said,) = saved_prompt.generate(MODEL, FULL, one, max_new_tokens=4, eos_ids=())
        reader = endless.read(MODEL, method, [TEXT[:50], TEXT[50:90]], chunk_size=16)
        nats = [progress.nats for progress in reader]
        return scores.log_probs[0], scores.logits, said.tokens, nats

    for plain, wide in zip(*both(run), strict=True):
        np.testing.assert_allclose(wide, plain, rtol=1e-5, atol=1e-5)


def test_drafts():
    tokens = jnp.array([[5, 6, 7]], jnp.int32)

    def run():
        read = generate.prefill(MODEL, FULL, [[1, 2, 3]], max_new_tokens=8)
        found = speculative.verify(
            MODEL.decoder, FULL, MODEL.params, read.states, tokens
        )
        drafted = generate.generate(
            MODEL,
            FULL,
            [[1, 2, 3]],
            draft="streaming_llm:budget=16",
            draft_tokens=2,
            max_new_tokens=6,
            sampling=SAMPLING,
            eos_ids=(),
        )
        return found.accepted.tolist(), found.next_token.tolist(), drafted

    plain, wide = both(run)
    assert wide == plain


def test_heads():
    def run():
        seen = heads.inspect(MODEL, TEXT, context=100, windows=1, prompts=1)
        return seen.entropy, seen.support, seen.retrieval, seen.needle_mass

    for plain, wide in zip(*both(run), strict=True):
        np.testing.assert_allclose(wide, plain, rtol=1e-5, atol=1e-5)
