"""The command line's way in: `kvjax`, or `python -m kvjax`, and the way out."""

import os
import sys

from kvjax import interrupts


def main() -> None:
    """Runs the command line.

    Exit code 0, 2 (a user's mistake), 130 (interrupted), or 1: of training that was
    stopped, saved and can be resumed.
    """
    _open_streams()
    guard = interrupts.Guard()
    # A terminal or a pipe that is not UTF-8 gets a ? for what it cannot show.
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    import kvjax.cli  # takes seconds: signals count already
    from kvjax import files

    try:
        guard.begin(files.UNFINISHED)
        code = kvjax.cli.run(sys.argv[1:])
        guard.end()
    except interrupts.Interrupted:
        guard.leave()
    if code == interrupts.CODE:
        guard.leave(said=True)
    sys.exit(code)


def _open_streams() -> None:
    """Opens what the parent has closed, before a file of ours gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  stays
            setattr(sys, name, stream)


if __name__ == "__main__":
    main()
