"""Progress on stderr: a line now and then, whether or not anything was done."""

import io
import time

from kvjax.cli import progress
from kvjax.cli.progress import show_progress, summary


def test_a_line_says_how_far_and_how_long():
    assert summary({}, 4, 3.0) == "0% done, 3 s so far"
    line = summary({"full": 1.0, "quest": 0.5, "h2o": 0.5}, 4, 600.0)
    assert line == ("50% done, 10 min so far, about 10 min left, at quest and 1 more")
    assert summary({"full": 1.0}, 1, 80.0) == "100% done, 80 s so far"
    # Too early for a guess: what was done so far is compiling.
    assert "left" not in summary({"full": 0.01}, 1, 100.0)


def test_work_without_news_gives_a_sign_of_life(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    written = ""
    with show_progress() as update:
        update("full", 0.25)
        deadline = time.monotonic() + 10
        while "25% done" not in written and time.monotonic() < deadline:
            written += capsys.readouterr().err
            time.sleep(0.01)
    assert "kvjax: 25% done" in written
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""  # the thread has ended


def test_short_work_says_nothing(capsys):
    with show_progress(2) as update:
        for name in ("full", "quest"):
            update(name, 0.0)
            update(name, 1.0)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_bars(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    with show_progress(2) as update:
        update("full", 1.0)
        update("quest", 0.5)
    assert "full" in terminal.getvalue()
    assert "quest" in terminal.getvalue()


def test_lines_of_long_work_are_further_apart():
    lines = progress._Lines(1)
    assert progress.EVERY - 1 < lines.until_next() <= progress.EVERY
    lines._start -= 3600.0
    assert 58 < lines.until_next() < 61


def test_what_was_done_before_is_no_part_of_the_time_left():
    lines = progress._Lines(4)
    for name in ("kept", "also kept"):
        lines.update(name, 0.0)
        lines.update(name, None)
    lines.update("full", 1.0)
    assert summary(dict(lines._done), lines._total, 60.0).startswith("50% done")
