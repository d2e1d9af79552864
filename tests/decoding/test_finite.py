"""Logits that are no numbers end in one error, wherever a model is asked for them."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL, TEXT, tiny_model

from kvjax import registry
from kvjax.decoding import endless, finite, generate, saved_prompt, scoring
from kvjax.decoding.finite import NotFiniteError
from kvjax.decoding.sampling import Sampling
from kvjax.evaluation import compare, compare_inputs, heads, one_task
from kvjax.stores import buffers

FULL = registry.parse("full")
RING = registry.parse("streaming_llm", **SMALL)
TOKENS = list(TEXT[:70].encode())


@pytest.fixture(autouse=True)
def poison_of_float16(monkeypatch):
    """1e30 is beyond it."""
    monkeypatch.setattr(buffers, "fill_value", 6e4)


def overflowing(dtype="float16", num_layers=1):
    """Its first layer adds numbers beyond float16's largest, 65,504."""
    model = tiny_model(num_layers=num_layers, dtype=dtype)
    for part in ("up", "down"):
        model.params["layers"][0]["mlp"][part]["kernel"] *= 2000
    return model


def broken_after(token: int):
    """A model that fails once it is fed `token`: its embedding is not finite."""
    model = tiny_model(num_layers=1)
    embedding = model.params["embedding"].at[token].set(jnp.inf)
    return model._replace(params=model.params | {"embedding": embedding})


def all_of(generator):
    try:
        while True:
            next(generator)
    except StopIteration as end:
        return end.value


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, -1e38, 3.0], True),
        ([0.0, -jnp.inf, 3.0], True),  # a token that the model excludes
        ([0.0, jnp.inf, 3.0], False),
        ([0.0, jnp.nan, 3.0], False),
        ([-jnp.inf, -jnp.inf, -jnp.inf], False),
    ],
)
def test_what_can_be_chosen_from(logits, expected):
    logits = jnp.array([logits], jnp.float32)
    assert finite.is_finite(logits).tolist() == [expected]
    found = finite.log_prob(logits, jnp.array([0]))
    assert bool(jnp.isnan(found[0])) != expected


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=5, min_p=0.1)])
def test_an_overflow_is_an_error_that_names_the_dtype(sampling):
    message = "not finite at token 1 of row 0 in float16.*--dtype bfloat16"
    with pytest.raises(NotFiniteError, match=message):
        generate.generate(
            overflowing(), FULL, [TOKENS], max_new_tokens=4, sampling=sampling
        )
    fine = generate.generate(
        overflowing("bfloat16"), FULL, [TOKENS], max_new_tokens=4, sampling=sampling
    )
    assert fine[0].tokens


def test_filters_that_leave_one_token_are_no_overflow():
    """They make every other logit -inf, after the check."""
    sampling = Sampling(1.0, top_k=1, top_p=1e-9, min_p=1.0)
    (done,) = generate.generate(
        tiny_model(num_layers=1),
        FULL,
        [TOKENS],
        max_new_tokens=5,
        sampling=sampling,
        eos_ids=(),
    )
    assert len(done.tokens) == 5


@pytest.mark.parametrize("stream_every", [1, 3, 16])
def test_what_came_before_is_given_out_and_the_token_is_named(stream_every):
    options = {"max_new_tokens": 12, "eos_ids": (), "stream_every": stream_every}
    (said,) = generate.generate(tiny_model(num_layers=1), FULL, [TOKENS], **options)
    place = next(i for i in range(3, 12) if said.tokens[i] not in said.tokens[:i])
    model = broken_after(said.tokens[place])
    pieces = []

    def keep(row, text):
        assert row == 0
        pieces.append(text)

    with pytest.raises(NotFiniteError, match=f"at token {place + 2} of row 0 in float"):
        generate.generate(
            model,
            FULL,
            [TOKENS],
            **options,
            on_text=keep,
        )
    given = "".join(pieces)
    assert given.startswith(model.tokenizer.decode(said.tokens[:place]))
    # A row that has ended is not asked any more.
    stopped = generate.generate(
        model, FULL, [TOKENS], **options | {"eos_ids": (said.tokens[place],)}
    )
    assert stopped[0].finish_reason == "eos"


@pytest.mark.parametrize("prompt_scores", [True, False])
def test_scores(prompt_scores):
    with pytest.raises(NotFiniteError, match=r"not finite .*tokens.* in float16"):
        scoring.score(
            overflowing(), FULL, [TOKENS], prefill=40, prompt_scores=prompt_scores
        )


def test_endless_text():
    texts = endless.read(overflowing(), RING, [TEXT[:50], TEXT[50:90]], chunk_size=16)
    with pytest.raises(NotFiniteError, match="in tokens 1 to 16 in float16"):
        all_of(texts)


def test_a_prefix_that_is_no_use_is_not_made():
    with pytest.raises(NotFiniteError, match="after the prompt in float16"):
        saved_prompt.read(overflowing(), FULL, [TOKENS], room=4)


@pytest.mark.parametrize("task", ["passkey", "perplexity", "fidelity"])
def test_evaluations(task):
    with pytest.raises(NotFiniteError, match="float16"):
        one_task.run(
            task,
            overflowing(),
            RING,
            FULL,
            TEXT,
            context=100,
            n=2,
            new_tokens=8,
            batch=2,
        )


def test_what_heads_do():
    model = overflowing(num_layers=2)
    with pytest.raises(NotFiniteError, match="in row 0 in float16"):
        heads.inspect(model, TEXT, context=100, windows=1, prompts=1)


def test_a_comparison_names_the_method():
    model = tiny_model(num_layers=1)
    settings = compare_inputs.Settings(
        context=330, new_tokens=64, examples=2, windows=2, batch=2, depths=(0.5,)
    )
    inputs = compare_inputs.make_inputs(model, TEXT, settings)

    def broken_step(state, q):
        state, out, found = FULL.inspect_step(state, q)
        return state, out * jnp.nan, found

    methods = {"full": FULL, "bad": FULL._replace(inspect_step=broken_step)}
    with pytest.raises(NotFiniteError, match=r"^bad: logits are not finite at token 2"):
        compare.compare(model, methods, inputs, settings, known=("full",))


def test_perplexities_beyond_float64_are_infinite():
    assert endless.Progress(3, 2, 2, 2000.0).perplexity == float("inf")
    assert endless.Progress(3, 2, 2, 2.0).perplexity == pytest.approx(np.e)
