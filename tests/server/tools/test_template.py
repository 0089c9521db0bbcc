"""Conversations with tools in chat templates of each kind."""

from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import TEMPLATE, byte_level_tokenizer

from server.chat import ChatTokenizer
from server.errors import BadRequest
from server.tools.definition import Tool, ToolUse
from server.tools.form import FORMS, HERMES, LLAMA, MISTRAL, ToolForm

HERMES_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "{% if m.role == 'tool' %} of {{ m.name }} {{ m.tool_call_id }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA_TEMPLATE = (
    "{% if tools is not none %}Environment: ipython {% for tool in tools %}{{ tool.function | tojson }}{% endfor %}\n"
    "{% endif %}{% for m in messages %}<{{ 'ipython' if m.role == 'tool' else m.role }}>"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{% for m in messages %}{% if loop.last and tools is not none %}"
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('bad id') }}"
    "{% endif %}{% endfor %}[TOOL_CALLS] {{ m.tool_calls | map(attribute='function') | list | tojson }}</s>"
    "{% else %}<{{ m.role }}>{{ m.content }}</s>{% endif %}{% endfor %}"
)
CODE_TEMPLATE = "{% if tools %}{{ 1 / 0 }}{% endif %}" + TEMPLATE + "{# talks of tools and <tool_call> #}"
WEATHER = Tool("weather", "Tells.", {"type": "object", "properties": {"city": {"type": "string"}}})
USE = ToolUse((WEATHER,), ("weather",))
USER = {"role": "user", "content": "Hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TALK: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "weather"},
]
SHOWN = (
    '{"type": "function", "function": {"name": "weather", "description": "Tells.", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'
)


async def rendered(template: str, messages: list[dict[str, Any]], use: ToolUse | None, **options: Any) -> str:
    chat = ChatTokenizer(byte_level_tokenizer(template), **options)
    return await chat.decode(await chat.encode_chat(messages, tools=use))


@pytest.mark.parametrize(
    ("template", "given", "form"),
    [
        (HERMES_TEMPLATE, None, HERMES),
        (LLAMA_TEMPLATE, None, LLAMA),
        (MISTRAL_TEMPLATE, None, MISTRAL),
        (TEMPLATE + "{# [TOOL_CALLS] #}", None, HERMES),
        (TEMPLATE, None, HERMES),
        (CODE_TEMPLATE, None, HERMES),
        (None, None, HERMES),
        (TEMPLATE + "{# ipython #}", None, HERMES),
        (HERMES_TEMPLATE, LLAMA, LLAMA),
    ],
)
def test_the_form_is_found_in_the_template(template: str | None, given: ToolForm | None, form: ToolForm) -> None:
    assert ChatTokenizer(byte_level_tokenizer(template), form=given).tool_form is form


async def test_templates_that_know_tools_render_them() -> None:
    assert await rendered(HERMES_TEMPLATE, TALK, USE) == (
        f"<tools>{SHOWN}</tools>\n<user>Hello</s>"
        '<assistant><tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call></s>'
        "<tool>sunny of weather c1</s><assistant>"
    )
    text = await rendered(LLAMA_TEMPLATE, TALK, USE)
    assert '{"name": "weather", "parameters": {"city": "Rome"}}</s><ipython>sunny</s>' in text
    assert text.startswith('Environment: ipython {"name": "weather"')
    assert not (await rendered(LLAMA_TEMPLATE, TALK, None)).startswith("Environment")


async def test_what_the_template_refuses_is_refused() -> None:
    with pytest.raises(BadRequest, match="the model's chat template refuses the messages: bad id") as refused:
        await rendered(MISTRAL_TEMPLATE, TALK, USE)
    assert refused.value.param == "messages"


async def test_ids_are_what_the_template_wants() -> None:
    call = {**CALL, "id": MISTRAL.call_id("seed")}
    assert "[TOOL_CALLS] [{" in await rendered(MISTRAL_TEMPLATE, [USER, {**TALK[1], "tool_calls": [call]}], USE)
    for form in FORMS.values():
        assert form.call_id("a") == form.call_id("a") != form.call_id("b")
        assert len(form.call_id("a")) <= 40


async def test_several_calls_where_the_template_takes_one() -> None:
    """Each is an answer of its own then, with its result behind it."""
    calls = [CALL, {**CALL, "id": "c2"}, {**CALL, "id": "c3"}]
    results = [{**TALK[2], "content": text, "tool_call_id": key} for text, key in (("two", "c2"), ("one", "c1"))]
    text = await rendered(LLAMA_TEMPLATE, [USER, {**TALK[1], "tool_calls": calls}, *results, USER], USE)
    call = '<assistant>{"name": "weather", "parameters": {"city": "Rome"}}</s>'
    assert text.endswith(f"{call}<ipython>one</s>{call}<ipython>two</s>{call}<user>Hello</s><assistant>")


async def test_without_tools_everything_is_as_it_was() -> None:
    for template in (TEMPLATE, HERMES_TEMPLATE, LLAMA_TEMPLATE):
        tokenizer = byte_level_tokenizer(template)
        text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
        assert await ChatTokenizer(tokenizer).encode_chat([USER]) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("template", [TEMPLATE, CODE_TEMPLATE])
async def test_where_the_template_knows_none_the_system_tells_of_them(template: str) -> None:
    text = await rendered(template, TALK, USE)
    system, user, assistant, result, rest = text.split("<|im_start|>")[1:]
    assert system.startswith("system\nYou can call functions.")
    assert f"<tools>\n{SHOWN}\n</tools>" in system
    assert '<tool_call>\n{"name": <name of the function>, "arguments": <object with its arguments>}\n' in system
    assert user == "user\nHello<|im_end|>\n"
    assert assistant == f"assistant\n{HERMES.write('weather', {'city': 'Rome'})}<|im_end|>\n"
    assert result == "user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
    assert rest == "assistant\n"
    own = await rendered(template, [{"role": "system", "content": "Be brief."}, USER], USE)
    assert own.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert own.count("system\n") == 1


async def test_a_forced_call_is_begun() -> None:
    forced = ToolUse((WEATHER,), ("weather",), is_forced=True)
    assert (await rendered(TEMPLATE, [USER], forced)).endswith("<|im_start|>assistant\n<tool_call>\n")
    assert (await rendered(LLAMA_TEMPLATE, [USER], forced)).endswith("<assistant>")


async def test_a_tool_without_a_description_has_an_empty_one() -> None:
    template = "{% for t in tools or [] %}{{ t.function.name + ': ' + t.function.description }}.{% endfor %}"
    use = ToolUse((Tool("now", None, {"type": "object"}), WEATHER), ("now", "weather"))
    assert await rendered(template, [USER], use) == "now: .weather: Tells.."


@pytest.mark.parametrize("arguments", ["", "{", '{"a": 1', "null"])
async def test_arguments_of_earlier_calls_may_be_anything(arguments: str) -> None:
    """A model may have written them, and its client sends back what it got."""
    talk = [USER, {**TALK[1], "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": arguments}}]}]
    for template in (TEMPLATE, HERMES_TEMPLATE, LLAMA_TEMPLATE):
        assert '"weather"' in await rendered(template, talk, USE)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
async def test_the_real_model(smollm2: Path, form: ToolForm) -> None:
    """Its template knows no tools, and tells of itself where there is no message of the system."""
    chat = ChatTokenizer.from_folder(smollm2, form)
    text = await chat.decode(await chat.encode_chat(TALK, tools=USE))
    assert text.startswith("<|im_start|>system\nYou can call functions.")
    assert f'"{form.key}": <object' in text
    assert "named SmolLM" not in text
    assert f"<|im_start|>assistant\n{form.write('weather', {'city': 'Rome'})}<|im_end|>" in text
