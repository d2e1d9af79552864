"""The promises of every method, as checks that any method can be put to.

Every buffer starts poisoned and padding is huge, so that each comparison also shows
that nothing unwritten and nothing padded is read. Nothing here needs pytest.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import accounting
from kvjax.interface import Diagnostics, Method, Traffic
from kvjax.registry import built_in
from kvjax.stores import buffers
from kvjax.testing import oracle, streams
from kvjax.testing.drafted import what_was_drafted_leaves_no_trace
from kvjax.testing.ended import (
    a_prompt_that_ended_is_kept_as_arrays,
    a_prompt_that_ended_serves_many_questions,
    a_row_takes_the_next_prompt,
)
from kvjax.testing.handing_up import what_a_layer_hands_up_has_one_shape
from kvjax.testing.instruction import an_instruction_votes_and_is_forgotten
from kvjax.testing.meshes import devices_share_rows_and_heads
from kvjax.testing.second_reading import a_second_reading_changes_only_what_it_learns
from kvjax.testing.streams import (
    Chunks,
    ContractError,
    NothingToCheckError,
    expect,
    expect_same,
)
from kvjax.testing.subject import (
    LARGEST_DEFAULT,
    LAYER,
    PROMPTS,
    SMALL,
    STEPS,
    Subject,
    attended_in_full,
    turning_run,
)

# Finite (see `buffers.fill_value`), and so large that the smallest weight on it shows.
POISON = 1e30

# Ways to cut the prompts: ragged, the last chunks late, token by token at first.
CHUNKINGS: dict[str, Chunks] = {
    "ragged": [(0, 3, 2, 5, 10, 0), (1, 0, 2, 0, 10, 9), (0, 0, 0, 0, 1, 9)],
    "late": [(1, 3, 4, 5, 20, 18), (0, 0, 0, 0, 1, 0), (0,) * 6],
    "singles": [(0, 1, 1, 1, 1, 1)] * 3 + [(1, 0, 1, 2, 18, 15)],
}


def check_method(factory: Callable[..., Method], **small: Any) -> tuple[str, ...]:
    """Runs the contract of kvjax on the methods that a factory makes, on the CPU.

    Args:
        factory: of a method, or a transform; see :func:`kvjax.register`.
        **small: small values of its options, so that a few tokens are more than the
            method keeps. Options by names that kvjax has too, such as `budget` and
            `page_size`, have one already.

    Returns:
        The names of what was checked: all of :data:`CHECKS`, but for those that this
        machine or this method has nothing for.

    Raises:
        ContractError: an `AssertionError` that names the first check that fails.
        TypeError: if it is no factory.
        ValueError: if `small` has an option that the factory lacks.
    """
    subject = Subject(factory, **small)
    with _poisoned(), jax.default_device(jax.devices("cpu")[0]):
        return tuple(name for name in CHECKS if keeps(subject, name))


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    before, buffers.fill_value = buffers.fill_value, POISON
    try:
        yield
    finally:
        buffers.fill_value = before


def keeps(subject: Subject, check: str) -> bool:
    """Returns whether there was something to check.

    Raises:
        ContractError: naming the check, if it fails.
    """
    try:
        CHECKS[check](subject)
    except NothingToCheckError:
        return False
    except AssertionError as error:
        raise ContractError(f"{subject.name} breaks {check!r}: {error}") from error
    return True


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


# --- shapes and names


def has_small_options(subject: Subject) -> None:
    """Every option with a large default has a small value here."""
    for key, option in subject.options.items():
        size = option.default
        is_large = isinstance(size, int) and size > LARGEST_DEFAULT
        expect(
            key in SMALL or key in subject.small or not is_large,
            f"{key}={size} is too large to try: check_method({subject.name}, {key}=4).",
        )


def arguments_have_the_same_names_everywhere(subject: Subject) -> None:
    """Callers may name them."""
    expected = {
        "init": ["spec", "weights"],
        "prefill": ["state", "q", "k", "v", "lengths"],
        "finish": ["state"],
        "append": ["state", "k", "v"],
        "inspect_step": ["state", "q"],
        "traffic": ["spec", "length"],
    }
    for field, names in expected.items():
        parameters = list(inspect.signature(getattr(subject.method, field)).parameters)
        if field == "append":  # `contiguous.extend` also serves prefill
            parameters, names = parameters[1:3], names[1:]
        if field == "finish":
            parameters, names = parameters[1:], names[1:]
        expect(parameters == names, f"{field} takes {parameters} instead of {names}.")
    traffic = subject.method.traffic(subject.spec, 20)
    expect(isinstance(traffic, Traffic), f"traffic returns {traffic!r}, no Traffic.")
    expect(
        all(isinstance(x, int) and x >= 0 for x in traffic),
        f"{traffic} must have whole numbers of bytes, from 0.",
    )


def a_step_leaves_the_state_as_it_was(subject: Subject) -> None:
    """Structure, shapes, dtypes: what `lax.scan` and a second call of jit need."""
    method, spec = subject.method, subject.spec
    empty = jax.eval_shape(functools.partial(method.init, spec))
    inputs = streams.chunk(subject.stream, [0] * len(PROMPTS), PROMPTS, size=21)
    filled, out = jax.eval_shape(streams.one_layer(method), empty, *inputs)
    _equal(_types(filled), _types(empty), "the state after prefill")
    _equal((out.shape, out.dtype), (inputs[0].shape, inputs[0].dtype), "prefill's out")
    finished = jax.eval_shape(method.finish, filled)
    q, k, v = (x[0] for x in subject.step_inputs())
    step = functools.partial(streams.step, method)
    stepped, (out, diagnostics) = jax.eval_shape(step, finished, (q, k, v))
    _equal(_types(stepped), _types(finished), "the state after a step")
    _equal((out.shape, out.dtype), (q.shape, q.dtype), "a step's out")
    expect(isinstance(diagnostics, Diagnostics), "a step returns no Diagnostics.")
    rows, heads = spec.batch, spec.num_q_heads
    for field, shape, dtype in (
        ("lse", (rows, heads, method.rows), jnp.float32),
        ("refreshed", (rows,), jnp.bool_),
        ("exact", (rows, heads), jnp.bool_),
    ):
        leaf = getattr(diagnostics, field)
        _equal((leaf.shape, leaf.dtype), (shape, jnp.dtype(dtype)), field)
    attended = diagnostics.attended
    _equal(attended.dtype, jnp.dtype(jnp.int32), "attended")
    expect(
        attended.ndim == 3
        and attended.shape[0] == rows
        and attended.shape[1] in (spec.num_kv_heads, heads),
        f"attended has shape {attended.shape}, not (B, Hkv, N) or (B, Hq, N).",
    )


def _equal(actual: Any, expected: Any, what: str) -> None:
    expect(actual == expected, f"{what} is {actual}, not {expected}.")


# --- what is computed


def is_full_attention_when_the_budget_covers_the_context(subject: Subject) -> None:
    """To the last slot; a budget above the capacity; all query heads on one KV head."""
    stream = streams.make_stream((1, 4, 15), 5, heads=(4, 1), seed=1)
    spec = streams.make_spec(stream, capacity=20, layer=LAYER, alpha=subject.alpha)
    run = streams.run(subject.covering(20), spec, stream)
    says_so = run.diagnostics.exact.all()
    if subject.method.lossy or not (subject.has_budget or says_so):
        raise NothingToCheckError
    streams.assert_matches(run, stream, oracle.full, alpha=subject.alpha)
    expect(says_so, "a step does not say that it is exact.")


def is_not_exact_where_it_rotates_keys_as_full_attention_does_not(
    subject: Subject,
) -> None:
    """Under `dynamic` RoPE frequencies go with the length: what is rotated anew, beyond
    the original context, is another model, and must not be called exact."""
    run = turning_run(subject.covering(20), subject.alpha)
    expected = turning_run(built_in.full(), subject.alpha)
    gap = np.abs(run.out - expected.out).max(-1)
    exact = run.diagnostics.exact
    expect((gap[exact] < 1e-5).all(), "a step says that it is exact, and is not.")
    if (subject.has_budget and not subject.method.lossy) or exact.any():
        expect(exact[:5, 0].all(), "up to the original context it must be exact.")


def a_prompt_is_exact_where_the_method_says_so(subject: Subject) -> None:
    """Methods read prompts together by this word of theirs: both ways it must be true,
    at budgets below the prompts."""
    furthest = 0.0
    for b, prompt in enumerate(PROMPTS):
        expected = attended_in_full(subject.alpha)[b].out[:prompt].swapaxes(0, 1)
        gap = np.abs(subject.baseline.prompt_out[b] - expected)
        furthest = max(furthest, gap.max())
    says = subject.method.exact_prompt
    expect(
        says == (furthest < 1e-4),
        f"exact_prompt={says}, and prompts are off by up to {furthest:.3g}.",
    )


def _unrotated(x, positions, length=None):
    """Rotates nothing: a model without positions, whose numbers cannot matter."""
    del positions, length
    return x


def output_is_attention_over_what_was_attended(subject: Subject) -> None:
    """Beside what else is estimated (`lam`), which is no attention over tokens."""
    stream = streams.make_stream((1, 5, 23), 6, heads=(6, 2), seed=2)
    alpha = subject.alpha
    spec = streams.make_spec(stream, layer=LAYER, rope=_unrotated, alpha=alpha)
    run = streams.run(subject.make(lam=0.0), spec, stream)
    if subject.method.lossy:  # over other numbers than came
        expect(not run.diagnostics.exact.any(), "a lossy step says that it is exact.")
        return
    streams.assert_consistent(run, stream, "float32", False, alpha)


def is_for_another_attention_or_refuses_it(subject: Subject) -> None:
    """Entmax for a method that takes softmax, and softmax for one that takes entmax."""
    stream = streams.make_stream((1, 5), 1)
    alpha = 1.5 if subject.alpha == 1 else 1.0
    spec = streams.make_spec(stream, layer=LAYER, alpha=alpha)
    try:
        subject.method.init(spec)
    except ValueError:
        return
    run = streams.run(subject.covering(spec.capacity), spec, stream)
    exact = run.diagnostics.exact
    for b, prompt in enumerate(stream.prompts):
        trace = oracle.full(stream.row(b), alpha=alpha)
        for h in np.flatnonzero(exact[0, b]):
            streams.assert_rows_close(
                run.out[0, b, h],
                trace.out[prompt, h],
                what=f"taken with {alpha=}, and not refused: row {b}",
            )


# --- rows, chunks, loops


def chunks_of_the_prompt_change_nothing(subject: Subject, chunks: Chunks) -> None:
    """However the prompt is cut: at multiples of the granule, if there is one."""
    chunks = streams.whole_granules(chunks, subject.method.hooks.granule or 1)
    chunked, whole = subject.run(chunks=chunks), subject.baseline
    expect_same(chunked.prompt_out, whole.prompt_out, "the prompt's outputs")
    expect_same(chunked.out, whole.out, "outputs")
    expect_same(chunked.diagnostics.attended, whole.diagnostics.attended, "attended")


def rows_do_not_see_each_other(subject: Subject) -> None:
    """All other rows hold other tokens and lengths: row 4 keeps every bit."""
    other = streams.make_stream((5, 1, 20, 3, 21, 2), STEPS, head_dim=6, seed=9)
    for mine, theirs in zip(subject.stream[:3], other[:3], strict=True):
        theirs[4] = mine[4, :, : theirs.shape[2]]
    run, before = subject.run(other), subject.baseline
    what = "a row that stayed as it was"
    np.testing.assert_array_equal(run.prompt_out[4], before.prompt_out[4], err_msg=what)
    np.testing.assert_array_equal(run.out[:, 4], before.out[:, 4], err_msg=what)
    expect(
        not np.array_equal(run.out[:, 5], before.out[:, 5]),
        "a row of other tokens gives the same.",
    )


def a_scan_equals_the_loop(subject: Subject) -> None:
    """A step is the body of a scan as it is."""
    state, _ = subject.prefill()
    step = functools.partial(streams.step, subject.method)
    scan = jax.jit(lambda state, inputs: jax.lax.scan(step, state, inputs))
    inputs = subject.step_inputs()
    _, (out, diagnostics) = scan(subject.jitted_finish(state), inputs)
    expect_same(out[:, :, :, -1], subject.baseline.out, "outputs")
    attended = subject.baseline.diagnostics.attended
    expect_same(diagnostics.attended, attended, "attended")


def jit_equals_eager(subject: Subject) -> None:
    """`finish` and a step; `decode_step` is `inspect_step` without diagnostics."""
    state, _ = subject.prefill()
    method, before = subject.method, subject.baseline
    q, k, v = (x[0] for x in subject.step_inputs())
    eager = method.finish(state)
    eager, out, diagnostics = method.inspect_step(method.append(eager, k, v), q)
    expect_same(out[:, :, -1], before.out[0], "outputs")
    expect_same(diagnostics.attended, before.diagnostics.attended[0], "attended")
    jitted = subject.jitted_finish(state)
    same, plain = method.decode_step(method.append(jitted, k, v), q)
    expect(
        jax.tree.structure(same) == jax.tree.structure(eager),
        "the state of decode_step is another than that of inspect_step.",
    )
    expect_same(plain, out, "decode_step")


def wide_types_change_nothing(subject: Subject) -> None:
    """Checks under JAX_ENABLE_X64: no integer and no float of ours gets wider by it."""
    before = subject.baseline
    with jax.enable_x64(True):
        state, prompt_out = subject.prefill()
        inputs, outs, attended = subject.step_inputs(), [], []
        state = subject.jitted_finish(state)
        step = jax.jit(functools.partial(streams.step, subject.method))
        for i in range(STEPS):
            state, (out, diagnostics) = step(state, [x[i] for x in inputs])
            outs.append(out[:, :, -1])
            attended.append(diagnostics.attended)
    expect_same(prompt_out, before.prompt_out, "the prompt's outputs")
    expect_same(np.stack(outs), before.out, "outputs")
    expect_same(np.stack(attended), before.diagnostics.attended, "attended")
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(before.state), strict=True)
    for wide, leaf in leaves:
        _equal(wide.dtype, leaf.dtype, "an array of the state, under 64 bits,")


# --- questions after a prompt has ended


# --- memory and devices


def bytes_are_known_before_anything_is_allocated(subject: Subject) -> None:
    """Counted from shapes, while the prompt is read and after it."""
    state, _ = subject.prefill()
    for leaves, count in (
        (state, accounting.prompt_bytes),
        (subject.jitted_finish(state), accounting.state_bytes),
    ):
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(leaves))
        _equal(count(subject.method, subject.spec), held, count.__name__)


def a_step_writes_in_place(subject: Subject) -> None:
    """Donated, the state's memory is the new state's: not one leaf is copied."""
    held = accounting.state_bytes(subject.method, subject.spec)
    aliased = subject.compiled_step.memory_analysis().alias_size_in_bytes
    expect(aliased == held, f"of {held} bytes of a donated state {aliased} are reused.")


def a_spec_is_static_and_a_state_is_arrays_only(subject: Subject) -> None:
    """Checks what jit needs of both."""
    state, spec = subject.method.init(subject.spec), subject.spec
    for leaf in jax.tree.leaves(state):
        expect(isinstance(leaf, jax.Array), f"the state holds a {type(leaf).__name__}.")
        expect(leaf.size > 0, f"an array of shape {leaf.shape} is empty: use None.")
    _equal(hash(dataclasses.replace(spec)), hash(spec), "the hash of an equal spec")
    counted = accounting.prompt_bytes(subject.method, spec)
    _equal(buffers.num_bytes(state), counted, "the size of an empty state")


# In the order of telling: what breaks early explains what breaks later.
CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        has_small_options,
        arguments_have_the_same_names_everywhere,
        a_spec_is_static_and_a_state_is_arrays_only,
        a_step_leaves_the_state_as_it_was,
        is_full_attention_when_the_budget_covers_the_context,
        output_is_attention_over_what_was_attended,
        is_not_exact_where_it_rotates_keys_as_full_attention_does_not,
        a_prompt_is_exact_where_the_method_says_so,
        a_second_reading_changes_only_what_it_learns,
        an_instruction_votes_and_is_forgotten,
        what_a_layer_hands_up_has_one_shape,
        is_for_another_attention_or_refuses_it,
    )
}
CHECKS |= {
    f"chunks_of_the_prompt_change_nothing, {name}": functools.partial(
        chunks_of_the_prompt_change_nothing, chunks=chunks
    )
    for name, chunks in CHUNKINGS.items()
}
CHECKS |= {
    check.__name__: check
    for check in (
        rows_do_not_see_each_other,
        a_scan_equals_the_loop,
        jit_equals_eager,
        wide_types_change_nothing,
        a_prompt_that_ended_serves_many_questions,
        a_prompt_that_ended_is_kept_as_arrays,
        a_row_takes_the_next_prompt,
        what_was_drafted_leaves_no_trace,
        bytes_are_known_before_anything_is_allocated,
        a_step_writes_in_place,
        devices_share_rows_and_heads,
    )
}
