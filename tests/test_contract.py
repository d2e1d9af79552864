"""What every method promises, over the registry: to register is to be tested.

The promises are the checks of :mod:`kvjax.testing`, which methods of others are put to
as well. Every buffer starts poisoned (`conftest.py`).
"""

import dataclasses
import functools
import itertools

import drive
import jax.numpy as jnp
import pytest

import kvjax
from kvjax import registry
from kvjax.interface import Method, Traffic
from kvjax.testing import ContractError, check_method, contract, subject

NAMES = (*registry.names(), *registry.transforms())
# Options under which a method is another one, as far as its promises go.
SPELLED = {"subgen:mode=stream": {"mode": "stream"}}
REREADING = "a_second_reading_changes_only_what_it_learns"
TOLD = "an_instruction_votes_and_is_forgotten"
HANDING = "what_a_layer_hands_up_has_one_shape"
DRAFTED = "what_was_drafted_leaves_no_trace"
SHARED = "devices_share_rows_and_heads"
EXACT = "is_full_attention_when_the_budget_covers_the_context"
# Those that need small options of their own: sinks, a window, and pages to search for;
# clusters of a few tokens.
OWN = {"hip": {"budget": 16}, "squeezed": {"clusters": 0.3}}


@functools.cache
def subject_of(name: str) -> subject.Subject:
    options = SPELLED.get(name, {}) | OWN.get(name, {})
    return subject.Subject(registry.get(name.partition(":")[0]), **options)


# All checks of a method follow each other: they share its programs.
@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name", [*NAMES, *SPELLED])
def test_every_method_keeps_the_contract(check, name):
    """None is left out here but those of what few have, or a lossy one lacks."""
    given = subject_of(name)
    is_idle = check == REREADING and given.method.reread is None
    is_idle |= check == TOLD and given.method.hooks.asked is None
    is_idle |= check == HANDING and given.method.hooks.prefill_after is None
    is_idle |= check == EXACT and given.method.lossy
    is_idle |= check == DRAFTED and given.method.rows > 1
    is_idle |= check == SHARED and name == "offload"
    assert contract.keeps(given, check) != is_idle


@pytest.mark.parametrize("name", NAMES)
def test_only_retro_revises(name):
    rows = subject.SMALL["window"] if name == "retro" else 1
    assert subject_of(name).method.rows == rows


@pytest.mark.parametrize("name", registry.names())
def test_a_method_made_for_another_attention_says_so(name):
    """Before it returns something else; and `full` takes every model."""
    stream = drive.make_stream((1, 5), 1)
    method, alpha = subject_of(name).method, subject_of(name).alpha
    fitting = drive.make_spec(stream, layer=subject.LAYER, alpha=alpha)
    other = dataclasses.replace(fitting, alpha=1.5 if alpha == 1 else 1.0)
    method.init(fitting)
    assert name in registry.names(alpha)
    if name == "full":
        assert name in registry.names(other.alpha)
        return
    message = {
        "entmax_full": "entmax_full with alpha=None takes the model's alpha, .* is 1.0",
        "entmaxkv": "entmaxkv approximates entmax .* softmax .alpha=1.0.; use quest",
    }.get(name, f"{name} approximates softmax .* entmax with alpha=1.5; use entmaxkv")
    wrapped = kvjax.dense_layers(method, registry.parse("full"))
    for one in (method, wrapped):
        with pytest.raises(ValueError, match=message):
            one.init(other)
    assert name not in registry.names(other.alpha)


# --- the checks as others use them


def quest(budget: int, page_size: int) -> Method:
    return registry.get("quest")(budget=budget, page_size=page_size)


def inspecting(change):
    """A factory of Quest with what a step returns changed."""

    def factory(*, budget: int = 8, page_size: int = 4) -> Method:
        right = quest(budget, page_size)

        def inspect_step(state, q):
            return change(*right.inspect_step(state, q))

        return right._replace(inspect_step=inspect_step)

    factory.__name__ = change.__name__
    return factory


@inspecting
def misreports(state, out, diagnostics):
    moved = diagnostics.attended.at[..., -1].add(1)
    return state, out, diagnostics._replace(attended=moved)


@inspecting
def boasts(state, out, diagnostics):
    return state, out, diagnostics._replace(exact=jnp.ones_like(diagnostics.exact))


@inspecting
def looks_aside(state, out, diagnostics):
    return state, out + 0.01 * out.mean(0), diagnostics


@inspecting
def looks_at_all_heads(state, out, diagnostics):
    return state, out + 0.01 * out.mean(1, keepdims=True), diagnostics


@inspecting
def rounds(state, out, diagnostics):
    return state, out.astype(jnp.bfloat16), diagnostics


@inspecting
def forgets_lists(state, out, diagnostics):
    one = jnp.tile(diagnostics.attended, (1, 3, 1))
    return state, out, diagnostics._replace(attended=one)


def bytes_are_text(*, budget: int = 8, page_size: int = 4) -> Method:
    right = quest(budget, page_size)
    return right._replace(traffic=lambda spec, length: Traffic("many", 0))


def rereading(change):
    """A factory of KVzip with what the second reading leaves changed."""

    def factory(*, budget: int = 8, chunk: int = 4) -> Method:
        right = registry.get("kvzip")(budget=budget, chunk=chunk)

        def prefill(state, q, k, v, lengths):
            state, out = right.reread.prefill(state, q, k, v, lengths)
            return change(state, lengths), out

        return right._replace(reread=right.reread._replace(prefill=prefill))

    return factory


@rereading
def forgets_the_prompt(state, lengths):
    wiped = jnp.where((lengths > 0)[:, None, None, None], 0.0, state.store.v)
    return state._replace(store=state.store._replace(v=wiped))


@rereading
def learns_from_nothing(state, lengths):
    raised = jnp.where((lengths == 0)[:, None, None], 1.0, state.scores)
    return state._replace(scores=raised)


@rereading
def learns_from_all_rows(state, lengths):
    slots = jnp.arange(state.scores.shape[2], dtype=jnp.float32)
    drawn = jnp.sin(slots * lengths.sum().astype(jnp.float32))
    return state._replace(scores=jnp.broadcast_to(drawn, state.scores.shape))


def told(name, change):
    """A factory of CItruS with one of its hooks changed."""

    def factory(*, budget: int = 8, stride: int = 4, instruction: int = 2) -> Method:
        right = registry.get("citrus")
        method = right(budget=budget, stride=stride, instruction=instruction)
        asked = method.hooks.asked
        new = functools.partial(change, getattr(asked, name))
        asked = asked._replace(**{name: new})
        return method._replace(hooks=method.hooks._replace(asked=asked))

    factory.__name__ = change.__name__
    return factory


def remembers(right, state, q, k, v, lengths):
    state, out = right(state, q, k, v, lengths)
    return state._replace(length=state.length + lengths), out


def votes_of_all(right, state, q, k, v, lengths):
    state, out = right(state, q, k, v, lengths)
    return state._replace(votes=state.votes + lengths.sum().astype(jnp.float32)), out


def cuts_again(right, state):
    state = right(state)
    return state._replace(votes=state.votes + 1)


def keeps_its_shape(right, state):
    del right
    return state


def lies_about_prompts(*, budget: int = 8, page_size: int = 4) -> Method:
    return quest(budget, page_size)._replace(exact_prompt=False)


def renamed(*, budget: int = 8, page_size: int = 4) -> Method:
    right = quest(budget, page_size)
    return right._replace(inspect_step=lambda cache, q: right.inspect_step(cache, q))


def counts_all(*, budget: int = 8, page_size: int = 4) -> Method:
    """Its state knows how much the rows hold together."""
    right = quest(budget, page_size)

    def finish(state):
        return state, state.length.sum(keepdims=True)

    def append(state, k, v):
        return right.append(state[0], k, v), state[1]

    def inspect_step(state, q):
        own, out, diagnostics = right.inspect_step(state[0], q)
        return (own, state[1]), out + 1e-3 * state[1].astype(out.dtype), diagnostics

    return right._replace(finish=finish, append=append, inspect_step=inspect_step)


def remembers_in_common(*, budget: int = 8, page_size: int = 4) -> Method:
    """Its state counts the steps, of all rows at once."""
    right = quest(budget, page_size)

    def finish(state):
        return state, jnp.zeros(1)

    def append(state, k, v):
        return right.append(state[0], k, v), state[1] + 1

    def inspect_step(state, q):
        own, out, diagnostics = right.inspect_step(state[0], q)
        return (own, state[1]), out + 1e-3 * state[1].astype(out.dtype), diagnostics

    return right._replace(
        finish=finish, append=append, inspect_step=inspect_step, rewind=None
    )


def takes_too_little_back(*, budget: int = 8, page_size: int = 4) -> Method:
    right = quest(budget, page_size)

    def rewind(state, count, most):
        return right.rewind(state, jnp.minimum(count, 2), most)

    return right._replace(rewind=rewind)


def forgets_its_shapes(*, budget: int = 8, page_size: int = 4) -> Method:
    """Another structure each time that a prompt ends."""
    right, times = quest(budget, page_size), itertools.count()

    def finish(state):
        return {str(next(times)): state}

    def append(state, k, v):
        ((name, own),) = state.items()
        return {name: right.append(own, k, v)}

    def inspect_step(state, q):
        ((name, own),) = state.items()
        own, out, diagnostics = right.inspect_step(own, q)
        return {name: own}, out, diagnostics

    return right._replace(finish=finish, append=append, inspect_step=inspect_step)


def idle(*, how_many: int = 4096) -> Method:
    return registry.get("streaming_llm")(budget=how_many)


@pytest.mark.parametrize(
    ("factory", "check", "message"),
    [
        (idle, "has_small_options", "how_many=4096 is too large to try"),
        (renamed, "arguments_have_the_same_names_everywhere", "inspect_step takes"),
        (bytes_are_text, "arguments_have_the_same_names_everywhere", "whole numbers"),
        (rounds, "a_step_leaves_the_state_as_it_was", "bfloat16"),
        (forgets_lists, "a_step_leaves_the_state_as_it_was", "attended has shape"),
        (misreports, "output_is_attention_over_what_was_attended", "row ., step ."),
        (boasts, "output_is_attention_over_what_was_attended", "off by"),
        (lies_about_prompts, "a_prompt_is_exact_where_the_method_says_so", "are off"),
        (forgets_the_prompt, REREADING, "the prompt's keys and values: changed"),
        (learns_from_nothing, REREADING, "row 0, which has no tokens: changed"),
        (learns_from_all_rows, "rows_do_not_see_each_other", "a row that stayed"),
        (told("probe", remembers), TOLD, "what was shown once: changed"),
        (told("probe", votes_of_all), TOLD, "row 1, which has none: changed"),
        (told("close", cuts_again), TOLD, "a context that was closed: changed"),
        (told("settle", keeps_its_shape), TOLD, "settle leaves another state"),
        (looks_aside, "rows_do_not_see_each_other", "a row that stayed"),
        (looks_at_all_heads, SHARED, "step 0 over data=2,tens"),
        (counts_all, "a_prompt_that_ended_serves_many_questions", "outputs"),
        (remembers_in_common, DRAFTED, "of shape .1,. changes with steps"),
        (takes_too_little_back, DRAFTED, "outputs of step 0, rewound"),
        (forgets_its_shapes, "a_prompt_that_ended_is_kept_as_arrays", "what finish"),
    ],
)
def test_a_fault_is_named(factory, check, message):
    pattern = f"(?s){factory.__name__} breaks '{check}': .*{message}"
    with pytest.raises(ContractError, match=pattern):
        contract.keeps(subject.Subject(factory), check)


def test_the_first_check_that_fails_ends_it():
    with pytest.raises(AssertionError, match="idle breaks 'has_small_options'"):
        check_method(idle)


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_option_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="tova has no option bugdet; known: budget"):
        check_method(kvjax.tova, bugdet=4)
    with pytest.raises(TypeError, match="3 is no factory, but of type int; give a fun"):
        check_method(3)
