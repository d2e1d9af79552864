"""Options of a few words: any other is refused by name, with the words."""

import dataclasses
from typing import Literal

import pytest

from kvjax.attention import choices


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
