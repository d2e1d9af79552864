"""The command line's way in: `kvjax`, or `python -m kvjax`, and the way out."""

import sys

from kvjax import interrupts


def main() -> None:
    """Runs the command line.

    Exit code 0, 2 (a user's mistake), 130 (interrupted), or 1: of training that was
    stopped, saved and can be resumed.
    """
    guard = interrupts.Guard()
    if sys.stdout is not None:
        # A terminal or a pipe that is not UTF-8 gets a ? for what it cannot show.
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore
    import kvjax.cli  # takes seconds: signals count already

    try:
        guard.begin()
        code = kvjax.cli.run(sys.argv[1:])
        guard.end()
    except interrupts.Interrupted:
        guard.leave()
    if code == interrupts.CODE:
        guard.leave(said=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
