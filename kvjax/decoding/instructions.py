"""Instructions: the ends of prompts, for methods that are shown them early.

Where one begins is the caller's word. In which order context and instruction are read
is :class:`kvjax.hooks.Asked`'s, here as a list of acts for the reader.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

from kvjax.decoding.cutting import Chunk, bucket, cut
from kvjax.hooks import Asked
from kvjax.interface import Method

# What the reader does: with tokens by `prefill` or `probe`, or else to the states.
Act = tuple[str, Chunk | None]


def given(
    instruction: int | Sequence[int] | None,
) -> int | tuple[int, ...] | None:
    """Returns tokens of an instruction, or of one a prompt, as Python integers.

    Raises:
        ValueError: if one is no integer of at least 1.
    """
    if instruction is None:
        return None
    value: Any = instruction  # of any type, from a user
    is_list = hasattr(value, "__iter__") and not isinstance(value, str)
    parts: list[Any] = list(value) if is_list else [value]
    counts = []
    for part in parts:
        try:
            counts.append(operator.index(part))
        except TypeError:
            counts.append(0)
        if isinstance(part, bool) or counts[-1] < 1:
            raise ValueError(
                f"instruction={part!r} must be a number of tokens at a prompt's end, "
                "at least 1, or a list with one for each prompt."
            )
    return tuple(counts) if is_list else counts[0]


def counts(
    method: Method,
    prompts: Sequence[Sequence[int]],
    instruction: int | Sequence[int] | None,
) -> list[int]:
    """Returns the tokens of each prompt's instruction.

    Args:
        method: if it wants no instruction, there is none.
        prompts: of which these are the ends.
        instruction: of all prompts, or of each; None is what the method takes.

    Raises:
        ValueError: if the method wants none and one is given, if there are not as many
            as prompts, or one is longer than its prompt or than the method's stride.
    """
    asked = method.hooks.asked
    if asked is None:
        if instruction is not None:
            raise ValueError(
                f"{instruction=} is given to {method!r}: only methods that select by "
                "the question take it: citrus."
            )
        return [0] * len(prompts)
    if instruction is None:
        return [min(asked.tokens, len(prompt)) for prompt in prompts]
    told = given(instruction)
    told = [told] * len(prompts) if isinstance(told, int) else list(told or ())
    if len(told) != len(prompts):
        raise ValueError(
            f"instruction has {len(told)} numbers for {len(prompts)} prompts: give one "
            "for each, or one for all."
        )
    for row, (count, prompt) in enumerate(zip(told, prompts, strict=True)):
        if count > len(prompt):
            raise ValueError(
                f"instruction={count} exceeds the {len(prompt)} tokens of prompt "
                f"{row}: it is a part of the prompt, its end."
            )
        if count > asked.stride:
            raise ValueError(
                f"instruction={count} of prompt {row} exceeds stride={asked.stride}: "
                "shorten it, or raise stride."
            )
    return told


def of_questions(
    asked: Asked, prompts: Sequence[Sequence[int]], starts: Sequence[int]
) -> tuple[int, ...]:
    """Returns the tokens of questions that begin at `starts`; of long ones the last."""
    pairs = zip(prompts, starts, strict=True)
    sizes = (len(prompt) - start for prompt, start in pairs)
    return tuple(max(1, min(size, asked.stride)) for size in sizes)


def acts(
    asked: Asked,
    prompts: Sequence[Sequence[int]],
    told: Sequence[int],
    chunk_size: int,
) -> Iterator[Act]:
    """Yields how prompts are read that end in instructions of `told` tokens.

    Args:
        asked: what the method wants.
        prompts: with their instructions.
        told: tokens of each instruction, at least 1.
        chunk_size: most context tokens at once.
    """
    pairs = list(zip(prompts, told, strict=True))
    contexts = [prompt[: len(prompt) - count] for prompt, count in pairs]
    ends = [prompt[len(prompt) - count :] for prompt, count in pairs]
    (instruction,) = cut(ends, bucket(max(told)))
    longest = max(map(len, contexts))
    every = max(longest, 1) if asked.votes_once else asked.stride
    for start in range(0, longest, every):
        if start:
            yield "probe", instruction
        chunk = [context[start : start + every] for context in contexts]
        for part in cut(chunk, min(chunk_size, every)):
            yield "read", part
    yield "close", None
    yield "probe", instruction
    yield "settle", None
    yield "read", instruction
