"""Generated samples that can be answered only from earlier in the same sample.

Random tokens teach induction first; facts, chains and variables in text come on top.
A sample is written as pieces of text, each with a mark; half of its loss is on answers.
"""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

from kvjax.evaluation.tasks.words import WORDS
from kvjax.training.batch import Sample
from kvjax.training.data.text import Corpus, haystack

# What a piece of a sample's text is to the loss.
PLAIN, ANSWER, UNKNOWABLE = 0, 1, 2

Piece = tuple[str, int]

# The largest weight of an answer's token; a plain token of a text sample weighs 1.
MOST_WEIGHT = 50.0

# Of named values; the first of each is the form that the evaluation asks for.
PASSKEYS = (
    "The pass key is {value}. Remember it.\n",
    "The door code is {value}. Remember it.\n",
    "The magic number is {value}. Remember it.\n",
    "The secret word is {value}. Remember it.\n",
)
FACTS = (
    "key {name} has value {value}.\n",
    "{name}: {value}\n",
    "{name} = {value}\n",
    '"{name}": "{value}",\n',
    "The {name} number is {value}.\n",
)


def text(rng: np.random.Generator, corpus: Corpus, length: int) -> Sample:
    """A window of the corpus after its prefix; every target counts alike."""
    body = length + 1 - len(corpus.prefix)
    start = rng.integers(max(len(corpus.tokens) - body, 1))
    window = corpus.tokens[start : start + body]
    tokens = np.concatenate([np.array(corpus.prefix, np.int32), window])
    n = len(tokens) - 1
    return Sample(tokens, np.ones(n, np.float32), np.zeros(n, bool))


def repeat(rng: np.random.Generator, corpus: Corpus, length: int) -> Sample:
    """Random tokens, said over and over; the copies are the answers.

    The period is random, so no fixed offset predicts them: it takes induction.
    """
    most = min(length // 2, len(corpus.vocab))
    period = int(np.exp(rng.uniform(np.log(2), np.log(most))))
    # No token twice in a block, so that the last token alone tells the next one.
    block = rng.permutation(corpus.vocab)[:period]
    tokens = np.concatenate([corpus.prefix, np.resize(block, length)])
    tokens = tokens[: length + 1].astype(np.int32)
    targets = np.arange(1, len(tokens)) - len(corpus.prefix)
    answers = targets > period  # the first token of a copy is no surprise
    return Sample(tokens, answers.astype(np.float32), answers)


def recall(rng: np.random.Generator, corpus: Corpus, length: int) -> Sample:
    """Pairs (key, value) of tokens, then keys again in any order; values are asked."""
    most = max(min(length // 4, len(corpus.vocab) // 4), 2)
    num_pairs = int(rng.integers(1, most + 1))
    mixed = rng.permutation(corpus.vocab)
    keys, values = mixed[:num_pairs], rng.choice(mixed[num_pairs:], num_pairs)
    asked = rng.integers(num_pairs, size=max(length // 2 - num_pairs, 1))
    order = np.concatenate([np.arange(num_pairs), asked])
    pairs = np.stack([keys[order], values[order]], 1).ravel()
    tokens = np.concatenate([corpus.prefix, pairs])[: length + 1].astype(np.int32)
    place = np.arange(1, len(tokens)) - len(corpus.prefix)  # of a target in `pairs`
    answers = (place >= 2 * num_pairs) & (place % 2 == 1)
    return Sample(tokens, answers.astype(np.float32), answers)


def passkey(rng: np.random.Generator, corpus: Corpus, length: int) -> Sample:
    """One to four secret numbers between lines of text, each asked for at the end."""
    templates = [PASSKEYS[0], *rng.permutation(PASSKEYS[1:]).tolist()]
    count = 1 if rng.random() < 0.5 else int(rng.integers(2, len(templates) + 1))
    facts = [_Fact(template, "", _number(rng)) for template in templates[:count]]
    return _facts(rng, corpus, length, facts, questions=count)


def keys(rng: np.random.Generator, corpus: Corpus, length: int) -> Sample:
    """Named values between lines of text, asked for by name, many or few."""
    template = FACTS[0] if rng.random() < 0.6 else FACTS[rng.integers(len(FACTS))]
    most = max(2, min(length // 24, 16))
    names = rng.permutation(WORDS)[: int(rng.integers(1, most + 1))].tolist()
    facts = [_Fact(template, name, _number(rng)) for name in names]
    return _facts(rng, corpus, length, facts, questions=max(len(facts), length // 24))


def chain(rng: np.random.Generator, corpus: Corpus, length: int) -> Sample:
    """A shuffled list of keys `a-b`, then the chain `a-b, b-c, c-d` through it.

    The task of RefreshKV's section 3 (arXiv:2411.05787), as the evaluation words it.
    """
    # A key takes 4 tokens of the list, a link of the chain 5.
    most = min((length - 24) // 4, len(WORDS))
    num_keys = int(rng.integers(3, max(most, 4) + 1))
    words = rng.permutation(WORDS)[:num_keys].tolist()
    links = [f"{a}-{b}" for a, b in zip(words, words[1:] + words[:1], strict=True)]
    listed = "".join(f"{link}\n" for link in rng.permutation(links))
    num_links = max(min((length - 4 * num_keys - 8) // 5, num_keys - 1), 1)
    start = int(rng.integers(num_keys))
    steps = [words[(start + i) % num_keys] for i in range(num_links + 2)]
    pieces: list[Piece] = [(f"{listed}\nchain: {steps[0]}-{steps[1]}", PLAIN)]
    for here, there in itertools.pairwise(steps[1:]):
        pieces += [(f", {here}-", PLAIN), (there, ANSWER)]
    return _write(corpus, [*pieces, ("\n", PLAIN)], length)


def extraction(rng: np.random.Generator, corpus: Corpus, length: int) -> Sample:
    """A list in HTML, then a part of it as a table, row after row.

    After LongProc's HTML-to-TSV (arXiv:2501.05414), as the evaluation words it.
    """
    # An item takes 4 tokens of the list, a row of the table as many.
    most = min((length - 24) // 6, len(WORDS))
    count = int(rng.integers(2, max(most, 3) + 1))
    names = rng.permutation(WORDS)[:count].tolist()
    numbers = rng.choice(np.arange(100, 1000), count, replace=False).astype(str)
    pairs = list(zip(names, numbers.tolist(), strict=True))
    listed = "".join(f"{name} {number}\n" for name, number in pairs)
    num_rows = max(min((length - 4 * count - 16) // 4, count - 1), 1)
    start = int(rng.integers(count - num_rows + 1))
    asked = pairs[start : start + num_rows]
    table: list[Piece] = [(f"\ntable:\n{asked[0][0]}\t", PLAIN), (asked[0][1], ANSWER)]
    for name, number in asked[1:]:
        table += [("\n", PLAIN), (name, ANSWER), ("\t", PLAIN), (number, ANSWER)]
    said: list[Piece] = [(f"<pre>\n{listed}</pre>\n", PLAIN)]
    return _scatter(rng, corpus, length, [said], [[*table, ("\n", PLAIN)]])


def variables(rng: np.random.Generator, corpus: Corpus, length: int) -> Sample:
    """Assignments `b = a` of words that lead back to numbers; their values are asked.

    The task of RULER's variable tracking (arXiv:2404.06654), as the evaluation words
    it.
    """
    num_chains = int(rng.integers(1, max(1, min(length // 64, 5)) + 1))
    hops = int(rng.integers(1, 4))
    words = rng.permutation(WORDS)[: num_chains * (hops + 1)].reshape(num_chains, -1)
    numbers = [_number(rng) for _ in range(num_chains)]
    # Chains are shuffled together; inside a chain the order is kept.
    turns = rng.permutation(np.repeat(np.arange(num_chains), hops + 1))
    done = [0] * num_chains
    statements: list[list[Piece]] = []
    for which in turns.tolist():
        at = done[which]
        source = numbers[which] if at == 0 else str(words[which][at - 1])
        mark = UNKNOWABLE if at == 0 else PLAIN
        statements.append(
            [(f"{words[which][at]} = ", PLAIN), (source, mark), ("\n", PLAIN)]
        )
        done[which] += 1
    asked: list[list[Piece]] = [
        [(f"\n{words[which][-1]} = ", PLAIN), (numbers[which], ANSWER), ("\n", PLAIN)]
        for which in rng.permutation(num_chains).tolist()
    ]
    return _scatter(rng, corpus, length, statements, asked)


class _Fact:
    def __init__(self, template: str, name: str, value: str):
        before, self.after = template.replace("{name}", name).split("{value}")
        self.before, self.value = before, value


def _facts(rng, corpus, length, facts, questions) -> Sample:
    """States every fact once, then asks for them in turn, mixed up."""
    statements = [
        [(fact.before, PLAIN), (fact.value, UNKNOWABLE), (fact.after, PLAIN)]
        for fact in facts
    ]
    asked: list[list[Piece]] = []
    while len(asked) < questions:
        for index in rng.permutation(len(facts))[: questions - len(asked)]:
            fact = facts[index]
            gap = "\n" if not asked or rng.random() < 0.5 else ""
            asked.append(
                [(gap + fact.before, PLAIN), (fact.value, ANSWER), (fact.after, PLAIN)]
            )
    return _scatter(rng, corpus, length, statements, asked)


def _scatter(rng, corpus, length, statements, asked) -> Sample:
    """Statements at random places of a haystack that fills some of the room left."""
    sizes = sum(len(text) for group in (*statements, *asked) for text, _ in group)
    room = length * corpus.chars_per_token - 1.5 * sizes
    # Often dense, often full, and everything between: distance grows with the model.
    share = rng.choice([0.0, 1.0, rng.random()], p=[0.3, 0.3, 0.4])
    hay = haystack(rng, corpus, int(max(room, 0) * share))
    places = np.sort(rng.integers(len(hay) + 1, size=len(statements))).tolist()
    pieces: list[Piece] = []
    done = 0
    for place, group in zip(places, statements, strict=True):
        pieces += [("".join(hay[done:place]), PLAIN), *group]
        done = place
    pieces.append(("".join(hay[done:]), PLAIN))
    for group in asked:
        pieces += group
    return _write(corpus, pieces, length)


def _write(corpus: Corpus, pieces: Sequence[Piece], length: int) -> Sample:
    """Tokenises the pieces as one text; what does not fit is cut off at the end."""
    ids, offsets = corpus.encode("".join(text for text, _ in pieces))
    starts = [start for start, _ in offsets]
    kinds = np.full(len(ids), PLAIN)
    end = 0
    for content, mark in pieces:
        begin, end = end, end + len(content)
        if mark != PLAIN:
            first, last = (bisect.bisect_left(starts, at) for at in (begin, end))
            kinds[first:last] = mark
    tokens = np.concatenate([corpus.prefix, ids])[: length + 1].astype(np.int32)
    # Target i is token i + 1; the prefix itself is never one.
    kinds = np.concatenate([np.full(len(corpus.prefix), PLAIN), kinds])
    kinds = kinds[1 : length + 1]
    answers = kinds == ANSWER
    return Sample(tokens, _balance(answers, kinds == PLAIN), answers)


def _balance(answers: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Half of the weight on answers, half on the rest; a target weighs 1 on average."""
    half = len(answers) / 2
    heavy = min(half / max(int(answers.sum()), 1), MOST_WEIGHT)
    light = half / max(int(others.sum()), 1)
    return np.where(answers, heavy, np.where(others, light, 0)).astype(np.float32)


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))
