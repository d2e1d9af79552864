"""Ctrl-C and SIGTERM, whenever they come: code 130, one line, nothing half written.

Nothing here depends on the time that anything takes: a process sends itself the signal
at the very place that is asked about.
"""

import os
import subprocess
import sys
import textwrap

import pytest
from tiny import TEXT

LINE = "kvjax: error: interrupted.\n"
# A command of our own takes the place of the command line, in a file as of the library.
START = """
import ctypes, os, pathlib, signal, sys, threading, time
import kvjax
from kvjax import interrupts
from kvjax.__main__ import main

def of(file, source):
    exec(compile(source, file, "exec"), globals())

def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)

class Commands:
    @property
    def run(self):
        return run

sys.modules["kvjax.cli"] = kvjax.cli = Commands()
OURS = os.path.dirname(interrupts.__file__) + "/pretended.py"
THEIRS = "/lib/python3/site-packages/jaxlib/pretended.py"
"""


def ends(script, *, arguments=(), **options):
    """Runs a script and returns its exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
    return done.returncode, done.stdout, done.stderr


def ours(body):
    """A script whose command has this body, and nothing but what it calls."""
    source = "def run(arguments):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    return f"of(OURS, {source!r})\nmain()\n"


@pytest.mark.parametrize("number", ["signal.SIGINT", "signal.SIGTERM"])
def test_a_command_of_ours_is_left_in_good_order(number):
    body = f"""
    try:
        send({number})
        time.sleep(100)
    finally:
        print("in order")
    """
    assert ends(ours(body)) == (130, "in order\n", LINE)


def test_what_catches_every_mistake_does_not_catch_it():
    body = """
    try:
        send()
        time.sleep(100)
    except Exception:
        pass
    """
    assert ends(ours(body)) == (130, "", LINE)


def test_a_library_returns_before_anything_is_raised():
    """Its C++ may have called the function in which the signal comes."""
    theirs = 'def call():\n    send()\n    time.sleep(0.1)\n    print("whole")\n'
    script = f"of(THEIRS, {theirs!r})\n" + ours("call()\ntime.sleep(100)\n")
    assert ends(script) == (130, "whole\n", LINE)


def test_a_comparison_that_c_may_ask_for_is_not_broken_off():
    """Static arguments of jitted functions are compared by C++, no frame between."""
    key = """
class Key:
    def __eq__(self, other):
        send()
        time.sleep(0.1)
        print("whole")
        return True
"""
    script = f"of(OURS, {key!r})\n" + ours("Key() == 1\ntime.sleep(100)\n")
    assert ends(script) == (130, "whole\n", LINE)


def test_what_is_put_right_on_the_way_out_is_not_broken_off():
    manager = """
class Manager:
    def __enter__(self):
        pass
    def __exit__(self, *error):
        send()
        time.sleep(0.1)
        print("put right")
"""
    body = "with Manager():\n    pass\ntime.sleep(100)\n"
    script = f"of(OURS, {manager!r})\n" + ours(body)
    assert ends(script) == (130, "put right\n", LINE)


STUCK = """
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(256)
libc.pthread_mutex_lock(mutex)

def compile_for_ever():
    send()
    libc.pthread_mutex_lock(mutex)  # which no signal ends
"""


def test_what_does_not_return_is_not_waited_for(tmp_path):
    """The main thread is in C++ and stays there; another one cleans up and ends."""
    body = """
    from kvjax import files

    with files.replacing(arguments[0]) as new:
        new.write_text("half")
        compile_for_ever()
    """
    script = "interrupts.PATIENCE = interrupts.UNWINDING = 0.2\n"
    script += f"of(THEIRS, {STUCK!r})\n" + ours(body)
    assert ends(script, arguments=[tmp_path / "model"]) == (130, "", LINE)
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_does_not_wait():
    later = "threading.Timer(0.6, send).start()\n"
    script = f"interrupts.PATIENCE = 100\n{later}of(THEIRS, {STUCK!r})\n"
    script += ours("compile_for_ever()\n")
    assert ends(script) == (130, "", LINE)


def test_a_thread_that_waits_for_a_library_rests_between_two_looks():
    """What has the main thread look wakes the one that sent it, too."""
    theirs = "def call():\n    send()\n    time.sleep(0.5)\n"
    script = f"""
    of(THEIRS, {theirs!r})
    looks, real = [], signal.pthread_kill

    def counted(*arguments):
        looks.append(arguments)
        real(*arguments)

    signal.pthread_kill = counted
    interrupts.PATIENCE = 100
    begin = time.monotonic()
    """
    body = """
    try:
        call()
        time.sleep(100)
    finally:
        took = time.monotonic() - begin
        print(0 < len(looks) * interrupts.EVERY <= took)
    """
    script = textwrap.dedent(script) + ours(body)
    assert ends(script) == (130, "True\n", LINE)


def test_an_interrupt_that_something_swallows_is_not_lost():
    body = """
    try:
        send()
        time.sleep(100)
    except BaseException:
        pass
    time.sleep(100)
    """
    script = "interrupts.UNWINDING = 0.3\n" + ours(body)
    assert ends(script) == (130, "", LINE)


def test_a_file_that_is_being_written_is_the_old_one_or_absent(tmp_path):
    (tmp_path / "old").write_text("whole")
    body = """
    from kvjax import files

    def written(path):
        with files.replacing(path) as new:
            new.write_text("half")
            send()
            time.sleep(100)

    written(arguments[0])
    """
    for name in ("old", "new"):
        found = ends(ours(body), arguments=[tmp_path / name])
        assert found == (130, "", LINE)
    (left,) = tmp_path.iterdir()
    assert (left.name, left.read_text()) == ("old", "whole")


def test_during_imports():
    script = """
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "typer":
                send()

    del sys.modules["kvjax.cli"], kvjax.cli
    sys.meta_path.insert(0, Finder())
    main()
    """
    assert ends(script) == (130, "", LINE)


def test_a_command_that_is_done_is_done():
    script = "import atexit\natexit.register(send)\n" + ours("print('done')\nreturn 0")
    assert ends(script) == (0, "done\n", "")


def test_a_job_in_the_background_ignores_what_its_shell_does():
    script = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    assert ends(script + ours("send()\nprint('done')")) == (0, "done\n", "")


def test_a_child_is_ended_alone():
    body = """
    child = os.fork()
    if not child:
        send(signal.SIGTERM)
        time.sleep(100)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status) == -signal.SIGTERM)
    """
    assert ends(ours(body)) == (0, "True\n", "")


def test_a_stopped_generation_ends_so(checkpoint):
    """The whole command: the signal comes as the first block of tokens is shown."""
    script = """
    from kvjax.decoding import detokenize

    del sys.modules["kvjax.cli"], kvjax.cli
    push = detokenize.TextRow.push

    def pushed(self, tokens):
        if self.tokens:
            send()
        return push(self, tokens)

    detokenize.TextRow.push = pushed
    main()
    """
    options = ["--model", checkpoint, "--prompt", TEXT[:99], "--max-new-tokens", 400]
    code, out, err = ends(script, arguments=["generate", *options])
    assert (code, err) == (130, LINE)
    assert out


def test_a_text_that_a_terminal_cannot_show_has_question_marks():
    env = dict(os.environ, PYTHONIOENCODING="latin-1")
    done = subprocess.run(
        [sys.executable, "-c", START + ours(r"print('caf\xe9, 5 \u20ac, \ud83d')")],
        capture_output=True,
        env=env,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"caf\xe9, 5 ?, ?\n"


@pytest.mark.parametrize("arguments", [["methods"], ["--version"]])
def test_a_reader_who_has_enough_is_no_mistake(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "kvjax", *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_streams_that_the_parent_has_closed(closed, tmp_path):
    """Nothing of one goes into another, and no file of ours takes a stream's number."""
    body = """
    with open("result", "w") as file:
        print("on stdout")
        print("on stderr", file=sys.stderr)
        print("in the file", file=file)
    return 0 if sys.stdin.read() == "" else 1
    """
    descriptors = " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(
        [
            *("sh", "-c", f'exec "$@" {descriptors}', "sh"),
            *(sys.executable, "-c", START + ours(body)),
        ],
        capture_output=True,
        text=True,
        input="",
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert (tmp_path / "result").read_text() == "in the file\n"
    assert done.stdout == ("" if 1 in closed else "on stdout\n")
    assert done.stderr == ("" if 2 in closed else "on stderr\n")
