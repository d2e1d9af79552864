"""Tasks as chats: the user asks, the assistant's turn is begun, and all of it fits."""

import pytest
from tiny import TEXT, ByteTokenizer, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvjax.evaluation.tasks import chain, chat, extraction, needles
from models.llama.tokenizer import HFTokenizer

TOKENIZER = byte_tokenizer()
MAKERS = {
    "passkey": needles.passkey,
    "multikey": needles.multikey,
    "variables": needles.variable_tracking,
    "chain": chain.chain_of_key,
    "extraction": extraction.extraction,
}


def fitted(name, context=600, **options):
    def make(room):
        more = {"rows": 3} if name == "extraction" else {}
        more |= {"links": 2} if name == "chain" else {}
        return MAKERS[name](TOKENIZER, TEXT, context=room, n=3, **more)

    return chat.fitted(TOKENIZER, make, context, **options)


@pytest.mark.parametrize("name", MAKERS)
def test_a_task_in_a_chat_asks_for_what_it_begins(name):
    for made in fitted(name, is_chat=True):
        assert len(made.prompt) + made.answer_tokens <= 600
        body, _, end = made.text.partition(getattr(made, "asks", chat.ASKED))
        assert body.startswith("<user>")
        # Once for the user, once for the assistant, who goes on with the answer.
        begun = end[len(end) // 2 :]
        assert end == begun.strip() + begun
        assert made.prompt == TOKENIZER.encode(made.text)
        assert made.answer_tokens == len(made.answer)
        assert made.score(made.answer) == 1


def test_a_chat_asks_for_as_many_rows_as_are_scored():
    for made in fitted("extraction", is_chat=True):
        assert "the table: 3 rows of the list above, in its order" in made.text
        assert chat.ASKED not in made.text


def test_the_beginning_is_the_last_line_of_the_plain_task():
    (plain, *_), (made, *_) = (
        fitted("passkey", is_chat=False),
        fitted("passkey", is_chat=True),
    )
    assert plain.text.endswith("\nThe pass key is ")
    assert made.text.endswith(f"{chat.ASKED}The pass key isThe pass key is "), (
        made.text[-99:]
    )
    assert "The pass key is " + made.answer in made.text


def test_a_blank_that_joins_what_follows_is_the_answers():
    """Words with the blank before them: "is " + "12345" is "is", " 12345"."""
    words = {"is": 0, "\u2581": 1, "\u258112345": 2, "\u2581is": 3, "12345": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="is"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    template = "{{ messages[0].content }}"
    tokenizer = HFTokenizer(backend, {}, {"default": template})
    example = needles.Example("is\nis ", [0], "12345", 1, 0.0)
    (made,) = chat.fitted(tokenizer, lambda room: [example], 99, is_chat=True)
    whole = tokenizer.encode(made.text + made.answer)
    assert (made.answer_tokens, made.answer) == (1, " 12345")
    assert [*made.prompt, whole[-1]] == whole
    assert whole[-1] == 2


def test_without_a_template_it_is_an_error():
    with pytest.raises(ValueError, match="no chat template: leave chat out"):
        chat.turn(ByteTokenizer(), "x")
    bare = HFTokenizer(TOKENIZER.backend)
    with pytest.raises(ValueError, match="this is no chat model"):
        chat.turn(bare, "x")


@pytest.mark.parametrize("name", MAKERS)
def test_in_a_chat_the_request_comes_after_the_context(name):
    """The turn up to the task's own context; what is asked for is the question's."""
    for made in fitted(name, is_chat=True):
        context = TOKENIZER.decode(made.prompt[: made.asked_at])
        question = TOKENIZER.decode(made.prompt[made.asked_at :])
        assert context + question == made.text
        assert context.startswith("<user>")
        assert context.count("\n") > 5
        assert question.startswith(("\n\n", "\ntable:"))
        assert question.count("\n") <= 4
