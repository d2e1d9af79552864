"""What the embedded models learn from: Python's own sources and generated retrieval.

Text comes from the standard library of the running interpreter, minus `HELD_OUT`. The
retrieval rows ask, in tokens or in text, for something said earlier in the same row.
"""

import bisect
import functools
import pathlib
import re
import sysconfig
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Never trained on, neither as text nor as a haystack; `heldout.txt` is made of them.
HELD_OUT = (
    "argparse.py",
    "calendar.py",
    "csv.py",
    "difflib.py",
    "fractions.py",
    "heapq.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
)

HELD_OUT_FILE = pathlib.Path(__file__).parent / "heldout.txt"

# Tests repeat themselves, tables of code points teach nothing, vendored code is not
# under the PSF licence.
EXCLUDED_FOLDERS = frozenset(
    {
        *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
        *("test", "tests", "idle_test", "turtledemo", "__phello__"),
        *("encodings", "ensurepip", "lib2to3"),
    }
)
EXCLUDED_FILES = re.compile(r"_sysconfigdata.*|entities\.py|stringprep\.py|this\.py")

BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")

PASSKEY = "The pass key is {value}. Remember it.\n"
KEY = "key {name} has value {value}.\n"
VARIANTS = (
    "The {name} is {value}. Remember it.\n",
    "The {name} key is {value}.\n",
    "{name} = {value}\n",
    "value of {name}: {value}\n",
)


class Row(NamedTuple):
    """One training sequence of T targets.

    tokens (T + 1,) int32; weights (T,) float32, of the loss at each target, sum 1;
    answers (T,) bool, the targets that can be known only from earlier in the row.
    """

    tokens: np.ndarray
    weights: np.ndarray
    answers: np.ndarray


class Fact(NamedTuple):
    """One mention of a value in a text: characters [start, end) of its digits."""

    start: int
    end: int
    key: int


class Corpus(NamedTuple):
    """Text in the two forms that rows are cut from, and how to tokenise more of it."""

    lines: Sequence[str]  # with their line ends
    tokens: np.ndarray  # (N,) uint16, the same text
    words: Sequence[str]  # names for keys
    encode: Callable  # text -> tokenizers.Encoding, no special tokens
    decode: Callable  # ids -> text
    chars_per_token: float


def stdlib_files() -> list[pathlib.Path]:
    """Sources of the standard library, in a fixed order, held-out modules included."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        wanted = EXCLUDED_FOLDERS.isdisjoint(inside.parts[:-1])
        if wanted and not EXCLUDED_FILES.fullmatch(path.name):
            found.append(inside)
    return [root / inside for inside in sorted(found, key=lambda p: p.as_posix())]


def training_files() -> list[pathlib.Path]:
    """The files that are trained on: `stdlib_files` without `HELD_OUT`."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in stdlib_files()
        if path.relative_to(root).as_posix() not in HELD_OUT
    ]


def read(paths: Sequence[pathlib.Path]) -> list[str]:
    """The UTF-8 texts of `paths`, with Unix line ends; others are left out."""
    texts = []
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        texts.append(text.replace("\r\n", "\n"))
    return texts


def held_out_source() -> str:
    """The text of `heldout.txt`, from the running interpreter's held-out modules."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    header = (
        "# Sources of Python's standard library (see LICENSE-PYTHON.txt), copyright\n"
        "# Python Software Foundation, PSF License Agreement. Never trained on.\n"
    )
    return header + "".join(read([root / name for name in HELD_OUT]))


def words_of(texts: Sequence[str]) -> list[str]:
    """Lower-case words of 3 to 8 letters that occur at least five times, sorted."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in re.findall(r"\b[a-z]{3,8}\b", text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(word for word, count in counts.items() if count >= 5)


def make_corpus(texts: Sequence[str], tokenizer) -> Corpus:
    """Tokenises `texts`, one beginning-of-sequence token before each."""
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    pieces = [np.array([BOS, *encoding.ids], np.uint16) for encoding in encodings]
    tokens = np.concatenate(pieces)
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    return Corpus(
        lines=lines,
        tokens=tokens,
        words=words_of(texts),
        encode=functools.partial(tokenizer.encode, add_special_tokens=False),
        decode=tokenizer.decode,
        chars_per_token=sum(map(len, texts)) / len(tokens),
    )


def text_row(rng: np.random.Generator, corpus: Corpus, length: int) -> Row:
    """A window of the text after a beginning-of-sequence token; every target counts."""
    start = rng.integers(len(corpus.tokens) - length)
    tokens = np.empty(length + 1, np.int32)
    tokens[0] = BOS
    tokens[1:] = corpus.tokens[start : start + length]
    weights = np.full(length, 1 / length, np.float32)
    return Row(tokens, weights, np.zeros(length, bool))


def repeat_row(rng: np.random.Generator, vocab_size: int, length: int) -> Row:
    """Random tokens, said over and over; the copies are the answers.

    The period is random, so no fixed offset predicts them: it takes induction.
    """
    most = min(length // 2, vocab_size - len(SPECIAL_TOKENS))
    period = int(np.exp(rng.uniform(np.log(2), np.log(most))))
    # No token twice in a block, so that the last token alone tells the next one.
    alphabet = rng.permutation(np.arange(len(SPECIAL_TOKENS), vocab_size))
    block = alphabet[:period]
    tokens = np.empty(length + 1, np.int32)
    tokens[0] = BOS
    tokens[1:] = np.resize(block, length)
    answers = np.arange(length) > period  # the first token of a copy is no surprise
    return Row(tokens, _spread(answers), answers)


def recall_row(rng: np.random.Generator, vocab_size: int, length: int) -> Row:
    """Pairs (key, value) of tokens, then keys again in any order; values are asked."""
    num_pairs = int(rng.integers(2, min(length // 4, vocab_size // 8) + 1))
    alphabet = rng.permutation(np.arange(len(SPECIAL_TOKENS), vocab_size))
    keys = alphabet[:num_pairs]
    values = rng.choice(alphabet[num_pairs:], num_pairs)
    asked = rng.integers(num_pairs, size=length // 2 - num_pairs)
    order = np.concatenate([np.arange(num_pairs), asked])
    tokens = np.full(length + 1, PAD, np.int32)
    tokens[0] = BOS
    tokens[1 : 1 + 2 * len(order)] = np.stack([keys[order], values[order]], 1).ravel()
    answers = np.zeros(length, bool)
    answers[2 * num_pairs + 1 : 2 * len(order) : 2] = True
    return Row(tokens, _spread(answers), answers)


def fact_text(
    rng: np.random.Generator,
    corpus: Corpus,
    num_chars: int,
    *,
    num_mentions: int,
    num_keys: int,
    passkey: bool = False,
    variants: float = 0.25,
) -> tuple[str, list[Fact]]:
    """Lines of the corpus with facts between them, ending in a question and its answer.

    Args:
        num_chars: of the whole text, about.
        num_mentions: statements in the text, the last one the question.
        num_keys: different facts among them; every one is said before it is asked.
        passkey: use the pass key's template rather than named keys.
        variants: chance that both give way to one of the `VARIANTS`.

    Returns:
        The text, which ends right after the last digit, and every mention in order.
    """
    template, names, values = _facts(rng, corpus, num_keys, passkey, variants)
    # Any order in which the last mention is not the first of its key.
    order = [*range(num_keys), *rng.integers(num_keys, size=num_mentions - num_keys)]
    order = [int(key) for key in rng.permutation(order[:-1])] + [int(order[-1])]

    statements = []
    for index, key in enumerate(order):
        before, after = template.replace("{name}", names[key]).split("{value}")
        # A question begins with an empty line, a statement does not; both are trained.
        repeated = key in order[:index]
        gap = (
            "\n" if index + 1 == len(order) or (repeated and rng.random() < 0.5) else ""
        )
        statements.append((gap + before, values[key], after, key))

    room = num_chars - sum(len(b) + len(v) + len(a) for b, v, a, _ in statements)
    hay = _hay(rng, corpus, max(room, 0))
    places = [*sorted(rng.integers(len(hay) + 1, size=len(order) - 1)), len(hay)]
    pieces, facts, size, done = [], [], 0, 0
    for place, (before, value, after, key) in zip(places, statements, strict=True):
        text = "".join(hay[done:place]) + before
        start = size + len(text)
        facts.append(Fact(start, start + len(value), key))
        pieces.append(text + value + after)
        size, done = size + len(pieces[-1]), place
    return "".join(pieces)[: facts[-1].end], facts


def fact_row(
    rng: np.random.Generator,
    corpus: Corpus,
    length: int,
    *,
    passkey: bool,
    dense: bool,
    variants: float = 0.25,
) -> Row:
    """A text of `fact_text` as a row: half the loss on the answers, half on the rest.

    Args:
        length: targets in the row; what does not fit is cut off at the front.
        dense: many questions along the row rather than one at its end.
        passkey, variants: as in :func:`fact_text`.
    """
    most = max(2, length // 24)
    if dense:
        num_mentions = int(rng.integers(2, most + 1))
        num_keys = 1 if passkey else int(rng.integers(1, num_mentions // 2 + 1))
        num_mentions = min(num_mentions, 6) if passkey else num_mentions
    else:
        num_keys = 1 if passkey else int(rng.integers(1, min(most, 9)))
        num_mentions = num_keys + 1
    num_chars = int(length * corpus.chars_per_token * rng.uniform(0.75, 1.0))
    text, facts = fact_text(
        rng,
        corpus,
        num_chars,
        num_mentions=num_mentions,
        num_keys=num_keys,
        passkey=passkey,
        variants=variants,
    )
    encoding = corpus.encode(text)
    return _masked(np.array(encoding.ids), encoding.offsets, facts, length)


def _masked(ids, offsets, facts, length) -> Row:
    cut = max(0, len(ids) - length)
    starts = [start for start, _ in offsets]
    tokens = np.full(length + 1, PAD, np.int32)
    tokens[0] = BOS
    tokens[1 : 1 + len(ids) - cut] = ids[cut:]
    answers = np.zeros(length, bool)
    others = np.zeros(length, bool)
    others[: len(ids) - cut] = True
    said = set()
    for fact in facts:
        first = bisect.bisect_left(starts, fact.start) - cut
        last = bisect.bisect_left(starts, fact.end) - cut
        if first < 0:
            continue
        # Target i is token i + 1, and token 0 is BOS: the indices agree.
        others[first:last] = False
        answers[first:last] = fact.key in said
        said.add(fact.key)
    weights = 0.5 * _spread(answers) + 0.5 * _spread(others)
    return Row(tokens, weights / max(weights.sum(), 1e-9), answers)


def _facts(rng, corpus, num_keys, passkey, variants):
    names = [corpus.words[i] for i in rng.permutation(len(corpus.words))[:num_keys]]
    values = [f"{value:05d}" for value in rng.integers(100_000, size=num_keys)]
    canonical = PASSKEY if passkey else KEY
    variant = VARIANTS[rng.integers(len(VARIANTS))]
    return (variant if rng.random() < variants else canonical), names, values


def _hay(rng, corpus, num_chars) -> list[str]:
    start = int(rng.integers(len(corpus.lines)))
    lines = []
    while num_chars > 0:
        line = corpus.lines[start % len(corpus.lines)]
        start, num_chars = start + 1, num_chars - len(line)
        lines.append(line)
    # The last line would overshoot, which pushes the first fact out of the row.
    return lines[:-1]


def _spread(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.float32) / max(int(mask.sum()), 1)
