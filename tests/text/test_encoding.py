"""Texts that begin, go on and end: their tokens are those of one whole text."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_families import BOS, EOS, EXACT, FAMILIES, surround

from kvjax.text import encoding
from kvjax.text.encoding import Added

WORDS = ["hello", "world", "or", "w", ".", ",", "\n", " ", "é", "😀", "12345", "  "]
texts = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)


@functools.cache
def made(name):
    return FAMILIES[name]()


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    return made(request.param)


@pytest.mark.parametrize(
    "form", ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_added_is_known_on_either_side(name, form):
    tokenizer = FAMILIES[name]()
    backend = tokenizer.backend
    if backend.token_to_id(EOS) is None:
        pytest.skip("the embedded models' has other names")
    surround(backend, form)

    def encode(text):
        return backend.encode(text).ids

    before, _, behind = form.partition("$A")
    expected = Added(
        *(tuple(map(backend.token_to_id, x.split())) for x in (before, behind))
    )
    assert encoding.added(encode) == expected
    # Also behind a text that says the same tokens itself.
    for text in ("hello", "", EOS, f"{BOS}hello{EOS}"):
        body = backend.encode(text, add_special_tokens=False).ids
        assert encoding.inside(encode, text) == body
        begun = encoding.begin(encode, text)
        assert begun == tokenizer.encode(text) == [*expected.before, *body]


def test_a_tokenizer_that_knows_few_characters_is_asked_no_others():
    ids = {"x": 1, "y": 2}
    assert encoding.added(lambda text: [0, *(ids[c] for c in text)]) == ((0,), ())
    assert encoding.added(lambda text: [ids[c] for c in text]) == ((), ())


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_text_goes_on_with_the_tokens_of_the_whole(tokenizer, data):
    """Wherever one of them begins there, and whether text or tokens are known."""
    text = data.draw(texts.filter(str.strip))
    whole = encoding.begin(tokenizer.encode, text)
    cut = data.draw(st.integers(1, len(text)))
    begun = encoding.begin(tokenizer.encode, text[:cut])
    if whole[: len(begun)] != begun or not encoding.inside(
        tokenizer.encode, text[:cut]
    ):
        return
    rest = whole[len(begun) :]
    following = encoding.following(tokenizer.encode, text[cut:], after=text[:cut])
    assert following == rest
    # Tokens do not tell whether a blank was read that is no token.
    if tokenizer.decode(begun) == text[:cut]:
        found = encoding.following_tokens(tokenizer, text[cut:], after=begun)
        assert found == rest


@settings(max_examples=200, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", EXACT)
def test_nothing_is_lost_and_no_blank_is_gained(name, data):
    """Also where the tokenizer would have joined the two."""
    tokenizer = made(name)
    if name == "spaced_bytes":
        return  # its decoder leaves the first blank in the text
    first = data.draw(texts.filter(lambda text: text.strip() and text[0] != " "))
    more = data.draw(texts)
    begun = encoding.begin(tokenizer.encode, first)
    found = encoding.following_tokens(tokenizer, more, after=begun)
    assert tokenizer.decode([*begun, *found]) == first + more
    found = encoding.following(tokenizer.encode, more, after=first)
    assert tokenizer.decode([*begun, *found]) == first + more


def test_a_text_behind_a_special_token_is_its_own_beginning():
    tokenizer = made("bytes")
    end = tokenizer.backend.token_to_id("<|im_end|>")
    prompt = [*tokenizer.encode("hell"), end]
    whole = tokenizer.encode("hell<|im_end|>he")
    found = encoding.following_tokens(tokenizer, "he", after=prompt)
    assert [*prompt, *found] == whole
    # Nothing was read but BOS: the text begins here.
    spaced = made("sentencepiece")
    found = encoding.following_tokens(spaced, "world", after=spaced.encode(""))
    assert [*spaced.encode(""), *found] == spaced.encode("world")


def test_what_a_tokenizer_refuses_is_no_special_token():
    """A stop string may have any characters."""

    class Refusing:
        def encode(self, text):
            return [b"ab".index(byte) for byte in text.encode()]

        def decode(self, tokens):
            return "".join("ab"[token] for token in tokens)

    assert encoding.special_texts(Refusing(), ["e", "a"]) == {}
