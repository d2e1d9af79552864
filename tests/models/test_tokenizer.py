"""Text in and out, streaming of whole characters, chat templates in a sandbox."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from tokenizers_made import CHATML, CONFIG, byte_fallback, byte_level, write_byte_level

from models.llama import tokenizer as tokenizers_of_llama

LLAMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}\n"
    "{% for message in messages %}\n"
    "  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
    "    {{ raise_exception('roles must alternate') }}\n"
    "  {% endif %}\n"
    "  {% if message['role'] == 'user' %}\n"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] }}\n"
    "{{ ' [/INST]' }}\n"
    "  {% else %}\n"
    "    {% generation %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% endgeneration %}\n"
    "  {% endif %}\n"
    "{% endfor %}"
)
LLAMA3 = (
    "{%- set date = strftime_now('%Y') %}{{- bos_token }}"
    "{%- if tools is not none %}{{- tools | tojson(indent=2) }}{% endif %}"
    "{%- for message in messages %}{%- if message.role == 'skip' %}{% continue %}"
    "{%- endif %}{{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + "
    "message['content'] | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}"
    "{%- endif %}"
)
TEMPLATES = {"llama2": LLAMA2, "llama3": LLAMA3, "chatml": CHATML}
MESSAGES = [
    {"role": "system", "content": "Be <brief> & “kind”."},
    {"role": "user", "content": "  hello\nthere "},
    {"role": "assistant", "content": " hi "},
    {"role": "user", "content": "bye"},
]


@pytest.fixture
def tokenizer(tmp_path):
    return tokenizers_of_llama.load(write_byte_level(tmp_path))


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def either(request):
    return tokenizers_of_llama.HFTokenizer(request.param(), CONFIG)


def test_text_comes_back(either):
    text = "hello wörld 😀 你好"
    ids = either.encode(text)
    assert ids[0] == either.bos_id == 0
    assert either.eos_id == 1
    assert either.encode(text, add_special_tokens=False) == ids[1:]
    assert either.decode(ids) == text
    assert either.decode(ids, skip_special_tokens=False).startswith("<s>")
    assert either.vocab_size == either.backend.get_vocab_size() > 256


def test_special_tokens_in_text_are_one_token(tokenizer):
    ids = tokenizer.encode("<|im_start|>he<|im_end|>", add_special_tokens=False)
    assert ids == [2, tokenizer.backend.token_to_id("he"), 3]


def test_stream_never_breaks_a_character(either):
    text = "a é 😀 你"
    stream = either.stream()
    pieces = [stream.step(token) for token in either.encode(text)]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    assert any("😀" in piece for piece in pieces)  # four byte tokens, one piece
    assert not any("\ufffd" in piece for piece in pieces)


def test_unfinished_character_shows_at_the_end_only(either):
    ids = either.encode("a😀", add_special_tokens=False)[:-1]
    stream = either.stream()
    assert "".join(stream.step(token) for token in ids) == "a"
    assert set(stream.finish()) == {"\ufffd"}


def test_a_real_replacement_character_is_not_lost(either):
    stream = either.stream()
    pieces = [stream.step(token) for token in either.encode("a\ufffd b")]
    assert "".join(pieces) + stream.finish() == "a\ufffd b"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stream_equals_decode(either, data):
    """Any tokens, special ones and broken UTF-8 included."""
    token = st.integers(0, either.vocab_size - 1)
    ids = data.draw(st.lists(token, max_size=30))
    stream = either.stream()
    shown = "".join(stream.step(i) for i in ids) + stream.finish()
    whole = either.decode(ids)
    assert shown == whole


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_stream_equals_text(text):
    byte_tokenizer = tokenizers_of_llama.HFTokenizer(byte_level(), CONFIG)
    stream = byte_tokenizer.stream()
    pieces = [stream.step(i) for i in byte_tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text


def test_stream_of_broken_bytes_goes_on(tokenizer):
    byte = tokenizer.encode("é", add_special_tokens=False)[0]  # a lead byte, alone
    stream = tokenizer.stream()
    shown = "".join(stream.step(byte) for _ in range(200))
    assert len(shown) >= 100
    assert shown + stream.finish() == "\ufffd" * 200


def test_stream_goes_on_behind_other_tokens(either):
    """The blank of a first word is the prompt's to lose, not the text's."""
    before, tokens = either.encode("hello"), either.encode("hello wörld")[6:]
    stream = either.stream(before=before)
    pieces = [stream.step(token) for token in tokens]
    expected = either.decode([*before, *tokens]).removeprefix("hello")
    assert "".join(pieces) + stream.finish() == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_templates_equal_transformers(name, prompt, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_byte_level(tmp_path, TEMPLATES[name])
    ours = tokenizers_of_llama.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in (MESSAGES, MESSAGES[1:]):
        text = ours.apply_chat_template(messages, prompt, tokenize=False)
        assert text == theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False
        )
        ids = ours.apply_chat_template(messages, prompt)
        assert ids == theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False
        )


def test_chat_template_by_hand(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES[1:2], tokenize=False)
    assert text == (
        "<|im_start|>user\n  hello\nthere <|im_end|>\n<|im_start|>assistant\n"
    )


def render(source, **variables):
    made = tokenizers_of_llama.HFTokenizer(byte_level(), CONFIG, {"default": source})
    return made.apply_chat_template(MESSAGES, tokenize=False, **variables)


def test_conventions():
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ bos_token }}{{ eos_token }}") == "<s></s>"
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    assert render("{% for m in messages %}{% break %}{% endfor %}x") == "x"
    assert render("{{ strftime_now('%%') }}") == "%"
    assert render("{{ thinking }}", thinking="yes") == "yes"
    assert render("{{ tools is none }}") == "True"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('').index }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__closure__[0] }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ],
)
def test_malicious_templates_reach_nothing(source):
    with pytest.raises(ValueError, match="the chat template refused"):
        render(source)


def test_template_errors():
    with pytest.raises(ValueError, match="refused: roles must alternate"):
        render(LLAMA2.replace("messages[1:]", "messages[2:]"))
    with pytest.raises(ValueError, match="refused: Expected an expression"):
        render("{% for %}")
    made = tokenizers_of_llama.HFTokenizer(byte_level(), CONFIG)
    with pytest.raises(ValueError, match="no chat template, this is no chat model"):
        made.apply_chat_template(MESSAGES)
    with pytest.raises(ValueError, match="must be JSON values"):
        render("x", tool=object())


def test_named_templates(tmp_path):
    write_byte_level(tmp_path, template=None)
    named = [{"name": n, "template": n} for n in ("default", "tool_use")]
    config = CONFIG | {"chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = tokenizers_of_llama.load(tmp_path)
    assert made.chat_templates == {"default": "default", "tool_use": "tool_use"}
    for name in ("default", "tool_use"):
        text = made.apply_chat_template(MESSAGES, tokenize=False, template=name)
        assert text == name
    for tools, name in ((None, "default"), ([], "tool_use"), ([{}], "tool_use")):
        text = made.apply_chat_template(MESSAGES, tokenize=False, tools=tools)
        assert text == name
    chosen = {"tools": [{}], "template": "default"}
    assert made.apply_chat_template(MESSAGES, tokenize=False, **chosen) == "default"
    with pytest.raises(ValueError, match="'rag'; the checkpoint has default, tool_use"):
        made.apply_chat_template(MESSAGES, template="rag")
    (tmp_path / "saved").mkdir()
    tokenizers_of_llama.save(made, tmp_path / "saved")
    assert tokenizers_of_llama.load(tmp_path / "saved").chat_templates == (
        made.chat_templates
    )


def test_template_of_the_configuration_and_of_its_own_file(tmp_path):
    write_byte_level(tmp_path, template=None)
    config = CONFIG | {"chat_template": "inline"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    load = tokenizers_of_llama.load
    assert load(tmp_path).chat_templates == {"default": "inline"}
    (tmp_path / "chat_template.jinja").write_text("alone")
    assert load(tmp_path).chat_templates == {"default": "alone"}


def without_bos(directory, post_processor, **flags):
    """A tokenizer.json such as Qwen's, whose post-processor adds nothing."""
    backend = byte_level()
    backend.post_processor = post_processor
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG | flags))
    return tokenizers_of_llama.load(directory)


BYTES = processors.ByteLevel(trim_offsets=False)
SILENT = processors.TemplateProcessing(single="$A", pair="$A $B:1")
ENDING = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])


@pytest.mark.parametrize("post", [BYTES, SILENT], ids=["bytes", "template"])
def test_bos_where_only_the_configuration_asks_for_it(tmp_path, post):
    """DeepSeek-R1-Distill: BOS, then what Qwen's vocabulary gives."""
    made = without_bos(tmp_path, post)
    he, ll = (made.backend.token_to_id(text) for text in ("he", "ll"))
    assert made.encode("hell") == [0, he, ll]
    assert made.encode("") == [0]
    assert made.encode("hell", add_special_tokens=False) == [he, ll]
    assert made.backend.encode("he", "ll").ids == [0, he, 0, ll]

    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizers_of_llama.save(made, saved)
    assert tokenizers_of_llama.load(saved).encode("hell") == [0, he, ll]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert theirs("hell").input_ids == [0, he, ll]


@pytest.mark.parametrize("flag", [{"add_bos_token": False}, {"add_bos_token": None}])
def test_bos_is_not_added_where_nobody_asks(tmp_path, flag):
    made = without_bos(tmp_path, BYTES, **flag)
    assert made.encode("he") == [made.backend.token_to_id("he")]


def test_bos_is_added_once_and_what_follows_the_text_stays(tmp_path, tokenizer):
    assert tokenizer.config["add_bos_token"] is True
    assert tokenizer.encode("he") == [0, tokenizer.backend.token_to_id("he")]
    ended = without_bos(tmp_path, ENDING, add_eos_token=True)
    he = ended.backend.token_to_id("he")
    # What is read here goes on: EOS is behind a whole text, and this is none.
    assert ended.backend.encode("he").ids == [0, he, 1]
    assert ended.encode("he") == [0, he]
    assert ended.encode("") == [0]
    # Only tokenizer.json ends a text, as in transformers.
    assert without_bos(tmp_path, BYTES, add_eos_token=True).encode("he") == [0, he]
    nameless = without_bos(tmp_path, BYTES, bos_token=None)
    assert nameless.encode("he") == [he]


# --- conversations that are not as a template expects


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
WITH_CALL = [
    {"role": "user", "content": "Weather?", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": None}]},
    {"role": "tool", "content": [{"type": "text", "text": "fine", "image": None}]},
]
CALLS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.name }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}]{% endfor %};{% endfor %}"
)


def templated(source):
    return tokenizers_of_llama.HFTokenizer(byte_level(), CONFIG, {"default": source})


def test_a_key_that_is_null_is_left_out():
    """As OpenAI's form of a call has it; what a call says is said whole."""
    text = templated(CALLS).apply_chat_template(WITH_CALL, tokenize=False)
    assert text == (
        'user:Weather?;assistant:[f{"x": null}];'
        "tool:[{'type': 'text', 'text': 'fine'}];"
    )


def test_null_keys_are_left_out_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.name }};{% endfor %}"
    )
    write_byte_level(tmp_path, source)
    ours = tokenizers_of_llama.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = ours.apply_chat_template(WITH_CALL[:2], tokenize=False)
    assert "None" not in text
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert text == theirs.apply_chat_template(WITH_CALL[:2], tokenize=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ '' + messages[0].nothing }}",
        "{{ messages[0].nothing.more }}",
        "{{ '' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages | join(1, 2, 3, 4) }}",
        "{{ strftime_now(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages | sort }}",
        "{{ {}['a' }}",
        "{% for m in messages %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ raise_exception('one\nof\nthese') }}",
        "{% include 'x' %}",
    ],
)
def test_whatever_a_template_fails_with_is_one_line(source):
    with pytest.raises(ValueError, match=r"\Athe chat template refused: .+\.\Z"):
        render(source)


@pytest.mark.parametrize("messages", [None, "hi", ["hi"], {"role": "user"}, [[{}]]])
def test_messages_are_dicts(messages):
    with pytest.raises(ValueError, match="must be a list of dicts with role and"):
        templated("x").apply_chat_template(messages)


def test_messages_without_end_are_refused():
    endless = {"role": "user"}
    endless["content"] = endless
    with pytest.raises(ValueError, match="must be JSON values"):
        templated("x").apply_chat_template([endless])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("return_dict", True),
        ("return_tensors", "pt"),
        ("return_assistant_tokens_mask", True),
        ("padding", True),
        ("truncation", True),
        ("max_length", 7),
        ("tokenizer_kwargs", {"padding": True}),
        ("conversation", MESSAGES),
        ("sanitize_control_tokens", True),
    ],
)
def test_options_of_transformers_are_no_variables(option, value):
    with pytest.raises(ValueError, match=f"{option}=.* is no option of apply_chat"):
        render("x", **{option: value})
    assert render("x", **{option: None}) == "x"


def test_a_template_may_be_given():
    made = templated("own")
    for name in ("template", "chat_template"):
        chosen = made.apply_chat_template(MESSAGES, tokenize=False, **{name: "default"})
        assert chosen == "own"
    given = made.apply_chat_template(MESSAGES, tokenize=False, chat_template="X{{ 1 }}")
    assert given == "X1"
    with pytest.raises(ValueError, match="give only one of them"):
        made.apply_chat_template(MESSAGES, template="default", chat_template="X")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["Sure,", "Sure, ", "{{ x }}\n", "hello"])
def test_a_final_message_goes_on(name, content, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_byte_level(tmp_path, TEMPLATES[name])
    ours = tokenizers_of_llama.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [*MESSAGES[1:2], {"role": "assistant", "content": content}]
    options = {"tokenize": False, "continue_final_message": True}
    text = ours.apply_chat_template(chat, **options)
    assert text.endswith(content.strip() if name != "chatml" else content)
    assert ours.apply_chat_template(chat, False, tokenize=False).startswith(text)
    assert text == theirs.apply_chat_template(chat, **options)


def test_a_final_message_of_parts_goes_on():
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    made = templated(source + "</s>{% endfor %}")
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
        {"type": "i"},
    ]
    chat = [{"role": "assistant", "content": parts}]
    options = {"tokenize": False, "continue_final_message": True}
    assert made.apply_chat_template(chat, **options) == "ab"


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("{{ messages[0].content | upper }}", "hi", "does not write the final"),
        ("nothing", "hi", "does not write the final"),
        ("{{ messages[0].content }}", None, "the final message has no text"),
        ("{{ messages[0].content }}", [], "the final message has no text"),
    ],
)
def test_a_final_message_that_cannot_go_on(source, content, message):
    chat = [{"role": "assistant", "content": content}]
    made = templated(source)
    with pytest.raises(ValueError, match=message):
        made.apply_chat_template(chat, continue_final_message=True)
    with pytest.raises(ValueError, match="the final message has no text"):
        made.apply_chat_template([], continue_final_message=True)
    with pytest.raises(ValueError, match="must be True or False: what goes on is"):
        made.apply_chat_template(chat, continue_final_message="content")
    with pytest.raises(ValueError, match="add_generation_prompt=True begins a turn"):
        made.apply_chat_template(chat, True, continue_final_message=True)
