"""NOTES.md: an entry has a heading, and the index at the top has every entry once."""

import pathlib
import re

NOTES = pathlib.Path(__file__).parents[1] / "NOTES.md"


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_index_has_every_entry_once():
    head, *days = re.split(r"^## (?=\d)", NOTES.read_text("utf-8"), flags=re.MULTILINE)
    listed = re.findall(r"^- \[(.*)\]\(#(.*)\)$", head, re.MULTILINE)
    entries = re.findall(r"^### (.*)$", "".join(days), re.MULTILINE)
    assert sorted(entry for entry, _ in listed) == sorted(entries), (
        "a finding is `### A heading` under its date, and a line in the index"
    )
    assert [anchor for _, anchor in listed] == [slug(entry) for entry, _ in listed]
    assert len(set(entries)) == len(entries)


def test_entries_stand_under_dates_in_their_order():
    dates = re.findall(r"^## (\d.*)$", NOTES.read_text("utf-8"), re.MULTILINE)
    assert dates == sorted(set(dates))
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)


def test_no_entry_hides_in_bold():
    assert not re.findall(r"^\*\*[^*]*[.:]\*\*", NOTES.read_text("utf-8"), re.MULTILINE)
