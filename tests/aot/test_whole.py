"""The decode loop of an 8B model at 128K fits one v5e, weights and cache quantised."""

import re

import jax
import pytest
from aot import tpu, whole

pytest.importorskip("libtpu", reason=tpu.REASON)

LAYERS = 32
ROOM = 15.75e9  # bytes; the compiler refuses what is above 15.75 * 2**30
# Beside logits, and of `full` those of a layer's attention: 17 MB. A layer's codes are
# 134 MB or more, all weights of a layer 136, its scales laid out otherwise 67.
TEMPORARIES = 20e6
# Of all scales of pages, laid out anew. Those of one layer or two are in the memory on
# chip, which does not count.
COPY = re.compile(rf"u16\[1,8,{whole.CONTEXT // 128},128,\d+\]\S* copy\(")


@pytest.fixture(autouse=True)
def optimised():
    """The suite compiles without optimisations; here they are the subject."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# All of pages, and of slots those whose rows have one scale: others are alike.
@pytest.mark.parametrize("spec", [whole.CASES[1], *whole.CASES[3:]])
def test_nothing_is_copied_and_all_layers_fit(spec):
    """Of one layer nothing but logits is beside it, so that 32 take what they hold."""
    held = whole.held(spec, LAYERS)
    program = whole.compiled(spec, 1)
    memory = whole.measured(program)
    assert not COPY.findall(program.as_text())
    assert memory.temporaries < TEMPORARIES
    own = whole.held(spec, 1)
    # The compiler pads what is narrower than its tiles: by little.
    assert own <= memory.arguments < own + 8e6
    # Every state is written where it was.
    assert memory.outputs - memory.aliases < 1e4
    # If each further layer brought temporaries of its own, as the first.
    layer = (held - own) / (LAYERS - 1)
    assert layer == pytest.approx(whole.held(spec, 2) - own, rel=1e-3)
    assert memory.total + (LAYERS - 1) * (layer + TEMPORARIES) < ROOM
