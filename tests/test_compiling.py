"""The tests' own cache of compiled code leaves JAX as it found it."""

import compiling
import jax
import pytest


def test_an_error_does_not_leave_the_cache_on(tmp_path):
    before = [getattr(jax.config, name) for name in compiling.CACHE]

    def fail():
        assert getattr(jax.config, compiling.CACHE[0]) == str(tmp_path)
        raise KeyError

    with pytest.raises(KeyError), compiling.cache(tmp_path):
        fail()
    assert [getattr(jax.config, name) for name in compiling.CACHE] == before
