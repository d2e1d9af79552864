"""Interrupts at random moments: each command must end with code 130 and one line.

`python benchmarks/interrupts.py --tries 60` starts commands one after the other, sends
each a SIGINT (every fifth a SIGTERM) at a random moment of its life, from the one at
which it looks after signals, and prints what was not as it must be. A process that had
finished before its signal came counts as finished. Linux only: /proc tells the moment.
"""

import argparse
import collections
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

LINE = "kvjax: error: interrupted."
FAULTS = ("kvjax: error:", "Traceback")
CODE = 130
LONGEST = 60.0  # seconds after the signal
LOOKED_AFTER = getattr(signal, "SIGVTALRM", 0)  # caught by nobody else


def commands(folder: pathlib.Path, model: str) -> dict[str, tuple[list[str], float]]:
    """Arguments by name, and how many seconds a command may take before its signal."""
    text = folder / "book.txt"
    text.write_text("".join(f"line {i * 7919 % 1000} is here.\n" for i in range(4000)))
    of_model = ["--model", model] if model else []
    read = ["--prompt-file", str(folder / "short.txt"), *of_model]
    (folder / "short.txt").write_text(text.read_text()[:3000])
    generate = ["generate", *read, "--max-new-tokens", "600"]
    return {
        "imports": (["generate", "--prompt", "x", *of_model], 1.5),
        "generate": ([*generate, "--method", "quest:budget=128"], 12.0),
        "sampled": ([*generate, "--temperature", "1", "--stop", "@@@@"], 12.0),
        "prefill": (["prefill", *read, "--save", str(folder / "read")], 9.0),
        "stream": (["stream", "--text", str(text), *of_model, "--every", "64"], 12.0),
        "compare": (
            [
                *("compare", *of_model, "--out", str(folder / "report")),
                *("--overwrite", "--n", "2", "--method", "quest"),
            ],
            20.0,
        ),
    }


def is_guarded(process: subprocess.Popen) -> bool:
    """Says if a process looks after its signals by now."""
    try:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    (caught,) = (row.split()[1] for row in status.splitlines() if "SigCgt" in row)
    return bool(int(caught, 16) >> (LOOKED_AFTER - 1) & 1)


def one(arguments: list[str], delay: float, number: int) -> tuple[str, str]:
    """Runs a command and interrupts it; returns what became of it, and the details."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvjax", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    while process.poll() is None and not is_guarded(process):
        time.sleep(0.002)
    try:
        process.wait(delay)
        process.communicate()
        return "finished", f"code {process.returncode}"
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    sent = time.monotonic()
    try:
        _, err = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "WRONG", f"still there after {LONGEST} s"
    taken = time.monotonic() - sent
    lines = [row for row in err.splitlines() if not row.startswith("kvjax: note")]
    shown = [
        row for row in lines if row.startswith(FAULTS) or not row.startswith("kvjax")
    ]
    if process.returncode == 0 and not shown:
        return "finished", "as the signal came"
    if process.returncode != CODE or shown != [LINE]:
        return "WRONG", f"code {process.returncode}, stderr {err[-2000:]!r}"
    return "right", f"{taken:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="", help="the embedded one if left out")
    given = parser.parse_args()
    # A job in the background ignores it, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng = random.Random(given.seed)
    counts: collections.Counter = collections.Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        known = commands(folder, given.model)
        for index in range(given.tries):
            kind = list(known)[index % len(known)]
            arguments, most = known[kind]
            delay = rng.uniform(0.0, most)
            number = signal.SIGTERM if index % 5 == 4 else signal.SIGINT
            became, details = one(arguments, delay, number)
            left = [str(p.relative_to(folder)) for p in folder.rglob("*.partial*")]
            if left:
                became, details = "WRONG", f"{details}; left: {', '.join(left)}"
            if became == "right":
                slowest = max(slowest, float(details.split()[0]))
            counts[became] += 1
            print(
                f"{index:>3} {kind:<9}{delay:>6.2f} s  {became}: {details}", flush=True
            )
            if (folder / "read").exists():
                subprocess.run(["rm", "-r", str(folder / "read")], check=True)
    print(f"{dict(counts)}; the slowest end took {slowest:.2f} s")
    sys.exit(1 if counts["WRONG"] else 0)


if __name__ == "__main__":
    main()
