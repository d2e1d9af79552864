"""Questions asked after their context was read and ended: one reading for all of them.

An evicting method then chooses what to keep before it knows what will be asked, as it
must where one context serves many questions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from kvjax.decoding import asking, feeding, finite
from kvjax.decoding.checks import check_prompts
from kvjax.decoding.options import Options
from kvjax.decoding.reader import Prefilled
from kvjax.evaluation import batches, together
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.interface import LanguageModel, Method

# A question is seen when a method chooses, as the prompt's end, or comes after that.
When = Literal["seen", "after"]

# (place of the method, number of the example, answer)
OnAnswer = Callable[[int, int, str], None]


def answers(
    model: LanguageModel,
    methods: Sequence[Method],
    examples: Sequence[Prompted],
    *,
    new_tokens: int,
    batch: int,
    chunk_size: int = 512,
    longest: int = 0,
    room: int = 0,
    keep_logits: bool = False,
    beside: Sequence[Method] = (),
    threads: int = 1,
    on_answer: OnAnswer = lambda place, index, said: None,
    progress: Callable[[float], None] = lambda done: None,
) -> list[list[str]]:
    """Reads each context once, then asks all questions about it, under each method.

    Contexts are read by `batch` rows, or by as many as there are different ones, and
    asked by `batch` questions, of whichever of these rows. Examples share a context if
    their tokens before `asked_at` are equal.

    Args:
        methods: which read together; several must all have exact prompts.
        new_tokens: most tokens of an answer.
        longest: tokens of a context to make room for, where none is so long.
        room: tokens to make room for behind a context, if more than these take.
        keep_logits, beside, threads: as :func:`kvjax.evaluation.compare_runs.retrieve`.
        on_answer: called with a method's place, the number of an example and what was
            answered, as it comes; with several threads a method's at a time.

    Returns:
        The answers of each method, one an example, in order.

    Raises:
        ValueError: if an example has no context, and as
            :func:`kvjax.decoding.generate.generate`.
    """
    _check(model, methods, examples, new_tokens)
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        context = tuple(example.prompt[: example.asked_at])
        by_context.setdefault(context, []).append(index)
    contexts = list(by_context)
    rows = min(batch, len(contexts))
    size = min(batch, len(examples))
    asked = _Asked(model, examples, new_tokens, size, keep_logits)
    room = max(room, asked.room)
    options = Options(max_new_tokens=room, chunk_size=chunk_size, longest=longest)
    said: list[dict[int, str]] = [{} for _ in methods]
    for start in range(0, len(contexts), rows):
        group = [contexts[i % len(contexts)] for i in range(start, start + rows)]
        fresh = len(contexts) - start  # rows from there on only fill the batch up
        pairs = [
            (row, index)
            for row, context in enumerate(group)
            for index in by_context[context][: None if row < fresh else 1]
        ]
        batches.release()
        read = together.read_checked(model, [*beside, *methods], group, options)
        batches.release()

        def answered(place, read=read, pairs=pairs):
            with batches.told_apart(place):
                begun = read.take(len(beside) + place)
                yield from asked.answers(methods[place], begun, rows, pairs)

        def whole(place, answered=answered):
            return list(answered(place))

        places = range(len(methods))
        job = answered if threads == 1 else whole
        for place, found in enumerate(batches.at_once(job, places, threads)):
            for index, tokens in found:
                if index not in said[place]:
                    answer = batches.reply(model, examples[index], tokens)
                    said[place][index] = answer
                    on_answer(place, index, answer)
            done = min(rows, fresh) * (place + 1) / len(methods)
            progress((start + done) / len(contexts))
        read.drop()
    return [[found[index] for index in range(len(examples))] for found in said]


class _Asked(NamedTuple):
    """The questions of all examples, and the sizes that their batches share."""

    model: LanguageModel
    examples: Sequence[Prompted]
    new_tokens: int
    size: int  # questions that are asked together
    keep_logits: bool

    @property
    def longest(self) -> int:
        """The tokens of the longest question."""
        return max(len(x.prompt) - x.asked_at for x in self.examples)

    @property
    def room(self) -> int:
        """The tokens that may follow a context: of a question and its answer."""
        return self.longest + self.new_tokens

    def answers(
        self,
        method: Method,
        prefilled: Prefilled,
        rows: int,
        pairs: Sequence[tuple[int, int]],
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields examples and tokens behind them; of what fills a batch up some twice.

        Args:
            prefilled: the contexts, `rows` of them; used up.
            pairs: of each question the row of its context, and its example.
        """
        allowed = asking.allows_rows(method, prefilled, self.size)
        parts = list(batches.equal(pairs, self.size if allowed else rows))
        for number, part in enumerate(parts, 1):
            examples = [self.examples[index] for _, index in part]
            # A few tokens more than the answer's: text may begin with a blank.
            longest = max(example.answer_tokens for example in examples) + 2
            steps = min(longest, self.new_tokens)
            places = [row for row, _ in part]
            is_last = number == len(parts)
            begun = prefilled
            if not is_last or places != list(range(len(prefilled.recent))):
                begun = asking.taken(method, prefilled, places)
            # A row whose question is short answers while others are still asked.
            sizes = [len(example.prompt) - example.asked_at for example in examples]
            shape = len(part), max(sizes) + steps
            wanted = np.full(shape, feeding.CHOOSE, np.int32)
            for row, (example, size) in enumerate(zip(examples, sizes, strict=True)):
                wanted[row, :size] = example.prompt[example.asked_at :]
            fed = feeding.feed(
                self.model,
                method,
                begun,
                wanted,
                return_logits=self.keep_logits,
                until_end=True,
            )
            finite.check_rows(self.model.decoder, fed.log_probs)
            for row, (_, index) in enumerate(part):
                yield index, fed.tokens[row, sizes[row] : sizes[row] + steps].tolist()


def _check(
    model: LanguageModel,
    methods: Sequence[Method],
    examples: Sequence[Prompted],
    new_tokens: int,
) -> None:
    """Raises ValueError unless all have a context and fit, with their answer."""
    for index, example in enumerate(examples):
        if example.asked_at < 1:
            raise ValueError(
                f"example {index} has no context that could be read before its "
                "question: give it one, or ask with question='seen'."
            )
    prompts = [example.prompt for example in examples]
    ends = [example.asked_at for example in examples]
    check_prompts(model, together.as_one(methods), prompts, new_tokens, ends)
