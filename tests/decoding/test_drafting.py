"""Drafts that lose nothing: the text is that of single steps, whoever drafts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chi_square import distance
from tiny import ByteTokenizer, PairTokenizer, tiny_model

import kvjax
import models
from kvjax import accounting, registry
from kvjax.decoding import draft_states, drafting, lookup, passes, reader
from kvjax.decoding.generate import continued, generate, stream
from kvjax.decoding.options import Drafting
from kvjax.decoding.sampling import Sampling, active, filter_logits
from kvjax.rope import Rope
from kvjax.stores import buffers
from models import embedded

PROMPTS = (9, 4, 14)
NEW, DRAFT = 31, 4  # up to three tokens fewer take the same room
NOTHING = 259  # an EOS that no row says
# Wrong at times and right at times; always right.
SMALL = "streaming_llm:budget=12,num_sinks=1"
ALL = "streaming_llm:budget=64"


@functools.cache
def example():
    """A model, prompts of many lengths, and what full attention says behind them."""
    model = tiny_model(seed=2, num_layers=1)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 256, n).tolist() for n in PROMPTS]
    found = generate(model, "full", prompts, max_new_tokens=NEW, eos_ids=(NOTHING,))
    expected = [generation.tokens for generation in found]
    assert all(NOTHING not in row for row in expected)
    return model, prompts, expected


def drafted(draft=SMALL, **options):
    model, prompts, _ = example()
    options = {"max_new_tokens": NEW, "eos_ids": (NOTHING,)} | options
    return generate(model, "full", prompts, draft=draft, draft_tokens=DRAFT, **options)


def check_counts(rows):
    """What is said of drafts adds up to what was generated."""
    for row in rows:
        drafts = row.drafts
        # The first token is the prompt's; a pass gives one more than it accepts.
        assert len(row.tokens) == 1 + drafts.passes + drafts.accepted
        assert drafts.accepted <= drafts.drafted <= DRAFT * drafts.passes


@pytest.mark.parametrize(
    "draft", [SMALL, "retro:window=3+quest:budget=8,page_size=4", None]
)
def test_greedy_text_is_that_of_single_steps(draft):
    """By a state of its own, by the only cache there is, and by another model.

    Each row accepts its own number.
    """
    model = tiny_model(seed=3, num_layers=1) if draft is None else None
    _, _, expected = example()
    rows = drafted(draft, draft_model=model)
    assert [row.tokens for row in rows] == expected
    check_counts(rows)
    if draft is not None:
        accepted = [row.drafts.accepted for row in rows]
        assert min(accepted) > 0
        assert len(set(accepted)) > 1
        assert any(row.drafts.accepted < row.drafts.drafted for row in rows)


def test_rows_in_a_hosts_memory_draft():
    """Of a batch each keeps its own, though a host chooses nothing."""
    rows = drafted("offload:cache=0+token_select:budget=8")
    assert [row.tokens for row in rows] == example()[2]
    check_counts(rows)
    assert len({row.drafts.accepted for row in rows}) > 1


def test_a_trained_model_says_the_same():
    """Over 256 tokens behind four passages; none differs."""
    model = models.load("embedded-softmax")
    tokens = model.tokenizer.encode(embedded.heldout_text())
    prompts = [tokens[700 * i : 700 * i + 200 + 40 * i] for i in range(4)]
    how = {"max_new_tokens": 64, "eos_ids": ()}
    plain = generate(model, "full", prompts, **how)
    rows = generate(model, "full", prompts, draft="snapkv:budget=64", **how)
    assert [row._replace(drafts=None) for row in rows] == plain
    accepted = sum(row.drafts.accepted for row in rows)
    assert 0 < accepted < sum(row.drafts.drafted for row in rows)


def test_a_row_ends_wherever_in_a_draft():
    """By an EOS token, a stop string, and the number of tokens; others go on."""
    _, _, expected = example()
    rows = drafted(ALL)
    assert [row.tokens for row in rows] == expected
    for row in rows:  # drafts grow to the longest, and only the end cuts them
        assert row.drafts.accepted == row.drafts.drafted
        assert row.drafts.passes == 6
    check_counts(rows)
    programs = passes.run._cache_size()
    for place in (2, 4, 5, 6):  # in passes of 5 tokens, behind the first
        token = expected[0][place]
        found = drafted(ALL, eos_ids=(token,))
        for row, own in zip(found, expected, strict=True):
            end = own.index(token) + 1 if token in own else NEW
            assert row.tokens == own[:end]
            assert row.finish_reason == ("eos" if token in own else "length")
        found = drafted(ALL, max_new_tokens=NEW - place % 4)
        assert [row.tokens for row in found] == [
            row[: NEW - place % 4] for row in expected
        ]
        check_counts(found)
        stop = (ByteTokenizer().decode(expected[1][place : place + 2]),)
        model, prompts, _ = example()
        how = {"max_new_tokens": NEW, "eos_ids": (NOTHING,), "stop": stop}
        plain = generate(model, "full", prompts, **how)
        assert plain[1].finish_reason == "stop"
        assert [row._replace(drafts=None) for row in drafted(ALL, stop=stop)] == plain
    assert passes.run._cache_size() == programs, "no length compiles anew"


def test_a_row_does_not_see_the_others():
    """Sampled, with a penalty; and text comes in pieces."""
    model, prompts, _ = example()
    how = {
        "sampling": Sampling(temperature=0.7, top_k=40, repetition_penalty=1.2),
        "draft": SMALL,
        "draft_tokens": DRAFT,
        "max_new_tokens": NEW,
        "seed": 3,
    }
    rows = generate(model, "full", prompts, **how)
    beside = [prompts[0], prompts[2], prompts[1]]
    (alone, *others) = generate(model, "full", beside, **how)
    assert alone == rows[0]
    assert others != rows[1:]
    pieces = ["", "", ""]
    for row, text in stream(model, "full", prompts, **how):
        pieces[row] += text
    assert pieces == [row.text for row in rows]


def test_a_repetition_penalty_knows_the_draft():
    """Greedy: what a draft says itself is penalised behind it, as by single steps."""
    model, prompts, _ = example()
    how = {"sampling": Sampling(repetition_penalty=1.4), "max_new_tokens": NEW}
    plain = generate(model, "full", prompts, eos_ids=(NOTHING,), **how)
    assert [row.tokens for row in plain] != example()[2]
    found = drafted(ALL, **how)
    assert [row.tokens for row in found] == [row.tokens for row in plain]
    assert all(row.drafts.passes == 6 for row in found)


def searched(tokens, longest, least, width):
    """What follows the newest end of the longest run that the text ends in too."""
    end, best = len(tokens), (0, 0)
    for place in range(1, end):
        run = 0
        while run < min(longest, place):
            if tokens[place - 1 - run] != tokens[end - 1 - run]:
                break
            run += 1
        best = max(best, (run, place))
    run, place = best
    return tokens[place : place + width] if run >= least else []


def test_a_lookup_finds_what_followed():
    """In texts of few letters, of any length, of rows that go on."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, n).tolist() for n in (1, 2, 5, 40, 37, 12)]
    text, method = lookup.begun(rows, 48), lookup.Lookup(longest=4, least=2)
    text = lookup.with_first(text, np.array([row[-1] for row in rows]))
    rows = [[*row, row[-1]] for row in rows]
    find = jax.jit(functools.partial(lookup.find, method, width=3))
    more = jax.device_put(rng.integers(0, 3, (6, 4)).astype(np.int32))
    numbers = jax.device_put(np.array([0, 1, 4, 2, 3, 4], np.int32))
    for _ in range(2):
        tokens, counts = map(np.asarray, find(text))
        found = [t[:n].tolist() for t, n in zip(tokens, counts, strict=True)]
        assert found == [searched(row, 4, 2, 3) for row in rows]
        assert [] in found
        assert max(map(len, found)) == 3
        text = jax.jit(lookup.extended)(text, more, numbers)
        pairs = zip(rows, np.asarray(more).tolist(), numbers.tolist(), strict=True)
        rows = [[*row, *new[:n]] for row, new, n in pairs]


def test_a_lookup_drafts():
    """Greedy and sampled, in rows that find something and rows that do not."""
    model, _, _ = example()
    prompts = [[5, 6, 7, 8] * 5, [9, 1, 2], [3, 3, 3, 3, 3]]
    how = {"max_new_tokens": NEW, "eos_ids": (NOTHING,)}
    plain = generate(model, "full", prompts, **how)
    rows = generate(model, "full", prompts, draft="lookup:least=1", **how)
    assert [row.tokens for row in rows] == [row.tokens for row in plain]
    assert all(len(r.tokens) == 1 + r.drafts.passes + r.drafts.accepted for r in rows)
    assert sum(row.drafts.accepted for row in rows) > 0
    # Of the cache that checks alone.
    (row, length) = rows[1], 3 + 16
    read = accounting.bytes_read(registry.parse("full"), model.decoder, length, NEW)
    assert row.drafts.bytes_per_token == pytest.approx(row.drafts.passes * read / NEW)


class Six(ByteTokenizer):
    """Six tokens, each a letter."""

    def encode(self, text):
        return ["abcdef".index(letter) for letter in text]

    def decode(self, tokens):
        return "".join("abcdef"[token] for token in tokens)


@pytest.mark.parametrize("draft", ["streaming_llm:budget=3,num_sinks=1", "lookup"])
def test_sampled_text_has_the_distribution_of_single_steps(draft):
    """Three tokens of 2,048 rows by chi-square, against what the model says of all."""
    sizes = {"vocab_size": 6, "num_layers": 1, "deviation": 0.4}
    model = tiny_model(seed=4, **sizes)._replace(tokenizer=Six())
    prompt = [1, 4, 2, 3, 5, 0, 2, 1]
    how = Sampling(temperature=2.0, top_k=5)
    rows = generate(
        model,
        "full",
        [prompt] * 2048,
        draft="lookup:least=1" if draft == "lookup" else draft,
        draft_tokens=2,
        max_new_tokens=3,
        eos_ids=(),
        sampling=how,
        seed=1,
    )
    accepted = sum(row.drafts.accepted for row in rows)
    refused = sum(row.drafts.drafted for row in rows) - accepted
    assert accepted > 0
    assert refused > 100
    pairs = list(itertools.product(range(6), repeat=2))
    tokens = np.array([[*prompt, *pair] for pair in pairs], np.int32)
    decoder, params, full = model.decoder, model.params, kvjax.full()

    @jax.jit
    def distributions(tokens):
        batch, length = tokens.shape
        spec = decoder.cache_spec(batch, length)
        lengths = jnp.full(batch, length, jnp.int32)
        states = (full.init(spec),)
        _, hidden = decoder.prefill(params, states, tokens, lengths, full)
        logits = decoder.logits(params, hidden[:, -3:])
        kept = filter_logits(logits.reshape(-1, 6), None, active(how))
        return jax.nn.softmax(kept, axis=-1).reshape(batch, 3, 6)

    chances = np.asarray(distributions(jax.device_put(tokens)), np.float64)
    wanted = {
        (*pair, last): own[0, pair[0]] * own[1, pair[1]] * own[2, last]
        for pair, own in zip(pairs, chances, strict=True)
        for last in range(6)
    }
    assert distance(np.array([row.tokens for row in rows]), wanted) < 4


@pytest.mark.parametrize(
    ("draft", "copies"), [(SMALL, 0.25), ("quest:budget=64,page_size=16", 1.1)]
)
def test_caches_stay_where_they_are(draft, copies):
    """Donated to the loop, and the long one not copied to draft, check or take back.

    Pages are parted in keys and values where rows attend to all of them.
    """
    model, target = tiny_model(head_dim=64, num_layers=1), registry.parse("full")
    drafts = Drafting(method=registry.parse(draft), tokens=DRAFT)
    drafter = drafting.drafter(model, target, drafts)
    reading = drafter.method if drafter.is_shared else target
    specs = reader.layer_specs(model.decoder, 1, 16384, 1024)

    def begin():
        states = reader.finish_layers(reading, reader._init(reading, specs))
        if drafter.is_shared:
            return draft_states.Caches(states, None)
        own = reader.finish_layers(drafter.method, reader._init(drafter.method, specs))
        return draft_states.Caches(states, own)

    caches = jax.eval_shape(begin)
    numbers, flags = np.zeros(1, np.int32), np.zeros(1, bool)
    counts = passes.Counts(*[numbers] * 3)
    memory = passes.Memory(numbers, flags, flags, None, numbers, counts)
    given = passes.Given(None, active(Sampling()), numbers, np.int32(9))
    window = np.zeros((1, 1), np.int32)
    arguments = (model.params, None), caches, window, memory, given
    program = passes.run.lower(drafter, 4, *arguments).compile().memory_analysis()
    held = buffers.num_bytes(caches)
    assert program.alias_size_in_bytes >= held
    assert program.temp_size_in_bytes < copies * held


def test_bytes_of_a_token_are_counted():
    """Drafts, what holds fed again, and passes: by what the methods say of a step."""
    model, prompts, _ = example()
    for row, prompt in zip(drafted(), prompts, strict=True):
        drafts, middle = row.drafts, len(prompt) + 16
        small, full = (
            accounting.bytes_read(registry.parse(x), model.decoder, middle, NEW)
            for x in (SMALL, "full")
        )
        steps = drafts.drafted + drafts.accepted + drafts.passes
        total = steps * small + drafts.passes * full
        assert drafts.bytes_per_token == pytest.approx(total / NEW)


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_cannot_be_drafted_is_refused_in_one_line():
    """Before anything is read."""
    model = tiny_model(num_layers=1)

    def fails(message, method="full", model=model, **options):
        with pytest.raises(ValueError, match=message):
            stream(model, method, [[1, 2]], **options)

    fails("tova.* cannot check a draft: .* Use full", "tova", draft="quest")
    fails("quest.* cannot check a draft: .* as the draft", "quest", draft="quest")
    turning = Rope(8, kind="dynamic", factor=4.0, original_context=16)
    turned = tiny_model(num_layers=1, rope=turning)
    fails("rope is 'dynamic'", model=turned, draft="tova")
    fails("rope is 'dynamic'", draft_model=turned)
    fails("draft_tokens=0 must be at least 1", draft="tova", draft_tokens=0)
    fails("draft_tokens=65 must be at most 64", draft="tova", draft_tokens=65)
    fails("draft_tokens='6' must be an integer", draft_tokens="6")
    fails("unknown method 'quets'", draft="quets")
    fails("model='smollm2' must be a LanguageModel", draft_model="smollm2")
    fails("tova.* cannot take back .*: use full or", draft="tova", draft_model=model)
    other = model._replace(tokenizer=PairTokenizer())
    fails("the draft model tiny has another vocabulary", draft_model=other)
    larger = tiny_model(num_layers=1, vocab_size=300)
    fails("of 300 tokens, than tiny, of 260", draft_model=larger)
    # Its tokenizer decodes no token of the larger one's end.
    smaller = tiny_model(num_layers=1, vocab_size=6)._replace(tokenizer=Six())
    fails("of 6 tokens, than tiny, of 260", draft_model=smaller)
    late = Drafting(method=registry.parse("h2o"))
    read = reader.prefill(model, "full", [[1, 2]], max_new_tokens=4)
    with pytest.raises(ValueError, match="a draft begins with the prompt"):
        next(continued(model, "full", read, max_new_tokens=4, drafting=late))
    fails("'least=x' in 'lookup:least=x' must be one of", draft="lookup:least=x")
    fails("least=9 must be at most longest=8", draft="lookup:least=9")
    fails("longest=65 must be at most 64", draft="lookup:longest=65")
    fails("option 'least' is given twice", draft="lookup:least=2,least=3")
    fails("needs no draft model", draft="lookup", draft_model=model)
    revised = registry.parse("retro+quest")._replace(rewind=None)
    fails("reads 2 rows a step", draft=revised)
