"""A conversation in the caches is the one of the chat template, token for token."""

import dataclasses

import pytest
from tiny import SMALL, byte_tokenizer, tiny_model

from kvjax import registry
from kvjax.decoding import conversation, saved_prompt
from kvjax.decoding.generate import generate

END = 7  # a byte that ends a turn
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\x07{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Earlier replies lose what comes before a slash, as thoughts are left out.
FORGETS = TURNS.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last else m.content.split('/')[-1] }}",
)


def model_with(template):
    tokenizer = dataclasses.replace(
        byte_tokenizer(), chat_templates={"default": template}
    )
    return tiny_model(num_layers=1)._replace(tokenizer=tokenizer)


def said(*texts):
    roles = ("user", "assistant")
    return [
        {"role": roles[index % 2], "content": text} for index, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    "spec",
    ["quest", "snapkv", "offload:cache=8+quest", "offload:cache=8+token_select"],
)
def test_three_turns_are_one_conversation(spec):
    """What comes after them is what comes after the whole, read at once."""
    model, method = model_with(TURNS), registry.parse(spec, **SMALL)
    messages = said("how are you today, then?")
    read = conversation.read(model, method, messages, room=200).prefix
    for reply, turn in [("well.", "and you?"), ("well, too.", "what is 7 + 5?")]:
        # The reply comes into the state behind the prompt, then the turn behind it.
        messages = conversation.with_reply(messages, reply)
        after = conversation.go_on(model, method, read, messages, reply=False)
        whole = conversation.tokens(model.tokenizer, messages, reply=False)
        assert after.prefix.prompts == (tuple(whole),)
        messages = [*messages, {"role": "user", "content": turn}]
        found = conversation.go_on(model, method, after.prefix, messages)
        assert not found.anew
        assert found.new_tokens == len(f"<user>{turn}\x07<assistant>")
        read = found.prefix
    whole = conversation.tokens(model.tokenizer, messages, reply=True)
    assert read.prompts == (tuple(whole),)
    options = {"max_new_tokens": 12, "eos_ids": ()}
    expected = generate(model, method, [whole], **options)
    assert saved_prompt.generate(model, method, read, **options) == expected


def test_what_the_template_writes_differently_is_read_anew():
    model, method = model_with(FORGETS), "full"
    read = conversation.read(model, method, said("2 + 2?"), room=100).prefix
    messages = said("2 + 2?", "let me think/4", "and 3 + 3?")
    found = conversation.go_on(model, method, read, messages[:2], reply=False)
    assert not found.anew
    found = conversation.go_on(model, method, found.prefix, messages)
    whole = conversation.tokens(model.tokenizer, messages, reply=True)
    assert b"think" not in bytes(model.tokenizer.decode(whole), "utf-8")
    assert found.prefix.prompts == (tuple(whole),)
    assert (found.anew, found.new_tokens) == (True, len(whole))


def test_a_generation_uses_a_copy_up_alone():
    model, method = model_with(TURNS), registry.parse("full")
    read = conversation.read(model, method, said("hello"), room=40).prefix
    kept = conversation.copied(read)
    saved_prompt.generate(model, method, read, max_new_tokens=4, eos_ids=())
    more = conversation.go_on(model, method, kept, said("hello", "hi"), reply=False)
    assert len(more.prefix.prompts[0]) == len("<user>hello\x07<assistant>hi\x07")


def test_room_ends_and_can_be_had_anew():
    model, method = model_with(TURNS), registry.parse("full")
    read = conversation.read(model, method, said("hello"), room=10).prefix
    longer = said("hello", "hi", "what is the time?")
    message = r"room for 10 tokens more and \d+ are wanted: give --room 2048, with"
    with pytest.raises(ValueError, match=message):
        conversation.go_on(model, method, read, longer)
    found = conversation.go_on(model, method, read, longer, room=30)
    assert found.anew
    assert saved_prompt.tokens_left(model, method, found.prefix) == 30


def test_what_reads_any_length_needs_room_for_replies_alone():
    model, method = model_with(TURNS), "citrus:budget=16,stride=4,instruction=4"
    read = conversation.read(model, method, said("hello"), room=10).prefix
    longer = said("hello", "hi", "what is the time?")
    found = conversation.go_on(model, method, read, longer)
    conversation.check_room(model, method, found.prefix, 10)
    with pytest.raises(ValueError, match="room for 10 tokens more and 11 are wanted"):
        conversation.check_room(model, method, found.prefix, 11)


@pytest.mark.parametrize(
    ("new_tokens", "message"),
    [
        (11, "room for 10 tokens more and 11 are wanted: give --room 37, with"),
        (37, "and 37 are wanted: give --room 37, with"),
        (38, "the model's context of 60 ends there: ask for fewer"),
    ],
)
def test_no_more_room_is_advised_than_the_context_has(new_tokens, message):
    model = model_with(TURNS)
    model = model._replace(decoder=tiny_model(num_layers=1, context=60).decoder)
    read = conversation.read(model, "full", said("hello"), room=10).prefix
    assert len(read.prompts[0]) == 60 - 37
    conversation.check_room(model, "full", read, 10)
    with pytest.raises(ValueError, match=message):
        conversation.check_room(model, "full", read, new_tokens)


def test_room_is_what_the_context_leaves():
    model, method = model_with(TURNS), registry.parse("full")
    model = model._replace(decoder=tiny_model(num_layers=1, context=64).decoder)
    read = conversation.read(model, method, said("hello")).prefix
    assert len(read.prompts[0]) + read.room == 64


def test_what_closes_a_reply_is_counted():
    tokenizer = model_with(TURNS).tokenizer
    assert conversation.closing(tokenizer, said("hello")) == len("x\x07")
