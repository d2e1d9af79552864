"""The folder of compiled code stays within its bound, and loses the oldest first."""

import os

import jax

from kvjax.cli import compiled


def test_what_was_used_least_lately_goes_first(tmp_path):
    for number, read in enumerate((5, 1, 4, 2, 3)):
        path = tmp_path / f"{number}"
        path.write_bytes(bytes(100))
        os.utime(path, (read, 0))  # read then, written before all
    os.utime(tmp_path / "1", (0, 9))  # or written last
    compiled.shorten(tmp_path, 500)
    assert len(list(tmp_path.iterdir())) == 5
    compiled.shorten(tmp_path, 299)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    (tmp_path / "folder").mkdir()
    os.utime(tmp_path / "folder", (0, 0))
    compiled.shorten(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_it_is_shortened_when_it_is_turned_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "MOST", 150)
    folder = tmp_path / "kvjax" / "xla"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}").write_bytes(bytes(100))
        os.utime(folder / f"{number}", (number, number))
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    try:
        compiled.keep_compiled_code()
        assert jax.config.jax_compilation_cache_dir == str(folder)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert [path.name for path in folder.iterdir()] == ["2"]
