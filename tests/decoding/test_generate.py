"""The decode loop under every method: batching, chunks, streaming, stops, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_families import FAMILIES
from tiny import EOS, SMALL, ByteTokenizer, tiny_model, whole

import kvjax
from kvjax import registry
from kvjax.decoding import generate as decoding_generate
from kvjax.decoding import loop, reader
from kvjax.decoding.detokenize import TextRow
from kvjax.decoding.generate import Generation, generate, prefill, stream
from kvjax.decoding.sampling import Sampling, active
from kvjax.interface import LanguageModel, layer_specs
from kvjax.stores import buffers

MODEL = tiny_model()
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (45, 1, 70)]

# Smaller than the longest prompt here, so that every method leaves something out.


# What keeps all, in one piece and in pages; what forgets at the prompt's end; a ring.
# Every method's own rows and chunks are the contract's: `test_contract.py`.
@pytest.fixture(scope="module", params=["full", "quest", "snapkv", "streaming_llm"])
def method(request):
    return registry.parse(request.param, **SMALL)


def tokens_of(generations):
    return [generation.tokens for generation in generations]


def run(method, prompts=PROMPTS, model=MODEL, **options):
    return generate(model, method, prompts, **({"max_new_tokens": 12} | options))


def test_a_batch_equals_its_rows_alone(method):
    together = run(method, eos_ids=())
    # The one that differs most from its neighbours.
    assert run(method, [PROMPTS[1]], eos_ids=()) == [together[1]]


def test_chunks_of_the_prompt_and_of_the_loop_change_nothing(method):
    expected = run(method, eos_ids=())
    assert run(method, eos_ids=(), chunk_size=16, stream_every=5) == expected


def test_unwritten_slots_have_no_weight(method, monkeypatch):
    poisoned = run(method, PROMPTS[:2], eos_ids=())  # the suite poisons with 1e30
    monkeypatch.setattr(buffers, "fill_value", 0.0)
    begun = []

    def init(spec):
        begun.append(spec)
        return method.init(spec)

    # The fill value is part of compiled code: a method that no program is of yet.
    assert run(method._replace(init=init), PROMPTS[:2], eos_ids=()) == poisoned
    assert begun


def decode_arguments(method, batch, capacity, new_tokens):
    """Shapes of a decode loop's arguments after a prompt, without running anything."""
    decoder = MODEL.decoder
    specs = layer_specs(decoder, batch, capacity, new_tokens)

    def ended():
        states = reader._init(method, specs)
        tokens = jnp.zeros((batch, 8), jnp.int32)
        lengths = jnp.full((batch,), 8, jnp.int32)
        states, _ = decoder.prefill(MODEL.params, states, tokens, lengths, method)
        return reader.finish_layers(method, states)

    states = jax.eval_shape(ended)
    flags = jax.ShapeDtypeStruct((batch,), bool)
    window = jax.ShapeDtypeStruct((batch, method.rows), jnp.int32)
    step, sampling = np.int32(1), active(Sampling())
    chosen = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tail = decoding_generate.Tail(chosen, flags, flags, step, None)
    given = None, sampling, np.array([EOS], np.int32)
    arguments = (decoder, method, 16, MODEL.params, states, window, tail)
    return states, (*arguments, given, step)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_loop_updates_its_states_in_place(method, batch):
    states, arguments = decode_arguments(method, batch, 16384, 1024)
    memory = (
        loop.steps(decoding_generate.SAMPLED)
        .lower(*arguments)
        .compile()
        .memory_analysis()
    )
    held = buffers.num_bytes(states)
    assert memory.alias_size_in_bytes >= held
    extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - held
    # Logits and masks of one layer: a fraction of a long cache. What an evicting method
    # holds is small beside its logits over the vocabulary, hence the constant.
    assert extra < held / 2 + 2**16, (memory.temp_size_in_bytes, held)


def test_greedy_decoding_repeats_the_whole_forward_pass():
    tokens = list(PROMPTS[0])

    for _ in range(8):
        last = jax.device_put(whole(MODEL, tokens)[len(tokens) - 1])
        logits = MODEL.decoder.logits(MODEL.params, last)
        tokens.append(int(np.argmax(logits)))
    done = run(kvjax.full(), PROMPTS[:1], max_new_tokens=8, eos_ids=())
    assert done[0].tokens == tokens[len(PROMPTS[0]) :]


def test_same_tokens_as_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from benchmarks.transformers_decode import state_dict

    config = MODEL.decoder.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_q_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_epsilon,
            rope_theta=config.rope.theta,
            tie_word_embeddings=False,
        )
    ).eval()
    theirs.load_state_dict(state_dict(MODEL.params, config.width))
    ours = run(kvjax.full(), max_new_tokens=30, eos_ids=())
    for prompt, generation in zip(PROMPTS, ours, strict=True):
        with torch.inference_mode():
            out = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                do_sample=False,
                max_new_tokens=30,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert generation.tokens == out[0, len(prompt) :].tolist()


def test_sampling_depends_on_seed_and_row_only():
    sampling = Sampling(temperature=1.0)
    options = dict(sampling=sampling, eos_ids=(), max_new_tokens=10)
    first = run(kvjax.full(), [PROMPTS[0], PROMPTS[1]], **options)
    assert run(kvjax.full(), [PROMPTS[0], PROMPTS[2]], **options)[0] == first[0]
    assert run(kvjax.full(), [PROMPTS[0]], stream_every=3, **options) == first[:1]
    twins = run(kvjax.full(), [PROMPTS[0]] * 2, **options)
    assert twins[0] == first[0]
    assert twins[1] != first[0]
    assert run(kvjax.full(), [PROMPTS[0]], seed=1, **options) != first[:1]


def test_repetition_penalty_sees_prompt_and_generated_tokens():
    """Below 1 it rewards: only tokens of the prompt can win. Far above, none twice."""
    prompt = list(range(100))
    options = {"max_new_tokens": 20, "eos_ids": ()}
    reward = Sampling(repetition_penalty=1e-6)
    (rewarded,) = run(kvjax.full(), [prompt], sampling=reward, **options)
    assert set(rewarded.tokens) <= set(prompt)
    penalty = Sampling(repetition_penalty=1e6)
    (penalised,) = run(kvjax.full(), [prompt], sampling=penalty, **options)
    assert len(set(penalised.tokens)) == 20


def added(prompt, tokens, tokenizer=MODEL.tokenizer):
    """What `tokens` add to the text of the prompt; a character may begin in it."""
    before, whole = (tokenizer.decode(x) for x in (prompt, [*prompt, *tokens]))
    if not whole.startswith(before):
        before = before.rstrip("\N{REPLACEMENT CHARACTER}")
    assert whole.startswith(before)
    return whole[len(before) :]


class Script:
    """A tokenizer whose tokens stand for given pieces of bytes."""

    def __init__(self, pieces):
        self.pieces = pieces

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


@pytest.fixture(scope="module")
def greedy():
    """Forty greedy tokens of a prompt."""
    return run(kvjax.full(), PROMPTS[:1], max_new_tokens=40, eos_ids=())[0].tokens


def scripted(tokens, pieces):
    """MODEL with a tokenizer under which `tokens` read as `pieces`.

    A token that occurs again repeats its text.
    """
    table = {token: b"" for token in range(260)}
    for token, piece in reversed(list(zip(tokens, pieces, strict=True))):
        table[token] = piece
    model = LanguageModel(MODEL.decoder, MODEL.params, Script(table))
    return model, [table[token] for token in tokens]


def distinct_run(tokens):
    """How many tokens there are before the first repetition."""
    for size in range(1, len(tokens) + 1):
        if len(set(tokens[:size])) < size:
            return size - 1
    return len(tokens)


def test_eos_ends_a_row_and_leaves_the_others_alone():
    free = run(kvjax.full(), max_new_tokens=20, eos_ids=())
    eos = free[0].tokens[6]
    expected = []
    for row in free:
        end = row.tokens.index(eos) + 1 if eos in row.tokens else None
        expected.append((row.tokens[:end], "eos" if end else "length"))
    assert expected[0][1] == "eos"
    assert "length" in [reason for _, reason in expected]
    done = run(kvjax.full(), max_new_tokens=20, eos_ids=(eos,))
    assert [(row.tokens, row.finish_reason) for row in done] == expected
    assert done[0].text == added(PROMPTS[0], expected[0][0][:-1])
    # The model's own ids are the default.
    model = MODEL._replace(eos_ids=(eos, EOS))
    assert run(kvjax.full(), model=model, max_new_tokens=20)[0] == done[0]


@pytest.mark.parametrize("stream_every", [1, 2, 16])
def test_a_stop_string_across_tokens_cuts_the_text(greedy, stream_every):
    size = distinct_run(greedy)
    assert size >= 6
    pieces = [b"a", b"bX", b"Y", b"Zc", b"d", b"e"]
    model, _ = scripted(greedy[:6], pieces)
    done = run(
        kvjax.full(),
        PROMPTS[:1],
        model,
        stop=("nowhere", "XYZ", "cd"),
        stream_every=stream_every,
    )
    assert done == [Generation(greedy[:4], "ab", "stop")]


def test_streaming_shows_no_part_of_a_stop_string_or_character(greedy):
    pieces = [b"a\xe2\x82", b"\xac!", b"ST", b"Ox", b"STO", b"P"]
    size = distinct_run(greedy)
    assert size >= 6
    model, _ = scripted(greedy[:6], pieces)
    options = dict(stop=("STOP",), stream_every=1, max_new_tokens=20)
    shown = [t for _, t in stream(model, kvjax.full(), PROMPTS[:1], **options)]
    assert shown == ["a", "\N{EURO SIGN}!", "STOx"]
    done = run(kvjax.full(), PROMPTS[:1], model, **options)
    assert done == [Generation(greedy[:6], "a\N{EURO SIGN}!STOx", "stop")]


def test_what_was_held_back_is_given_at_the_end(greedy):
    model, _ = scripted(greedy[:2], [b"a ST", b"\xe2\x82"])
    done = run(kvjax.full(), PROMPTS[:1], model, stop=("STOP",), max_new_tokens=2)
    assert done[0].text == "a ST\N{REPLACEMENT CHARACTER}"
    assert done[0].finish_reason == "length"


def test_streams_add_up_to_the_texts():
    expected = run(kvjax.full(), max_new_tokens=40)
    texts = ["", "", ""]
    pieces = 0
    for row, text in stream(MODEL, kvjax.full(), PROMPTS, max_new_tokens=40):
        assert text
        texts[row] += text
        pieces += 1
    assert texts == [generation.text for generation in expected]
    assert pieces > len(PROMPTS)
    heard = []
    run(kvjax.full(), max_new_tokens=40, on_text=lambda *event: heard.append(event))
    assert "".join(text for row, text in heard if row == 2) == texts[2]
    for prompt, generation in zip(PROMPTS, expected, strict=True):
        tokens = [t for t in generation.tokens if t != EOS]
        assert generation.text == added(prompt, tokens)


@pytest.mark.parametrize("name", ["sentencepiece", "word_piece", "ctc", "suffixed"])
def test_the_text_goes_on_with_the_prompts(name):
    """However the prompt is read, streaming or not."""
    tokenizer = FAMILIES[name]()
    model = tiny_model(num_layers=1, vocab_size=tokenizer.vocab_size)
    model = model._replace(tokenizer=tokenizer)
    prompts = ["hello world", "a, b.", tokenizer.encode("wor")]
    options = {"max_new_tokens": 30, "eos_ids": ()}
    done = run(kvjax.full(), prompts, model, **options)
    read = prefill(model, kvjax.full(), [tokenizer.encode("wor")], max_new_tokens=30)
    texts = [
        text
        for _, text in decoding_generate.continued(model, kvjax.full(), read, **options)
    ]
    assert "".join(texts) == done[2].text
    shown = ["", "", ""]
    for row, text in stream(model, kvjax.full(), prompts, **options):
        shown[row] += text
    for prompt, row, text in zip(prompts, done, shown, strict=True):
        tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        assert row.text == text == added(tokens, row.tokens, tokenizer)


def test_a_prompt_is_not_ended():
    class Whole(ByteTokenizer):
        def encode(self, text):
            return [257, *text.encode(), 258]

    model = MODEL._replace(tokenizer=Whole())
    (done,) = run(kvjax.full(), ["hello"], model, eos_ids=())
    (expected,) = run(kvjax.full(), [[257, *b"hello"]], model, eos_ids=())
    assert done == expected


@pytest.mark.parametrize("seed", range(3))
def test_decoding_piece_by_piece_is_decoding_at_once(seed):
    """On random bytes, most of them no UTF-8; and no decode looks far back."""
    rng = np.random.default_rng(seed)
    alphabet = [b"a", "\N{EURO SIGN}".encode(), b"\xf0\x9f\x99\x82", b"\xff", b"\xe2"]
    chosen = rng.choice(len(alphabet), 300, p=[0.2, 0.2, 0.2, 0.3, 0.1])
    data = b"".join(alphabet[i] for i in chosen) + b"\xff" * 300 + b"\xe2\x82\xac"
    longest = 0

    class Watched(ByteTokenizer):
        def decode(self, tokens):
            nonlocal longest
            longest = max(longest, len(tokens))
            return bytes(tokens).decode(errors="replace")

    row = TextRow(Watched(), (), frozenset(), len(data))
    text = "".join(row.push([token]) for token in data)
    assert text == row.text == data.decode(errors="replace")
    assert row.finish_reason == "length"
    assert longest < 200


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([""], {}, "prompt 0 has no tokens"),
        ([[1, 260]], {}, "row 0 holds token id 260, outside .* vocabulary of 260"),
        ([[1, -1]], {}, "row 0 holds token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1]], {"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ([[1]], {"stream_every": 0}, "stream_every=0 must be at least 1"),
        ([[1]], {"stop": ("",)}, "must be a sequence of non-empty strings"),
        ([[1]], {"stop": "end"}, "must be a sequence of non-empty strings"),
        ([[1]], {"stop": iter(["end"])}, "must be a sequence of non-empty strings"),
        ([[1]], {"sampling": Sampling(top_p=2)}, "top_p=2 must be in"),
        ([[1]], {"seed": -1}, r"seed=-1 must be an integer in \[0, 2\*\*32\)"),
        ([[1]], {"seed": 1 << 32}, "seed=4294967296 must be an integer in"),
        ([[1]], {"eos_ids": ["2"]}, r"eos_ids=\['2'\] must be token ids"),
        (
            [[1] * 4000],
            {"max_new_tokens": 97},
            "prompt 0 has 4000 tokens; with max_new_tokens=97 .* context of 4096",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_mistakes_are_named_before_anything_runs(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, kvjax.full(), prompts, **options)
    with pytest.raises(ValueError, match=message):
        stream(MODEL, kvjax.full(), prompts, **options)  # not only when iterated


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 4, "stream_every": 0}, "stream_every=0 must be at least 1"),
        ({"max_new_tokens": 4, "stop": "end"}, "must be a sequence of non-empty"),
        ({"max_new_tokens": 4, "sampling": Sampling(-1)}, "temperature=-1 must be 0"),
    ],
)
def test_what_goes_on_from_a_prompt_is_checked_at_once(options, message):
    method = kvjax.full()
    prefilled = prefill(MODEL, method, [[1, 2, 3]], max_new_tokens=16)
    with pytest.raises(ValueError, match=message):
        decoding_generate.continued(MODEL, method, prefilled, **options)
    assert next(
        decoding_generate.continued(MODEL, method, prefilled, max_new_tokens=16)
    )


def test_a_blank_behind_a_token_without_text_is_kept():
    """As decoders of SentencePiece strip the first blank of a text."""
    pieces = ["", " one", " two", " three"]

    class Stripping(ByteTokenizer):
        def decode(self, tokens):
            return "".join(pieces[token] for token in tokens).removeprefix(" ")

    tokens = [1, 0, 2, 0, 0, 3]
    for size in (1, 2, 6):
        row = TextRow(Stripping(), (), frozenset(), len(tokens))
        for start in range(0, len(tokens), size):
            row.push(tokens[start : start + size])
        assert row.text == "one two three"


def test_a_single_text_is_refused():
    with pytest.raises(TypeError, match="put it in a list"):
        generate(MODEL, kvjax.full(), "hello")


def test_the_context_may_be_filled_to_the_last_token():
    model = tiny_model(context=24)
    done = run(kvjax.full(), [PROMPTS[0][:14]], model, max_new_tokens=10, eos_ids=())
    assert len(done[0].tokens) == 10
