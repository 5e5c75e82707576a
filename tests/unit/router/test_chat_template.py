"""Chat templates render as `transformers` renders them; wrong messages are refused by name."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tandem.router import chat_template
from tandem.router.chat_template import compile_chat_template, plain_messages, render_chat
from tandem.router.errors import InvalidRequest

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first and system is defined else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""
TOOLS = """{%- set ns = namespace(last=0) -%}
{%- if tools %}
    {{- "# Tools\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "ignored" %}{% continue %}{% endif %}
    {%- set ns.last = loop.index %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}</call>' }}
        {%- endfor %}
    {%- elif message.content is not none %}
        {{- message.role + "> " + message.content + "\\n" }}
    {%- endif %}
{%- endfor %}
{{- ns.last }}{{ undefined_thing }}{{ "!" if enable_thinking }}"""

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": ' Be <brief> & "kind". '},
    {"role": "user", "content": "Grüße, 世界 {{ 7 * 7 }} {% raise %}"},
    {"role": "assistant", "content": " Hello "},
    {"role": "user", "content": "a\nb"},
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "weather?"},
    {"role": "ignored", "content": "x"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": {"city": "Köln"}}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]
WEATHER = {"type": "function", "function": {"name": "look", "parameters": {"<a>": "ü"}}}


def oracle(template: str, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered = utils.render_jinja_template(
        conversations=[messages], chat_template=template, bos_token="<s>", eos_token="</s>", **kwargs
    )
    text: str = (rendered[0] if isinstance(rendered, tuple) else rendered)[0]
    return text


def ours(template: str, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
    return render_chat(template, messages, bos_text="<s>", eos_text="</s>", **kwargs)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", [TALK, TALK[1:], TALK[1:2]])
@pytest.mark.parametrize("template", [CHATML, INST, TOOLS])
def test_equals_transformers(template: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    expected = oracle(template, messages, add_generation_prompt=add_generation_prompt)
    assert ours(template, messages, add_generation_prompt=add_generation_prompt) == expected


def test_tools_and_further_variables_equal_transformers() -> None:
    expected = oracle(TOOLS, CALLS, tools=[WEATHER], add_generation_prompt=True, enable_thinking=True)
    assert ours(TOOLS, CALLS, tools=[WEATHER], enable_thinking=True) == expected
    assert '"arguments": {"city": "Köln"}' in expected


def test_chatml_text() -> None:
    assert ours(CHATML, [{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_arguments_written_as_json_text_become_an_object() -> None:
    """OpenAI sends text, templates write JSON of what they get: without this it would be quoted twice."""
    as_text = [dict(message) for message in CALLS]
    as_text[2] = {**CALLS[2], "tool_calls": [{"function": {"name": "look", "arguments": '{"city": "Köln"}'}}]}
    assert ours(TOOLS, as_text) == ours(TOOLS, CALLS)


def test_text_parts_become_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a\nb"}]


def test_date() -> None:
    before = datetime.date.today()
    text = ours("{{ strftime_now('%Y-%m-%d') }}", TALK)
    assert text in (f"{before}", f"{datetime.date.today()}")


USER = {"role": "user"}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is 'hi' \(a string\); wanted: an object"),
        ([{"content": "x"}], r"messages\[0\]\.role is missing"),
        ([TALK[0], USER], r"messages\[1\]\.content is missing"),
        ([{**USER, "content": 5}], r"messages\[0\]\.content is '5' \(a number\)"),
        ([{**USER, "content": ["x"]}], r"messages\[0\]\.content\[0\] is 'x' \(a string\)"),
        (
            [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            r"messages\[0\]\.content\[1\]\.type is 'image_url'; allowed: 'text'",
        ),
        ([{**USER, "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]\.text is missing"),
        (
            [{**USER, "content": "x", "tool_calls": "y"}],
            r"messages\[0\]\.tool_calls is 'y' \(a string\); wanted: a list",
        ),
        ([{**USER, "tool_calls": [{}]}], r"messages\[0\]\.tool_calls\[0\] is "),
        (
            [{**USER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments is '{'",
        ),
    ],
)
def test_wrong_messages_are_refused_by_name(messages: list[Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as refused:
        ours(CHATML, messages)
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (INST, "roles must alternate"),
        ("{{ messages[9].content }}", "messages do not fit"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 'a' * 10 ** 11 }}", "would be too large"),
        ("{{ 10 ** (10 ** 10) }}", "would be too large"),
        ("{{ [1] * 10 ** 11 }}", "would be too large"),
        ("{{ '%100000000000d' % 1 }}", "would be too large"),
        ("{{ 'a'.ljust(10 ** 11) }}", "unsafe"),
        ("{{ 'a' | center(10 ** 11) }}", "a width of more than 1000"),
        ("{{ 'a' | indent(width=10 ** 11) }}", "a width of more than 1000"),
        ("{{ messages | tojson(indent=10 ** 11) }}", "a width of more than 1000"),
        ("{{ lipsum.__globals__.os }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ (''|attr('__class__')).__mro__ }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% for i in range(10 ** 9) %}{{ i }}{% endfor %}", "[Rr]ange too big"),
    ],
)
def test_what_a_template_refuses_is_the_requests_fault(template: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as refused:
        ours(template, [TALK[2]])
    assert refused.value.param == "messages"


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARS", 100)
    with pytest.raises(InvalidRequest, match="over 100 characters"):
        ours("{% for i in range(1000) %}{{ i }}{% endfor %}", TALK)


def test_messages_cannot_replace_the_templates_own_variables() -> None:
    assert ours("{{ bos_token }}{{ messages | length }}", TALK, bos_token="x") == "<s>4"


def test_model_without_template() -> None:
    with pytest.raises(InvalidRequest, match="no chat template; use /v1/completions"):
        render_chat(None, TALK, bos_text="", eos_text="")


def test_broken_template_names_its_line() -> None:
    with pytest.raises(ValueError, match="chat template, line 2: "):
        compile_chat_template("ok\n{% if %}")
