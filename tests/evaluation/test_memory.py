"""What a comparison takes is what its shapes say, and what is free what Linux says."""

import dataclasses

import pytest
from tiny import tiny_model

import kvjax
from kvjax import accounting
from kvjax.evaluation import compare, compare_inputs, memory
from kvjax.stores.buffers import num_bytes

MODEL = tiny_model()
SETTINGS = compare_inputs.Settings(context=512, new_tokens=64, windows=8, batch=8)
METHODS = {
    name: kvjax.parse(name)
    for name in ("full", "quest:budget=32", "h2o:budget=32", "snapkv:budget=48")
}
MLP_WIDTH = 48
WEIGHTS = num_bytes(MODEL.params)


def fit(free, room=compare.ROOM, **settings):
    return memory.fit(
        MODEL.decoder,
        METHODS,
        dataclasses.replace(SETTINGS, **settings),
        weights=WEIGHTS,
        mlp_width=MLP_WIDTH,
        room=room,
        free=free,
    )


def held(name, batch):
    states = accounting.bytes_of_prompt(METHODS[name], MODEL.decoder, 512, 64)
    return batch * states


def test_states_are_those_of_a_group_and_the_copies_that_decode():
    found = fit(None)
    assert (found.batch, found.room) == (8, compare.ROOM)
    assert found.need.weights == WEIGHTS
    # All four fit the room together. Three keep the same tokens in the same order, all
    # four a row's length; what decodes is given a copy, beside one of the reference.
    full, *others = [held(name, 8) for name in METHODS]
    lengths = 8 * 4 * MODEL.decoder.num_layers
    once = full + sum(others) - 2 * full - lengths
    assert found.need.states == once + 2 * max(full, *others)
    # Alone beside the reference quest takes most, which shares a row's length with it.
    alone = fit(None, room=0)
    quest = held("quest:budget=32", 8)
    assert alone.need.states == full + quest - lengths + 2 * quest


def test_what_is_kept_of_every_window_is_there():
    more = fit(None, windows=108).need.temporaries - fit(None).need.temporaries
    spec = MODEL.decoder.cache_spec(1, 1)
    heads = spec.num_q_heads + 2 * spec.num_kv_heads  # of q, k and v, float32
    given = 4 * MODEL.decoder.num_layers * heads * spec.head_dim
    logits = 4 * MODEL.decoder.vocab_size
    assert more == 100 * 64 * (logits + given)


def test_rows_are_halved_until_they_fit_and_then_methods_are_alone():
    needs = {batch: fit(None, batch=batch).need.total for batch in (8, 4, 2, 1)}
    assert sorted(needs.values(), reverse=True) == list(needs.values())
    for batch, need in needs.items():
        assert fit(need).batch == batch
        assert fit(need).need.total == need
        assert fit(need - 1).batch == max(batch // 2, 1)
    least = fit(needs[1] - 1)
    assert (least.batch, least.room) == (1, 0)
    assert least.need.total < needs[1]
    # Nothing fits: the least that could be tried.
    assert fit(0) == least
    assert fit(needs[2], batch=6).batch == 1  # of 6, 3, 1


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal:  9000 kB\nMemFree: 10 kB\nMemAvailable:    5000 kB\n"


def test_free_is_what_the_machine_has_available(tmp_path):
    assert memory.free_bytes(tmp_path) is None
    write(tmp_path, proc__meminfo=MEMINFO)
    assert memory.free_bytes(tmp_path) == 5000 * 1024


def test_free_is_what_the_control_groups_leave(tmp_path):
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/a/b\n")
    groups = "sys__fs__cgroup__"
    write(
        tmp_path,
        **{
            f"{groups}a__b__memory_dot_max": "max\n",
            f"{groups}a__b__memory_dot_current": "700\n",
            f"{groups}a__memory_dot_max": "2000\n",
            f"{groups}a__memory_dot_current": "900\n",
            f"{groups}a__memory_dot_stat": "anon 500\ninactive_file 300\n",
        },
    )
    assert memory.free_bytes(tmp_path) == 2000 - 900 + 300


def test_free_is_what_the_older_control_groups_leave(tmp_path):
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="4:memory:/a\n3:cpu:/\n")
    root = tmp_path / "sys/fs/cgroup/memory/a"
    root.mkdir(parents=True)
    (root / "memory.limit_in_bytes").write_text("4000")
    (root / "memory.usage_in_bytes").write_text("5000")
    assert memory.free_bytes(tmp_path) == 0


def test_free_is_what_the_limit_of_addresses_leaves(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (3_000_000, 9_000_000))
    write(tmp_path, proc__meminfo=MEMINFO)
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/status").write_text("VmPeak:  2500 kB\nVmSize:  1000 kB\n")
    assert memory.free_bytes(tmp_path) == 3_000_000 - 1024_000


def test_free_is_the_accelerators_where_there_is_one(tmp_path, monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 100, "bytes_in_use": 30}

    monkeypatch.setattr(memory.jax, "devices", lambda: [Device()])
    assert memory.free_bytes(tmp_path) == 70
