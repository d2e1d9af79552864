"""Batches: functions of config and step alone, packed without a token lost."""

import grain
import numpy as np
import pytest
import toys

from kvjax.training import pipeline
from kvjax.training.batch import Batch, Sample


def steps(*changes, **options):
    two = "stages.1.lengths={16: 0.5, 32: 0.5}"
    return pipeline.Steps(toys.config(two, *changes), toys.SOURCES, **options)


def same(a: Batch, b: Batch) -> bool:
    return all(
        x is y is None or np.array_equal(x, y) for x, y in zip(a, b, strict=True)
    )


def test_a_batch_depends_on_seed_and_step_only():
    source = steps()
    forwards = [source[i] for i in range(12)]
    backwards = [steps()[i] for i in reversed(range(12))]
    assert all(map(same, forwards, reversed(backwards)))
    assert not same(source[0], source[1])
    assert not same(source[0], steps("data.seed=1")[0])
    # Numpy pads seeds with zeros: the plan's must not be the first sample's.
    seeds = ([pipeline._PLAN, 0, 0], [pipeline._SAMPLE, 0, 0, 0, 0])
    one, other = (np.random.default_rng(seed).random() for seed in seeds)
    assert one != other


def test_lengths_and_shapes_are_those_of_the_stage():
    source = steps()
    assert {source[i].tokens.shape for i in range(6)} == {(4, 16)}
    assert {source[i].tokens.shape for i in range(6, 12)} == {(4, 16), (2, 32)}
    assert source[0].segments is None
    assert source[6].segments is not None


def test_threads_and_a_restored_iterator_change_nothing():
    expected = [steps()[i] for i in range(12)]
    iterator = pipeline.iterate(steps("data.threads=2"))
    found = [next(iterator) for _ in range(5)]
    state = iterator.get_state()
    found += list(pipeline.iterate(steps("data.threads=1"), state))
    assert len(found) == 12
    assert all(map(same, expected, found))


def test_processes_make_the_rows_of_one_batch():
    whole = steps()
    halves = [steps(process=p, num_processes=2) for p in range(2)]
    for i in (0, 7, 11):
        parts = [half[i] for half in halves]
        assert all(p.tokens.shape[0] * 2 == whole[i].tokens.shape[0] for p in parts)
        joined = [
            None if a is None else np.concatenate([a, b])
            for a, b in zip(*parts, strict=True)
        ]
        assert same(whole[i], Batch(*joined))


def test_packing_keeps_every_sample_in_its_own_segment():
    source = steps()
    for i in range(6, 12):
        batch = source[i]
        for row in range(len(batch.tokens)):
            segments = batch.segments[row]
            used = segments > 0
            count = used.sum()
            assert (np.diff(segments[:count]) >= 0).all()
            assert not used[count:].any()
            assert not batch.weights[row][~used].any()
            for number in range(1, segments.max() + 1):
                inside = segments == number
                n = inside.sum()
                np.testing.assert_array_equal(batch.positions[row][inside], range(n))
                assert len(set(batch.sources[row][inside])) == 1
                # Targets are the next tokens, up to the last, which is no token here.
                tokens, targets = batch.tokens[row][inside], batch.targets[row][inside]
                np.testing.assert_array_equal(tokens[1:], targets[:-1])
                if batch.sources[row][inside][0] == 0:  # count
                    np.testing.assert_array_equal((tokens + 1) % toys.VOCAB, targets)
    packed = [source[i].segments.max(1) for i in range(6, 12)]
    assert max(row.max() for row in packed) > 1


def test_sequences_of_a_packed_row_are_as_short_and_as_long_as_asked():
    config = toys.config("stages.1.lengths={64: 1}", "stages.1.tokens=6400")
    rng = np.random.default_rng(0)
    plan = pipeline.layout(rng, config.stages[1], 64, config.sources)
    lengths = np.array([slot.length for row in plan for slot in row])
    assert all(sum(slot.length for slot in row) == 64 for row in plan)
    assert lengths.min() >= 5
    # Log-uniform: as many in [5, 18) as in [18, 64), but for those at a row's end.
    first = np.array([row[0].length for row in plan])
    assert 0.35 < (first < 18).mean() < 0.65


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (1.0, 0.0), (0.0, 1.0)])
def test_every_batch_has_each_sources_share(shares):
    mixture = dict(zip(("count", "noise"), shares, strict=True))
    config = toys.config(f"stages.1.mixture={mixture}", "stages.1.tokens=1024")
    total = np.zeros(2)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        plan = pipeline.layout(rng, config.stages[1], 32, config.sources)
        tokens = np.zeros(2)
        longest = max(slot.length for row in plan for slot in row)
        for row in plan:
            for slot in row:
                tokens[slot.source] += slot.length
        # Each source's share is an interval of the batch: two ends, a sequence each.
        assert abs(tokens - np.array(shares) * 1024).max() <= 2 * longest
        total += tokens
    np.testing.assert_allclose(total / total.sum(), shares, atol=0.01)


def test_unpacked_rows_take_sources_evenly():
    config = toys.config(
        "stages.0.mixture={count: 0.75, noise: 0.25}", "stages.0.tokens=1280"
    )
    for seed in range(20):
        rng = np.random.default_rng(seed)
        plan = pipeline.layout(rng, config.stages[0], 16, config.sources)
        assert sum(row[0].source for row in plan) in (19, 20, 21)


def test_checks_are_fixed_and_apart_from_the_training_seeds():
    config = toys.config("evaluate.checks=[count@16, noise@8]")
    found = pipeline.check_batches(config, toys.SOURCES)
    again = pipeline.check_batches(config, toys.SOURCES)
    assert list(found) == ["count@16", "noise@8"]
    for name, batches in found.items():
        assert sum(batch.tokens.size for batch in batches) == 64
        assert all(map(same, batches, again[name]))
    assert found["noise@8"][0].tokens.shape == (8, 8)


def test_a_source_that_is_missing():
    with pytest.raises(ValueError, match=r"no source 'noise'; sources are count\."):
        pipeline.Steps(toys.config(), {"count": toys.Count()})


def test_a_sample_that_does_not_fit():
    sample = Sample(np.zeros(9, np.int32), np.ones(8, np.float32), np.zeros(8, bool))
    with pytest.raises(ValueError, match=r"8 targets .* does not fit a row of 12"):
        pipeline.pack([(sample, 0), (sample, 0)], 12)
    with pytest.raises(ValueError, match="8 targets with 7 weights"):
        pipeline.pack([(sample._replace(weights=np.ones(7, np.float32)), 0)], 12)


def test_the_iterator_is_grains_own():
    assert isinstance(pipeline.iterate(steps()), grain.DatasetIterator)
