"""What a generation's seconds are made of. No duration is asserted: clocks are ours."""

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_model

from kvjax.decoding import timing
from kvjax.decoding.generate import generate

MODEL = tiny_model(num_layers=1)
PROMPT = list(range(40))


@pytest.fixture
def ticking(monkeypatch):
    """Time stands still but for what a test adds to it."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_compiling_is_no_part_of_the_work(ticking):
    with timing.timed() as clock:
        with timing.stretch("prompt") as part:
            ticking[0] = 10.0
            clock.compilations += [(2.0, 7.0), (3.0, 4.0), (6.0, 8.0)]  # 2 to 8
            part.tokens = 12
        ticking[0] = 11.0
        with timing.stretch("decode") as part:
            ticking[0] = 13.0
            part.tokens = 8
    found = timing.document(clock)
    assert found["prompt_seconds"] == 4.0
    assert found["prompt_tokens_per_second"] == 3.0
    assert found["decode_seconds"] == 2.0
    assert found["decode_tokens_per_second"] == 4.0
    assert found["compile_seconds"] == 6.0
    assert timing.line(clock) == (
        "prompt 12 tokens in 4.00 s (3.0 tokens/s), decode 8 tokens in 2.00 s "
        "(4.0 tokens/s), compiling 6.00 s"
    )


def test_nothing_decoded_has_no_rate(ticking):
    del ticking
    with timing.timed() as clock:
        pass
    assert timing.document(clock)["decode_tokens_per_second"] is None
    assert "decode 0 tokens, compiling" in timing.line(clock)


def test_jax_says_what_it_compiles():
    @jax.jit
    def inner(x):
        return jnp.sin(x) * 2

    @jax.jit
    def fresh(x):
        return inner(x).sum()

    x = jnp.ones(3)
    with timing.timed() as clock:
        fresh(x).block_until_ready()
        first = clock.compiled(0.0)
        fresh(x).block_until_ready()
    assert 0 < first == clock.compiled(0.0)


def test_tokens_that_no_row_took_are_not_counted():
    """Those behind a stop string in its block, and those of rows that have ended."""
    options = {"max_new_tokens": 20, "eos_ids": ()}
    prompts = [PROMPT, PROMPT[::-1]]
    whole = generate(MODEL, "full", prompts, **options)
    with timing.timed() as clock:
        found = generate(MODEL, "full", prompts, **options, stop=[whole[0].text[3:5]])
    assert found[0].finish_reason == "stop"
    taken = sum(len(row.tokens) for row in found)
    assert clock.total("decode").tokens == taken - len(prompts) < 2 * 19


def test_every_token_is_in_a_stretch():
    with timing.timed() as clock:
        (found,) = generate(MODEL, "full", [PROMPT], max_new_tokens=20, eos_ids=())
    assert clock.total("prompt").tokens == len(PROMPT)
    # The first comes of the prompt itself.
    assert clock.total("decode").tokens == len(found.tokens) - 1 == 19
    blocks = [part.tokens for part in clock.stretches if part.kind == "decode"]
    assert blocks == [16, 3]
    expected = generate(MODEL, "full", [PROMPT], max_new_tokens=20, eos_ids=())
    assert expected == [found]
    assert len(clock.stretches) == 4  # nothing is timed unless somebody asks
