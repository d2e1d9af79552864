"""Decisions over all layers, and prompts that are sealed: who asks for them."""

import jax
import numpy as np
import pytest
from tiny import tiny_model

from kvjax import registry
from kvjax.decoding import generate, reader, saved_prompt
from kvjax.evaluation import fidelity, together
from kvjax.evaluation.claims.measure import layers
from kvjax.files.arrays import DamagedError

MODEL = tiny_model(num_layers=2)
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (40, 19)]
SQUEEZED = "squeezed:budget=16,tail=4,clusters=0.2,rounds=2,sparsity=0.5"
OVER_ALL = registry.parse(f"{SQUEEZED},scope=model")
ROOM = 12


def thresholds(states):
    return np.array([state.threshold for state in states])


@pytest.fixture(scope="module")
def by_layer():
    states = generate.prefill(MODEL, SQUEEZED, PROMPTS, max_new_tokens=ROOM).states
    return thresholds(states)


def test_layers_share_what_is_decided_over_all(by_layer):
    """Whoever ended the prompts: one method, several, or one beside the reference."""
    prefilled = generate.prefill(MODEL, OVER_ALL, PROMPTS, max_new_tokens=ROOM)
    found = thresholds(prefilled.states)
    assert (found[0] == found[1]).all()
    assert (by_layer[0] != by_layer[1]).all()
    for b in range(len(PROMPTS)):
        per_key = [
            np.repeat(scores, size)
            for state in prefilled.states
            for scores, size in zip(state.scores[b], state.size[b], strict=True)
        ]
        expected = np.quantile(np.concatenate(per_key), 0.5)
        np.testing.assert_allclose(found[0, b], expected, rtol=2e-4)
    full = registry.parse("full")
    read = together.read(MODEL, [full, OVER_ALL], PROMPTS, max_new_tokens=ROOM)
    apart = thresholds(read.take(1).states)
    np.testing.assert_allclose(apart, found, rtol=1e-5)
    beside = fidelity.side_by_side(full, OVER_ALL)
    states = generate.prefill(MODEL, beside, PROMPTS, max_new_tokens=ROOM).states
    apart = thresholds([state.candidate for state in states])
    np.testing.assert_allclose(apart, found, rtol=1e-5)


def test_dense_layers_have_no_part_in_it(by_layer):
    method = registry.parse(f"dense_layers:first=1+{SQUEEZED},scope=model")
    states = generate.prefill(MODEL, method, PROMPTS, max_new_tokens=ROOM).states
    np.testing.assert_allclose(states[1].state.threshold, by_layer[1], rtol=1e-5)
    dense = registry.parse("dense_layers:first=2+" + f"{SQUEEZED},scope=model")
    assert dense.hooks.settle(states[:1]) == states[:1]
    with pytest.raises(ValueError, match="decides over all layers, and is of the firs"):
        registry.get("dense_layers")(method=registry.parse("full"), dense=OVER_ALL)


def test_who_has_one_layer_refuses():
    with pytest.raises(ValueError, match="decides over all layers, and one was recor"):
        layers._begun(OVER_ALL, None, None)


# --- sealing


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A folder with two prompts whose clusters were made, and the prefix."""
    folder = tmp_path_factory.mktemp("sealed") / "here"
    read = saved_prompt.read(MODEL, SQUEEZED, PROMPTS, room=ROOM)
    found = saved_prompt.seal(SQUEEZED, read)
    saved_prompt.save(folder, MODEL, found, method_name=SQUEEZED)
    return folder, found


def restored(folder):
    return saved_prompt.restore(folder, MODEL, SQUEEZED, method_name=SQUEEZED)


def test_clusters_are_saved_and_come_back(sealed):
    folder, found = sealed
    assert found.sealed == (40, 19)
    again = restored(folder)
    assert again.sealed == found.sealed
    assert jax.tree.structure(again) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, again.states, found.states)
    assert saved_prompt.about(folder)["format"] == 4
    alone = generate.prefill(MODEL, SQUEEZED, PROMPTS, max_new_tokens=ROOM)
    jax.tree.map(np.testing.assert_array_equal, again.states, alone.states)
    method = registry.parse(SQUEEZED)
    ended = reader.finish_layers(method, again.states)
    jax.tree.map(np.testing.assert_array_equal, ended, alone.states)


def test_one_clustering_serves_many_questions(sealed):
    """Read behind it, or appended: what was clustered stays as it is."""
    folder, _ = sealed
    one = [[7, 3], [5, 1, 4]]
    behind = saved_prompt.extend(MODEL, SQUEEZED, restored(folder), one)
    for before, after in zip(restored(folder).states, behind.states, strict=True):
        for a, b in zip(before[1:], after[1:], strict=True):
            np.testing.assert_array_equal(a, b)
    read = saved_prompt.generate(MODEL, SQUEEZED, behind, max_new_tokens=4)
    ended = saved_prompt.finish(MODEL, SQUEEZED, restored(folder))
    asked = [
        saved_prompt.ask(MODEL, SQUEEZED, ended, questions, max_new_tokens=4)
        for questions in (one, [[9], [2]], one)
    ]
    for first, again in zip(asked[0], asked[2], strict=True):
        assert first.tokens == again.tokens
    assert [len(a.tokens) for a in (*read, *asked[1])] == [4] * 4


def test_each_prompt_has_room_of_its_own(sealed):
    """What was not clustered is read in full: as much as was made room for."""
    folder, found = sealed
    assert saved_prompt.tokens_left(MODEL, SQUEEZED, found) == ROOM
    with pytest.raises(ValueError, match=r"room for 12 tokens more, .* 14 are wanted"):
        saved_prompt.extend(MODEL, SQUEEZED, restored(folder), [[], [1] * 13])
    unsealed = saved_prompt.read(MODEL, SQUEEZED, PROMPTS, room=ROOM)
    more = saved_prompt.extend(MODEL, SQUEEZED, unsealed, [[], [1] * 13])
    assert more.sealed == ()
    found = saved_prompt.extend(MODEL, SQUEEZED, restored(folder), [[], [1] * 5])
    assert saved_prompt.tokens_left(MODEL, SQUEEZED, found) == ROOM - 5


def test_a_method_with_nothing_to_make_seals_nothing():
    read = saved_prompt.read(MODEL, "full", PROMPTS, room=ROOM)
    assert saved_prompt.seal("full", read) is read
    exact = f"quantize+{SQUEEZED}"  # of whose rows there are no others yet
    assert registry.parse(exact).hooks.seal is None
    coded = registry.parse(f"quantize:prompt=quantized+{SQUEEZED}")
    states = reader.empty_states(MODEL.decoder, coded, 1, 40, 4)
    assert reader.seal_layers(coded, states)[0].fixed.shape == (1,)


def test_what_a_folder_says_of_it_is_checked(sealed, tmp_path):
    folder, _ = sealed
    text = (folder / saved_prompt.ABOUT).read_text()
    copy = tmp_path / "copy"
    copy.mkdir()
    wrong = text.replace('"sealed": [\n    40,', '"sealed": [\n    41,')
    assert wrong != text
    (copy / saved_prompt.ABOUT).write_text(wrong)
    with pytest.raises(DamagedError, match="are not what was saved"):
        saved_prompt.about(copy)
