"""Tokenizers of GGUF files against others: built by hand, or the definition itself."""

import itertools
import json
import pathlib
import sysconfig
import unicodedata

import gguf_files
import pytest
import tokenizers_made
from make_gguf_goldens import GOLDENS
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import models
from models import embedded
from models.gguf import header, tokenizer

LIBRARY = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
# A vocabulary with merges: that of an embedded model.
BPE_JSON = json.loads(
    (embedded.path("embedded-softmax") / "tokenizer.json").read_text("utf-8")
)["model"]
WORDS = sorted(BPE_JSON["vocab"], key=BPE_JSON["vocab"].get)
MERGES = [tuple(pair) for pair in BPE_JSON["merges"]]
SPECIAL = {"<|bos|>": 0, "<|eos|>": 1, "<|pad|>": 2}
BYTE_LEVEL = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": WORDS,
    "token_type": [3 if word in SPECIAL else 1 for word in WORDS],
    "merges": [" ".join(pair) for pair in MERGES],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "padding_token_id": 2,
}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


@pytest.fixture
def load(tmp_path):
    """The tokenizer of a file with these keys, and no model."""

    def load(fields, **change):
        opened = header.read(write(tmp_path / "tiny.gguf", fields, **change))
        return tokenizer.load(opened)

    return load


def write(path, fields, **change):
    prefixed = {
        key if "." in key else f"tokenizer.ggml.{key}": value
        for key, value in (fields | change).items()
    }
    return gguf_files.write_raw(path, {"general.architecture": "llama"} | prefixed, {})


def by_hand(*steps):
    """Byte-level BPE over the same vocabulary, of the parts a page names."""
    backend = Tokenizer(BPE({word: i for i, word in enumerate(WORDS)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    return backend


@pytest.mark.parametrize(
    ("pre", "steps"),
    [
        (
            "smollm",
            (
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ),
        ),
        ("gpt-2", (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),)),
    ],
)
def test_the_librarys_sources_become_the_same_tokens(pre, steps, load):
    ours, theirs = load(BYTE_LEVEL, pre=pre), by_hand(*steps)
    seen = set()
    for path in LIBRARY:
        text = path.read_text(encoding="utf-8", errors="replace")
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == text
        seen |= set(ids)
    assert len(seen) > 600


def test_digits_stand_alone_after_a_whole_run_of_spaces(load):
    """Not `ĠĠ Ġ 1 2 3`, which it is where digits are split off later or not at all."""
    ids = load(BYTE_LEVEL).encode("   123")
    assert [WORDS[i] for i in ids] == ["ĠĠĠ", "1", "2", "3"]


SPLIT = json.loads(GOLDENS.read_text())


@pytest.mark.parametrize("pre", SPLIT["splits"])
def test_patterns_cut_as_another_engine_does(pre, load):
    backend = load(BYTE_LEVEL, pre=pre).backend
    for text, pieces in zip(SPLIT["texts"], SPLIT["splits"][pre], strict=True):
        cut = backend.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in cut] == pieces


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"])
def test_patterns_are_those_of_transformers(pre, load):
    regex = pytest.importorskip("regex")
    theirs = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping"
    )
    pattern = regex.compile(theirs.GGUF_PRE_TOKENIZER_SPLITS[pre])
    backend = load(BYTE_LEVEL, pre=pre).backend
    for path in LIBRARY[:6]:
        text = path.read_text(encoding="utf-8", errors="replace")
        cut = backend.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in cut] == pattern.findall(text)


def test_goldens_tell_the_patterns_apart():
    splits = [json.dumps(pieces) for pieces in SPLIT["splits"].values()]
    assert len(set(splits)) == len(splits)


def test_whole_words_need_no_merges(load):
    """Only where the model's own tokenizer takes them: `ignore_merges` of Llama 3."""
    index = WORDS.index("Ġself")
    fields = BYTE_LEVEL | {
        "merges": [m for m in BYTE_LEVEL["merges"] if m.replace(" ", "") != "Ġself"],
        "add_bos_token": False,
    }
    taken = {
        pre
        for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o")
        if load(fields, pre=pre).encode(" self") == [index]
    }
    assert taken == {"llama-bpe", "tekken"}


def test_composed_and_decomposed_letters(load):
    composed, apart = "café", unicodedata.normalize("NFD", "café")
    for pre, same in (("qwen2", True), ("qwen35", True), ("llama-bpe", False)):
        ours = load(BYTE_LEVEL, pre=pre)
        assert (ours.encode(composed) == ours.encode(apart)) == same


@pytest.mark.parametrize(
    ("change", "begins"),
    [
        ({"pre": "smollm"}, False),
        ({"pre": "smollm", "add_bos_token": True}, True),
        ({"pre": "llama-bpe"}, True),  # Llama 3 files lack the flag
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "tekken"}, True),
        ({"pre": "qwen2"}, False),
    ],
)
def test_the_token_that_begins_a_text(change, begins, load):
    ours = load(BYTE_LEVEL, **change)
    plain = ours.encode("self", add_special_tokens=False)
    assert ours.encode("self") == ([0] if begins else []) + plain
    assert ours.config["add_bos_token"] == begins
    assert (ours.bos_id, ours.eos_id) == (0, 1)


def test_tokens_that_are_matched_whole(load):
    """Control tokens are hidden in text, user-defined ones are not."""
    spelled = (
        "<\uff5cbegin▁of▁turn\uff5c>"  # as DeepSeek's: not in the alphabet of bytes
    )
    words = [*WORDS, "<think>", spelled]
    kinds = [*BYTE_LEVEL["token_type"], 4, 3]
    ours = load(BYTE_LEVEL, tokens=words, token_type=kinds)
    first = len(WORDS)
    ids = ours.encode(f"x<think>y{spelled}z<|eos|>")
    letters = [WORDS.index(letter) for letter in "xyz"]
    assert ids == [letters[0], first, letters[1], first + 1, letters[2], 1]
    assert ours.decode(ids) == "x<think>yz"
    assert ours.decode(ids, skip_special_tokens=False) == (
        f"x<think>y{spelled}z<|eos|>"
    )
    assert ours.vocab_size == len(words)


def test_ids_that_end_a_text(tmp_path):
    def ids(**change):
        path = write(tmp_path / "t.gguf", BYTE_LEVEL | change)
        return tokenizer.eos_ids(header.read(path))

    assert ids() == (1,)
    assert ids(eot_token_id=2) == (1, 2)
    assert ids(eot_token_id=1) == (1,)
    assert ids(eot_token_id=7, eom_token_id=2) == (1, 7, 2)
    assert ids(eos_token_id=None) == ()


def test_chat_templates(load):
    ours = load(
        BYTE_LEVEL,
        **{
            "tokenizer.chat_template": tokenizers_made.CHATML,
            "tokenizer.chat_template.short": "{{ messages[0].content }}{{ eos_token }}",
        },
    )
    message = [{"role": "user", "content": "self"}]
    text = ours.apply_chat_template(message, tokenize=False)
    assert text == "<|im_start|>user\nself<|im_end|>\n<|im_start|>assistant\n"
    ids = ours.apply_chat_template(message, template="short")
    assert ids == [*ours.encode("self"), 1]


def scored(count=600, seed=0):
    """A sentencepiece vocabulary with scores in no order of its ids."""
    spaced = [word.replace("Ġ", "▁") for word in WORDS[3:] if word.isalpha()]
    pieces = list(dict.fromkeys([*PIECES, "▁", *"abcdefghijklmnopqrstuvwxyz'é日"]))
    first = len(pieces)
    pieces += [word for word in spaced if word not in pieces][:count]
    scores = [0.0] * first
    scores += [-float((i * 7919 + seed) % 100_003) for i in range(len(pieces) - first)]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)]
    return {
        "model": "llama",
        "tokens": pieces,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def by_definition(fields, text):
    """Joins the neighbours whose whole has the highest score until none has one."""
    scores = dict(zip(fields["tokens"], fields["scores"], strict=True))
    ids = {token: index for index, token in enumerate(fields["tokens"])}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = ["".join(pair) for pair in itertools.pairwise(parts)]
        known = [place for place, whole in enumerate(joined) if whole in scores]
        if not known:
            break
        best = max(known, key=lambda place: (scores[joined[place]], -place))
        parts[best : best + 2] = [joined[best]]
    found = []
    for part in parts:
        spelled = [f"<0x{byte:02X}>" for byte in part.encode()]
        found += [ids[part]] if part in ids else [ids[byte] for byte in spelled]
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sentencepiece_joins_by_score(seed, load):
    fields = scored(seed=seed)
    ours = load(fields)
    lines = [line for line in embedded.heldout_text()[:6000].splitlines() if line]
    joined = 0
    for line in [*lines, "  two  spaces ", "日本 é\u0301 ñ \t", "a"]:
        ids = ours.encode(line)
        assert ids == [1, *by_definition(fields, line)]
        assert ours.decode(ids) == line
        joined += len(line) + 1 - len(ids)
    assert joined > 500


def test_sentencepiece_equals_one_made_by_hand(load):
    """A tokenizer of the same form whose texts have no merges at all."""
    theirs = tokenizers_made.byte_fallback()
    vocab = theirs.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    ours = load(
        {
            "model": "llama",
            "tokens": tokens,
            "scores": [0.0] * len(tokens),
            "token_type": [3] * 4 + [2] + [6] * 256 + [1] * (len(tokens) - 261),
            "bos_token_id": 0,
            "eos_token_id": 1,
            "unknown_token_id": 4,
        }
    )
    for text in ("hello world", "<|im_start|>user", "ünïcode", "tab\tand\nline"):
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text).ids)
    assert ours.encode("<unk>") == [0, 4]


def test_the_space_before_a_text_may_be_left_out(load):
    fields = scored()
    prefixed, plain = load(fields), load(fields, add_space_prefix=False)
    assert prefixed.encode("self") == plain.encode(" self")
    assert plain.decode(plain.encode(" self")) == " self"
    assert prefixed.decode(prefixed.encode(" self")) == " self"


def test_sentencepiece_ids_that_a_file_leaves_out(load, tmp_path):
    fields = scored()
    for key in ("bos_token_id", "eos_token_id", "unknown_token_id"):
        del fields[key]
    ours = load(fields)
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    opened = header.read(write(tmp_path / "t.gguf", fields))
    assert tokenizer.eos_ids(opened) == (2,)
    assert ours.special_tokens["unk_token"] == "<unk>"
    assert load(fields, add_bos_token=False).encode("self")[0] != 1


@pytest.mark.parametrize("fields", [BYTE_LEVEL, scored()], ids=["gpt2", "llama"])
def test_a_folder_written_of_it_has_the_same_tokenizer(fields, load, tmp_path):
    template = {"tokenizer.chat_template": tokenizers_made.CHATML}
    ours = load(fields | template, add_bos_token=True)
    models.llama.tokenizer.save(ours, tmp_path)
    again = models.llama.tokenizer.load(tmp_path)
    text = embedded.heldout_text()[:2000]
    assert again.encode(text) == ours.encode(text)
    assert again.chat_templates == ours.chat_templates
    assert again.special_tokens == ours.special_tokens


def test_a_template_is_written_in_its_folder_only(load, tmp_path):
    ours = load(BYTE_LEVEL, **{"tokenizer.chat_template.../../out": "x"})
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"chat template '\.\./\.\./out' cannot"):
        models.llama.tokenizer.save(ours, tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "has no tokenizer; convert the model again"),
        ({"tokens": None, "token_type": None}, "has no tokenizer"),
        ({"model": "t5"}, "tokenizer model 't5' is not supported; supported: gpt2"),
        ({"model": "no_vocab"}, "tokenizer model 'no_vocab' is not supported"),
        ({"pre": "default"}, r"pre='default' does not say how .* known: smollm, star"),
        ({"pre": None}, "pre='' does not say how text is split"),
        ({"pre": 3}, "tokenizer.ggml.pre=3 must be text"),
        ({"tokens": [*WORDS[:-1], "a"]}, "1 tokens stand in the vocabulary twice"),
        ({"token_type": [1, 1]}, f"token_type has 2 entries for {len(WORDS)} tokens"),
        ({"token_type": ["a"]}, "token_type must hold int only"),
        ({"merges": None}, "a gpt2 tokenizer needs tokenizer.ggml.merges"),
        ({"merges": ["xyzzy a"]}, "merges and tokens do not fit together"),
        ({"merges": ["self"]}, "merges and tokens do not fit together"),
        ({"bos_token_id": 99_999}, f"bos_token_id=99999 is beyond the {len(WORDS)}"),
        (
            {"bos_token_id": None, "add_bos_token": True},
            "there is no tokenizer.ggml.bos_token_id",
        ),
        ({"add_bos_token": 1}, "add_bos_token=1 must be true or false"),
        ({"model": "llama"}, "a llama tokenizer needs tokenizer.ggml.scores"),
    ],
)
def test_mistakes(change, message, load):
    if change.get("model") == "llama":
        change = change | {"merges": None}
    with pytest.raises(ValueError, match=message):
        load(BYTE_LEVEL | change)


def test_an_end_beyond_the_vocabulary(tmp_path):
    path = write(tmp_path / "t.gguf", BYTE_LEVEL, eot_token_id=10_000)
    with pytest.raises(ValueError, match="eot_token_id=10000 is beyond"):
        tokenizer.eos_ids(header.read(path))
