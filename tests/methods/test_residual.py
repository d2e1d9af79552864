"""`quantize:residual=N`: the newest N tokens as they came, others quantised."""

import functools

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantiser

import kvjax
from kvjax import accounting, registry
from kvjax.interface import Method
from kvjax.methods.full import full
from kvjax.methods.quantize import quantize
from kvjax.testing import contract, subject
from kvjax.testing.oracle import softmax_attention
from pallas_kernels.shared.quantized import SPARE, WithNewest

# Fewer tokens than the residual, and more than all that is held of it.
PROMPTS, STEPS, SIZE, RESIDUAL = (1, 5, 40, 21), 26, 8, 5


def unrotated(x, positions, length=None):
    """A model without positions: what is cached is what came."""
    del positions, length
    return x


def parsed(spec):
    return registry.parse(spec, **subject.SMALL)


@functools.cache
def inputs():
    stream = drive.make_stream(PROMPTS, STEPS, head_dim=SIZE)
    return stream, drive.make_spec(stream, rope=unrotated, layer=7)


def stored(x):
    """Numbers as 4 bits of one group give them back."""
    return quantiser.read_again(x, 4, SIZE, True)


def beside(spec, residual=RESIDUAL, **options):
    return quantize(parsed(spec), bits=4, residual=residual, **options)


# How tokens are kept and found differs: in order, in pages, by slots, renumbered.
METHODS = (
    "full",
    "quest",
    "quest:per=query",
    "token_select",
    "oracle_topk",
    "snapkv",
    "knorm",
    "h2o",
    "tova",
    "refresh+quest",
)
CHOSEN_BY_CODES = ("quest:per=query", "snapkv")


@pytest.mark.parametrize(
    ("spec", "prompt"),
    [*((spec, "exact") for spec in METHODS), ("full", "quantized")],
)
def test_attends_to_the_newest_as_they_came(spec, prompt):
    """Float64 attention over what is attended to: its newest N as they came, others
    as another quantiser gives them; of a prompt that never was exact none."""
    stream, made = inputs()
    run = drive.run(beside(spec, prompt=prompt), made, stream)
    k, v = stored(stream.k), stored(stream.v)
    attended = run.diagnostics.attended
    newest = 0
    for step, b in np.ndindex(STEPS, len(PROMPTS)):
        last = PROMPTS[b] + step
        first = last + 1 - RESIDUAL
        if prompt == "quantized":
            first = max(first, PROMPTS[b])
        for head in range(4):
            lists = attended.shape[2]
            at = attended[step, b, head * lists // 4]
            at = at[at >= 0]
            is_new = (at >= first)[:, None]
            newest += is_new.sum()
            keys, values = (
                np.where(is_new, came[b, head // 2, at], kept[b, head // 2, at])
                for came, kept in ((stream.k, k), (stream.v, v))
            )
            out, _, _ = softmax_attention(stream.q[b, head, last], keys, values)
            np.testing.assert_allclose(run.out[step, b, head], out, atol=2e-5)
    assert newest > STEPS * len(PROMPTS) * 4  # more than the token itself
    if spec in CHOSEN_BY_CODES:
        without = drive.run(beside(spec, 0, prompt=prompt), made, stream)
        np.testing.assert_array_equal(attended, without.diagnostics.attended)
    assert not run.diagnostics.exact.any()


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        ("quantize:bits=4,residual=80+full", "full"),
        ("quantize:bits=4,residual=80+h2o", "h2o"),
        (
            "retro:window=3+quantize:bits=4,residual=80+quest:budget=96",
            "retro:window=3+quest:budget=96",
        ),
        ("dense_layers+quantize:bits=4,residual=80+h2o", "dense_layers+h2o"),
    ],
)
def test_a_residual_of_everything_is_the_method(spec, plain):
    """Also for one that revises its last tokens, and around transforms of layers."""
    stream, made = inputs()
    run, expected = (drive.run(parsed(one), made, stream) for one in (spec, plain))
    tokens = (np.sort(one.diagnostics.attended) for one in (run, expected))
    np.testing.assert_array_equal(*tokens)
    np.testing.assert_allclose(run.out, expected.out, atol=3e-5)


def over_pages(method: Method, *, residual: int = 3) -> Method:
    return quantize(method, keys=8, values=4, residual=residual)


def over_slots(*, budget: int = 8, window: int = 4) -> Method:
    return quantize(kvjax.snapkv(budget=budget, window=window), residual=3)


# What a ring could break; a prompt is read without one.
CHECKS = (
    "a_step_leaves_the_state_as_it_was",
    "rows_do_not_see_each_other",
    "a_prompt_that_ended_serves_many_questions",
    "a_prompt_that_ended_is_kept_as_arrays",
    "bytes_are_known_before_anything_is_allocated",
    "a_step_writes_in_place",
)


@functools.cache
def subject_of(factory):
    return subject.Subject(factory)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("factory", [over_pages, over_slots])
def test_keeps_the_contract(factory, check):
    assert contract.keeps(subject_of(factory), check)


def started(method, stream, spec, steps):
    """The state after a prompt and `steps` tokens."""
    state, _ = drive.prefill(method, spec, stream)
    state = jax.jit(method.finish)(state)
    given = jax.tree.map(lambda x: x[:steps], drive.step_inputs(stream))
    step = functools.partial(drive.step, method)
    return jax.lax.scan(step, state, given)[0]


@pytest.mark.parametrize("spec", ["full", "quest:budget=96"])
def test_tokens_taken_back_leave_no_trace(spec):
    """Up to as many as the ring has beside the residual: rows go on as without them."""
    stream, made = inputs()
    method = beside(spec)
    count = np.asarray([SPARE, 3, 0, 1], np.int32)
    longer = started(method, stream, made, SPARE + 2)
    state = jax.jit(method.rewind, static_argnums=2)(longer, count, SPARE)
    ring = (state.k if spec == "full" else state.pages).at
    np.testing.assert_array_equal(ring.max(1), state.length - 1)
    given, rows = drive.step_inputs(stream), np.arange(len(PROMPTS))
    step = jax.jit(functools.partial(drive.step, method))
    for i in range(RESIDUAL + 2):
        at = SPARE + 2 - count + i  # what each row would have been given next
        state, (out, _) = step(state, [x[at, rows] for x in given])
        np.testing.assert_array_equal(state.length, PROMPTS + at + 1)
        np.testing.assert_allclose(
            out[:, :, -1], undisturbed(spec)[at, rows], atol=2e-6
        )


@functools.cache
def undisturbed(spec):
    stream, made = inputs()
    return drive.run(beside(spec), made, stream).out


@pytest.mark.parametrize("spec", ["full", "quest:budget=96"])
def test_a_draft_read_at_once_is_read_as_its_steps(spec):
    """Every row of queries has a residual of its own, as when it is the newest."""
    stream, made = inputs()
    method, rows = beside(spec), 6
    state = started(method, stream, made, 3)
    draft = drive.chunk(stream, np.add(PROMPTS, 3), [rows] * len(PROMPTS), size=rows)
    state, out = jax.jit(method.prefill)(state, *draft)
    expected = np.moveaxis(undisturbed(spec)[3 : 3 + rows], 0, 2)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    k = state.k if spec == "full" else state.pages
    assert (np.sort(k.at[2])[-rows:] == np.arange(43, 43 + rows)).all()


def test_bytes_of_the_ring_are_held_and_read():
    stream = drive.make_stream((40,), 1, head_dim=128)
    spec = drive.make_spec(stream, capacity=64, max_new_tokens=8)
    without, heads = quantize(full()), spec.num_kv_heads
    method = quantize(full(), residual=12)
    row, position = 2 * 128 * 4, 4
    for length, newest in ((40, 28), (7, 7)):  # the ring as a whole
        read = method.traffic(spec, length).kv - without.traffic(spec, length).kv
        assert read == newest * heads * row
    more = accounting.state_bytes(method, spec) - accounting.state_bytes(without, spec)
    assert more == (12 + SPARE) * (heads * row + 2 * position)
    state = method.finish(method.init(spec))
    assert isinstance(state.k, WithNewest)
    assert state.k.shape == without.finish(without.init(spec)).k.shape
    assert state.k.residual == 12


def test_retro_notes_the_pages_of_its_lists_alone():
    _, made = inputs()
    notes = [
        parsed(f"retro:window=3+quantize:residual={n}+quest:budget=16")
        .traffic(made, 40)
        .metadata
        for n in (0, 128)
    ]
    assert notes[0] == notes[1]


@pytest.mark.parametrize(
    ("spec", "state"),
    [
        ("streaming_llm", "StreamingState"),
        ("refreshkv", "RefreshKVState"),
        ("squeezed", "SqueezedState"),
        ("topk_completion:charge=none,selector=pages", "CompletionState"),
        ("head_budgets+snapkv", "SharedSlots"),
        ("decode_eviction+snapkv", "Evicting"),
        ("duo+quest", "Duo"),
    ],
)
def test_other_ways_to_keep_tokens_are_refused(spec, state):
    _, made = inputs()
    with pytest.raises(ValueError, match=f"residual=5 .* keeps a {state}: use resid"):
        beside(spec).init(made)


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_cannot_be_is_refused():
    stream, made = inputs()
    with pytest.raises(ValueError, match="residual=-1 must be at least 0"):
        quantize(full(), residual=-1)
    with pytest.raises(ValueError, match=r"residual=2.0 must be of type int"):
        quantize(full(), residual=2.0)
    entmax = drive.make_spec(stream, alpha=1.5)
    with pytest.raises(ValueError, match=r"residual=5 needs softmax .* alpha=1.5"):
        beside("full").init(entmax)
    own_alpha = beside("entmax_full:alpha=1.5")  # over a softmax model
    with pytest.raises(ValueError, match=r"residual=5 needs softmax .* alpha=1.5"):
        own_alpha.init(made)
    with pytest.raises(ValueError, match="with transforms outside"):
        parsed("head_budgets+quantize:prompt=quantized,residual=4+snapkv")
    method = beside("full")
    state = jax.eval_shape(lambda: method.finish(method.init(made)))
    with pytest.raises(ValueError, match=r"most=17 .* residual=5: at most 16 can"):
        method.rewind(state, jnp.zeros(4, jnp.int32), 17)
    assert beside("snapkv").rewind is None
