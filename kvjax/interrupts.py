"""Ctrl-C and SIGTERM on the command line: one line and exit code 130, at any moment.

Python raises KeyboardInterrupt between any two instructions of the main thread. In a
function that a library's C++ has called, to compare two keys or to trace a program, it
is lost or ends the process; and a process that leaves while XLA's threads compute may
crash on its way out. So a signal raises here only where no library is on the stack.
Elsewhere it waits until they have returned, or, if that takes long, ends the process
from another thread. Nothing of JAX is imported here: signals count before it is.
"""

import contextlib
import os
import pathlib
import select
import shutil
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Set
from types import CodeType, FrameType
from typing import NoReturn

CODE = 130  # as shells count: 128 and the number of SIGINT
LINE = "kvjax: error: interrupted."
PATIENCE = 2.0  # seconds to come to a place where it is safe to raise
UNWINDING = 60.0  # seconds to finish or remove what is half written
EVERY = 0.05  # seconds between two looks whether it is safe
AGAIN = 0.3  # seconds; a second signal within them is the same one, sent twice

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Has the main thread look again; nobody else uses it. Windows has none.
_LOOK = getattr(signal, "SIGVTALRM", None)

# Whose functions may be on the stack: ours, those of the parser of options, and the
# standard library's but for what removes files.
_ROOMS = tuple(
    str(pathlib.Path(__file__).parents[1] / room) + os.sep
    for room in ("kvjax", "models", "pallas_kernels")
)
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep
_INSTALLED = ("site-packages", "dist-packages")
_PARSERS = ("typer", "click")
_REMOVING = tuple(_STANDARD + name for name in ("shutil.py", "tempfile.py"))


class Interrupted(BaseException):
    """An interrupt, raised where it is safe; no handler of mistakes catches it."""


class Guard:
    """Looks after the signals of a process that is a command, from its making on.

    Until `begin` there is nothing to put right, and a signal ends the process at once.
    """

    def __init__(self):
        self._unfinished: Set[pathlib.Path] = frozenset()
        self._base: FrameType | None = None
        self._asked = self._raised = False
        self._said = threading.Lock()  # taken once, by whoever says the line
        self._process = os.getpid()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in _SIGNALS:
            # What the parent has ignored, as of jobs in the background, stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        if _LOOK is not None:
            signal.signal(_LOOK, self._handle)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self, unfinished: Set[pathlib.Path] = frozenset()) -> None:
        """Has signals raise :class:`Interrupted` in the caller and what it calls.

        `unfinished` are files and folders to remove where nothing can be raised.
        """
        self._unfinished = unfinished
        self._base = sys._getframe(1)

    def end(self) -> None:
        """Ignores signals from here on; leaves, if one came before."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self._asked:
            self.leave()

    def leave(self, *, said: bool = False) -> NoReturn:
        """Ends the process without Python's own way out, on which XLA may crash."""
        if said or self._said.acquire(blocking=False):
            if not said:
                with contextlib.suppress(OSError, ValueError, RuntimeError):
                    sys.stdout.flush()
                _say()
        else:
            time.sleep(1.0)  # another thread is saying it
        os._exit(CODE)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between two instructions of `frame`."""
        if number in _SIGNALS:
            self._asked = True
        if self._raised or not self._asked:
            return
        if self._base is None:
            self.leave()
        if _is_safe(frame, self._base):
            self._raised = True
            raise Interrupted

    def _watch(self) -> None:
        """Runs in a thread of its own: the main one may be in C++ for minutes."""
        self._arrived(None)
        start = time.monotonic()
        while time.monotonic() - start < self._patience():
            if self._arrived(EVERY) and time.monotonic() - start > AGAIN:
                break
            if _LOOK is not None and not self._raised:
                # A real one: the main thread may sleep.
                signal.pthread_kill(threading.main_thread().ident or 0, _LOOK)
        if not self._said.acquire(blocking=False):
            time.sleep(1.0)
        else:
            for path in list(self._unfinished):
                shutil.rmtree(path, ignore_errors=True)
            _say()
        os._exit(CODE)

    def _patience(self) -> float:
        return UNWINDING if self._raised or self._unfinished else PATIENCE

    def _arrived(self, seconds: float | None) -> bool:
        """Waits for a signal, so long at most; those of `_LOOK` are none."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if end is None else max(end - time.monotonic(), 0.0)
            if not select.select([self._reader], [], [], left)[0]:
                return False
            if any(number in _SIGNALS for number in self._reader.recv(4096)):
                return True

    def _forget(self) -> None:
        """Gives a child its signals back: whoever ends it means it alone."""
        signal.set_wakeup_fd(-1)
        for number in (*_SIGNALS, *(() if _LOOK is None else (_LOOK,))):
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL)


def _is_safe(frame: FrameType | None, base: FrameType) -> bool:
    """Says if every function from `frame` down to `base` can take an exception."""
    while frame is not None and frame is not base:
        if not _can_raise(frame.f_code):
            return False
        frame = frame.f_back
    return frame is base


def _can_raise(code: CodeType) -> bool:
    # Special methods are called by C++ too: `__eq__` of a static argument of a jitted
    # function. And what `__exit__` puts right must not be broken off.
    is_special = code.co_name.startswith("__") and code.co_name != "__call__"
    file = code.co_filename
    if is_special or file.startswith(_REMOVING):
        return False
    if file.startswith(_ROOMS):
        return True
    parts = pathlib.PurePath(file).parts
    for folder in _INSTALLED:
        if folder in parts:
            package = parts[parts.index(folder) + 1 :][:1]
            return package[0] in _PARSERS if package else False
    return file.startswith(_STANDARD)


def _say() -> None:
    """Writes the line past Python's buffers, whose locks another thread may hold."""
    # A terminal has shown ^C in the line before; a progress bar has hidden its cursor.
    begin = "\n\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{begin}{LINE}\n".encode())
