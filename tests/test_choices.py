"""Options of a few words: any other is refused by name, with the words."""

import dataclasses
from typing import Literal

import pytest

from kvjax import registry
from kvjax.attention import choices
from kvjax.attention.typed import typed
from kvjax.interface import Method


@dataclasses.dataclass(frozen=True)
class Options:
    size: int
    order: Literal["rising", "falling"]
    per: Literal["kv", "query"] | None = None


def test_the_words_are_those_of_the_type():
    choices.check_choice("order", "rising", Literal["rising", "falling"])
    with pytest.raises(ValueError, match=r"^order='up' must be one of rising, falling"):
        choices.check_choice("order", "up", Literal["rising", "falling"])


def test_fields_of_a_literal_type_are_checked():
    choices.check_choices(Options(1, "falling"))
    with pytest.raises(ValueError, match="order=3 must be one of rising, falling"):
        choices.check_choices(Options(1, 3))


@typed
def factory(*, sizes: list[int], most: int | None = None) -> Method:
    del most, sizes
    return registry.parse("full")


def test_a_list_of_numbers_is_no_number():
    assert factory(sizes=[1, 2], most=3) == factory(sizes=[])
    with pytest.raises(ValueError, match="factory: most='3' must be of type int or No"):
        factory(sizes=[], most="3")
