"""Drafts that lose nothing: tokens guessed cheaply, several checked in one exact pass.

`generate(model, "full", prompts, draft="streaming_llm:budget=512")`: the same model
drafts under a method that reads little; a smaller model does; or `draft="lookup"` finds
in the text what followed the last time that it ended so
(:class:`kvjax.decoding.lookup.Lookup`). What the target would not have said is taken
back. Greedy text is made of tokens that the exact pass holds for the likeliest, each
behind all those before it: that of single steps, unless two tokens are closer than
rounding can tell, since a pass adds up in another order than a step. Sampled text has
the distribution of single steps, and other random numbers.

A row's text depends on its prompt, the seed and its place in the batch, not on others.
"""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from kvjax import accounting
from kvjax.decoding import (
    checks,
    draft_states,
    instructions,
    lookup,
    loop,
    passes,
    reader,
    speculative,
    timing,
)
from kvjax.decoding.continuing import (
    SAMPLED,
    Drafts,
    Generation,
    behind,
    fresh_tail,
    generations,
    push,
    text_rows,
)
from kvjax.decoding.draft_states import Caches, Drafter
from kvjax.decoding.finite import not_finite
from kvjax.decoding.lookup import Lookup, Text
from kvjax.decoding.options import Drafting, Options
from kvjax.decoding.reader import Prefilled
from kvjax.decoding.sampling import active, mentioned, row_keys
from kvjax.interface import LanguageModel, Method
from kvjax.registry import as_method, parse

PROBES = 64  # token ids by which two vocabularies are compared


def wanted(
    draft: Method | str | None, tokens: int, model: LanguageModel | None
) -> Drafting | None:
    """Returns the options of drafts, or None: nobody drafts.

    A draft model without a method drafts under `full`.

    Raises:
        ValueError: if one is of another type or out of its range.
    """
    if draft is None and model is None:
        checks.check_counts(draft_tokens=tokens)
        return None
    method = lookup.parse(draft) if isinstance(draft, str) else None
    if method is None:
        method = parse("full") if draft is None else as_method(draft)
    return Drafting(method=method, tokens=tokens, model=model)


def drafter(model: LanguageModel, target: Method, drafts: Drafting) -> Drafter:
    """Returns who drafts and who checks.

    Raises:
        ValueError: if `target` cannot check a draft, the drafting method cannot make
            one, or the two models' tokens are not the same.
    """
    if not target.verifies or target.rewind is None:
        raise ValueError(
            f"{target} cannot check a draft: its steps are not attention to every "
            "token, or it cannot take tokens back. Use full, or quantize:bits=8+full, "
            f"and {target} as the draft."
        )
    method, other = drafts.method, drafts.model
    theirs = None if other is None else other.decoder
    for one in filter(None, (model, other)):
        checks.check_model(one, on_one_device="drafting")
    found = Drafter(model.decoder, target, method, drafts.tokens, theirs)
    speculative.check_decoder(model.decoder)
    if other is not None:
        check_same_tokens(model, other)
        speculative.check_decoder(other.decoder)
        if isinstance(method, Method) and method.rewind is None:
            raise ValueError(
                f"{method} cannot take back what a draft model read: use full or quest "
                "as its draft."
            )
    elif isinstance(method, Method) and method.rows > 1 and not found.is_shared:
        raise ValueError(
            f"{method} reads {method.rows} rows a step and cannot take tokens back: "
            "draft by retro+quest, or by a method of one row."
        )
    return found


def check_same_tokens(model: LanguageModel, other: LanguageModel) -> None:
    """Raises ValueError unless the tokens of two models mean the same.

    Of large vocabularies some are looked at.
    """
    sizes = model.decoder.vocab_size, other.decoder.vocab_size
    ids = np.unique(np.linspace(0, min(sizes) - 1, PROBES).astype(int)).tolist()
    texts = [[one.tokenizer.decode([token]) for token in ids] for one in (model, other)]
    if sizes[0] != sizes[1] or texts[0] != texts[1]:
        raise ValueError(
            f"the draft model {other.name} has another vocabulary, of {sizes[1]} "
            f"tokens, than {model.name}, of {sizes[0]}: draft by a model of the same "
            "tokenizer."
        )


def check_prompts(
    model: LanguageModel,
    other: LanguageModel | None,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    options: Options,
) -> None:
    """Raises ValueError unless the prompts fit who checks and who drafts."""
    most, method = options.max_new_tokens, drafter.method
    checks.check_prompts(model, drafter.target, prompts, most)
    if isinstance(method, Lookup):
        method = drafter.target
    elif other is not None:
        checks.check_prompts(other, method, prompts, most)
    else:
        checks.check_prompts(model, _reading(drafter), prompts, most)
    instructions.counts(method, prompts, options.instruction)


def _reading(drafter: Drafter) -> Method:
    """Returns the method that reads a prompt for the model's own drafts."""
    method = drafter.method
    if drafter.is_shared or isinstance(method, Lookup):
        return drafter.checking
    return draft_states.both(drafter.target, method)


def events(
    model: LanguageModel,
    other: LanguageModel | None,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    options: Options,
) -> Generator[tuple[int, str], None, list[Generation]]:
    """Continues prompts that were checked: yields `(row, new text)`.

    `other` is the draft model, if there is one.
    """
    seen = None
    if active(options.sampling).repetition_penalty is not None:
        seen = mentioned(prompts, model.decoder.vocab_size)
    prefilled, caches = read(model, other, drafter, prompts, options)
    params = model.params, None if other is None else other.params
    rows, counts = yield from go_on(
        model, drafter, params, prefilled, caches, options, seen
    )
    found = []
    for prompt, row, *numbers in zip(prompts, rows, *counts, strict=True):
        drafts = Drafts(*map(int, numbers))
        num_bytes = bytes_read(drafter, len(prompt), len(row.tokens), drafts)
        drafts = drafts._replace(bytes_per_token=num_bytes)
        found.append(row._replace(drafts=drafts))
    return found


def read(
    model: LanguageModel,
    other: LanguageModel | None,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    options: Options,
) -> tuple[Prefilled, Caches]:
    """Reads prompts for who checks and who drafts, with room for a draft too many."""
    most = options.max_new_tokens + drafter.width
    roomy = dataclasses.replace(options, max_new_tokens=most)
    method = drafter.method
    if other is not None and isinstance(method, Method):
        theirs = reader.read_whole(other, method, prompts, roomy)
        prefilled = reader.read_whole(model, drafter.target, prompts, roomy)
        caches = Caches(prefilled.states, theirs.states)
        return prefilled._replace(recent=theirs.recent), caches
    prefilled = reader.read_whole(model, _reading(drafter), prompts, roomy)
    if drafter.is_shared:
        return prefilled, Caches(prefilled.states, None)
    if isinstance(method, Lookup):
        capacity = reader.bucket(max(map(len, prompts)) + most)
        return prefilled, Caches(prefilled.states, lookup.begun(prompts, capacity))
    states: Any = prefilled.states
    target = tuple(state.target for state in states)
    return prefilled, Caches(target, tuple(state.draft for state in states))


def go_on(
    model: LanguageModel,
    drafter: Drafter,
    params: tuple[Any, Any],
    prefilled: Prefilled,
    caches: Caches,
    options: Options,
    seen: Bool[np.ndarray, "B V"] | None,
) -> Generator[tuple[int, str], None, tuple[list[Generation], passes.Counts]]:
    """Runs passes in blocks; yields as :func:`events`, and returns what rows produced.

    Beside that, the drafts of each.
    """
    decoder, width = model.decoder, drafter.width
    eos_array = np.array(sorted(options.ends(model)), np.int32)
    sampling, batch = active(options.sampling), len(prefilled.recent)
    keys = None if sampling.temperature is None else row_keys(options.seed, batch)
    given = passes.Given(keys, sampling, eos_array, np.int32(options.max_new_tokens))
    with timing.stretch("prompt"):
        window, tail, tokens = loop.first(SAMPLED)(
            decoder,
            model.params,
            prefilled.hidden,
            prefilled.recent,
            fresh_tail(batch, seen),
            (keys, sampling, eos_array),
        )
        pairs = zip(np.asarray(tokens).tolist(), np.asarray(tail.finite), strict=True)
        blocks = [[token] if is_finite else [] for token, is_finite in pairs]
    count = np.zeros(batch, np.int32)
    if isinstance(caches.draft, Text):  # its first token is chosen
        text = lookup.with_first(caches.draft, np.asarray(tokens))
        caches = caches._replace(draft=text)
    memory = passes.Memory(
        chosen=np.ones(batch, np.int32),
        done=np.asarray(tail.done),
        finite=np.asarray(tail.finite),
        seen=tail.seen,
        next_draft=np.full(batch, width - 1, np.int32),
        counts=passes.Counts(count, count, count),
    )
    rows = text_rows(model, options, behind(prefilled))
    size = -(-options.stream_every // width)
    part = timing.Stretch("decode")  # of the block; the first comes of the prompt
    while True:
        finite = np.asarray(memory.finite)
        yield from push(rows, blocks, part)
        done = np.array([row.finish_reason is not None for row in rows])
        if not (finite | done).all():
            row = int(np.argmin(finite | done))
            at = len(rows[row].tokens) + 1
            raise not_finite(decoder, f"at token {at} of row {row}")
        if done.all():
            return generations(rows), passes.Counts(*map(np.asarray, memory.counts))
        with timing.stretch("decode") as part:
            found = passes.run(
                drafter,
                size,
                params,
                caches,
                window,
                memory._replace(done=done, finite=np.ones(batch, bool)),
                given,
            )
            caches, window, memory = found.caches, found.window, found.memory
            blocks = _taken(found, np.asarray(memory.finite))


def _taken(found: passes.Passes, finite: Bool[np.ndarray, "B"]) -> list[list[int]]:
    """Returns the tokens that each row took; of a pass that is not finite none."""
    number = int(found.num_passes)
    tokens, taken = map(np.asarray, found.taken)
    blocks = []
    for row, is_finite in enumerate(finite):
        last = number if is_finite else number - 1
        blocks.append(
            [t for i in range(last) for t in tokens[i, row, : taken[i, row]].tolist()]
        )
    return blocks


def bytes_read(drafter: Drafter, prompt: int, tokens: int, drafts: Drafts) -> float:
    """Returns the bytes of caches read for each token of a row, on average.

    As the methods count them at the row's middle length; weights are not in it.
    """
    drafted, accepted, number, _ = drafts
    length, count = prompt + (tokens + 1) // 2, accounting.bytes_read
    other, steps = drafter.decoder, drafted
    if drafter.other is not None:
        other, steps = drafter.other, drafted + number  # each draft's last is fed too
    elif not drafter.is_shared:
        steps = drafted + accepted + number  # those that hold are fed again
    read = 0
    if isinstance(drafter.method, Method):
        read = steps * count(drafter.method, other, length, tokens)
    read += number * count(drafter.target, drafter.decoder, length, tokens)
    return read / tokens


def drop_programs() -> None:
    """Frees what was compiled of passes, for every method."""
    loop.free(passes.run)
