"""The promises about a prompt that has ended: asked, put away, and one row of many."""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.decoding import asking
from kvjax.decoding.reader import Prefilled
from kvjax.testing import streams
from kvjax.testing.streams import NothingToCheckError, Stream, expect, expect_same
from kvjax.testing.subject import PROMPTS, STEPS, Subject


def a_prompt_that_ended_serves_many_questions(subject: Subject) -> None:
    """Every row goes on from a copy of one: as from a prompt that it read itself.

    Tokens that come after `finish` are appended, a question's as generated ones: there
    is no other way in.
    """
    rows = [4] * len(PROMPTS)
    questions = streams.make_stream(
        [PROMPTS[row] for row in rows], STEPS, head_dim=6, seed=3
    )
    for theirs, mine in zip(questions[:3], subject.stream[:3], strict=True):
        theirs[:, :, : PROMPTS[4]] = mine[rows, :, : PROMPTS[4]]
    alone = subject.run(questions)
    ended = _ended(subject, subject.stream)
    answers = []
    for _ in range(2):  # the prompt is not used up
        (copied,) = asking.taken(subject.method, ended, rows).states
        answers.append(subject.decode(copied, questions)[1])
    for out, diagnostics in answers:
        expect_same(out[:, :, :, -1], alone.out, "outputs")
        expect_same(diagnostics.attended, alone.diagnostics.attended, "attended")


def a_prompt_that_ended_is_kept_as_arrays(subject: Subject) -> None:
    """Away from the device and back, into what shapes alone say, as from a file."""
    state, _ = subject.prefill()
    ended = subject.jitted_finish(state)
    like = jax.eval_shape(
        lambda: subject.method.finish(subject.method.init(subject.spec))
    )
    one, other = jax.tree.structure(ended), jax.tree.structure(like)
    expect(one == other, f"what finish returns is {one}, not {other}.")
    leaves = [jax.device_put(np.array(leaf)) for leaf in jax.tree.leaves(ended)]
    restored = jax.tree.unflatten(jax.tree.structure(like), leaves)
    _, (out, _) = subject.decode(restored)
    what = "outputs behind a prompt that was put away"
    np.testing.assert_array_equal(out[:, :, :, -1], subject.baseline.out, err_msg=what)


def a_row_takes_the_next_prompt(subject: Subject) -> None:
    """A prompt that was read alone takes the place of a row; no other row notices."""
    place = 1
    prompts = (*PROMPTS[:place], PROMPTS[4], *PROMPTS[place + 1 :])
    mixed = streams.make_stream(prompts, STEPS, head_dim=6, seed=3)
    for theirs, mine in zip(mixed[:3], subject.stream[:3], strict=True):
        others = np.arange(len(PROMPTS)) != place
        theirs[others] = mine[others]
    expected = subject.run(mixed)
    read = _ended(subject, mixed)
    if not asking.allows_rows(subject.method, read, 1):
        raise NothingToCheckError
    alone = asking.taken(subject.method, read, [place])
    rows = _ended(subject, subject.stream).states
    (state,) = asking.put(subject.method, rows, alone, place, len(PROMPTS))
    _, (out, diagnostics) = subject.decode(state, mixed)
    expect_same(out[:, :, :, -1], expected.out, "outputs beside a row that was put in")
    expect_same(diagnostics.attended, expected.diagnostics.attended, "attended")


def _ended(subject: Subject, stream: Stream) -> Prefilled:
    """Returns the stream's prompts, read and ended: of one layer, no hidden states."""
    state, _ = subject.prefill(stream)
    nothing = jnp.zeros((len(stream.prompts), 1))
    return Prefilled(
        (subject.jitted_finish(state),),
        nothing,
        nothing.astype("int32"),
        specs=(subject.spec,),
    )
