"""Steps of these tests attend by a few lines that compile quickly."""

import pytest
import toys

from kvjax.training import attention, step


@pytest.fixture(autouse=True)
def quick_attention(monkeypatch):
    monkeypatch.setattr(step, "causal_attention", toys.attention)


@pytest.fixture
def real_attention(monkeypatch, quick_attention):
    monkeypatch.setattr(step, "causal_attention", attention.causal_attention)
