"""Text to text and calls: whole, in any pieces, and when models get it wrong."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spoken import NAMES, Spoken, cut, read

from server.tools.call_parser import Arguments, CallBegins, CallParser, Text
from server.tools.form import FORMS, HERMES, LLAMA, MISTRAL, ToolForm

WEATHER = '{"name": "weather", "arguments": {"city": "Rome"}}'
ROME = ("weather", '{"city": "Rome"}')


def tagged(*objects: str) -> str:
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)


HERMES_EXAMPLES = {
    "": Spoken(""),
    "Hello": Spoken("Hello"),
    " \n Hello \n ": Spoken(" \n Hello \n "),
    "a < b, <tool> and <tool_cal": Spoken("a < b, <tool> and <tool_cal"),
    tagged(WEATHER): Spoken("", (ROME,)),
    f"<tool_call>{WEATHER}</tool_call>": Spoken("", (ROME,)),
    f"I look.\n{tagged(WEATHER)}\n": Spoken("I look.", (ROME,)),
    f"I look.\n{tagged(WEATHER)}\nDone.\n": Spoken("I look.\n\nDone.", (ROME,)),
    f"\n\n{tagged(WEATHER)}\n\nDone.": Spoken("Done.", (ROME,)),
    f"A {tagged(WEATHER)} B {tagged(WEATHER)} C": Spoken("A  B  C", (ROME, ROME)),
    tagged(WEATHER, '{"name": "now", "arguments": {}}'): Spoken("", (ROME, ("now", "{}"))),
    tagged('{"arguments": {"city": "Rome"}, "name": "weather"}'): Spoken("", (ROME,)),
    tagged('{"type": "function", "name": "weather", "parameters": {"city": "Rome"}}'): Spoken("", (ROME,)),
    tagged('{"id": 7, "name": "now", "note": [1, {"name": "x"}]}'): Spoken("", (("now", "{}"),)),
    tagged('{"name": "now", "arguments": null}'): Spoken("", (("now", "{}"),)),
    tagged('{"name": "now", "arguments": ""}'): Spoken("", (("now", "{}"),)),
    tagged('{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}'): Spoken("", (ROME,)),
    tagged('{"name": "weather", "arguments": {"city": "a\nb"}}'): Spoken("", (("weather", '{"city": "a\\nb"}'),)),
    tagged('{"name": "weather", "arguments": {"city": "</tool_call> \\" {"}}'): Spoken(
        "", (("weather", '{"city": "</tool_call> \\" {"}'),)
    ),
    # Models forget the last brace, the closing marker, or the opening one of a second call.
    '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}</tool_call>.': Spoken(".", (ROME,)),
    '<tool_call>{"name": "weather", "arguments": {"city": "Rome"} Done.': Spoken("Done.", (ROME,)),
    f"<tool_call>{WEATHER}": Spoken("", (ROME,)),
    f"<tool_call>{WEATHER}\nDone.": Spoken("Done.", (ROME,)),
    f"<tool_call>{WEATHER}\n{WEATHER}</tool_call>": Spoken("", (ROME, ROME)),
    f"<tool_call>{WEATHER},{WEATHER}<tool_call>{WEATHER}": Spoken("", (ROME, ROME, ROME)),
    # Answers are cut.
    f"<tool_call>{WEATHER}\n</tool": Spoken("", (ROME,)),
    f"<tool_call>{WEATHER},": Spoken("", (ROME,)),
    f"{tagged(WEATHER)}\n<tool_": Spoken("", (ROME,)),
    f"{tagged(WEATHER)}\n<tool_ ": Spoken("<tool_", (ROME,)),
    f"{tagged(WEATHER)} a <": Spoken("a <", (ROME,)),
    # What is no call is text.
    tagged('{"name": "nobody", "arguments": {}}'): Spoken(tagged('{"name": "nobody", "arguments": {}}')),
    tagged("{'name': 'now'}"): Spoken(tagged("{'name': 'now'}")),
    tagged('{"name": "now", "arguments": {\'a\': 1}}'): Spoken(tagged('{"name": "now", "arguments": {\'a\': 1}}')),
    tagged('{"name": "now", "arguments": { x}}'): Spoken(tagged('{"name": "now", "arguments": { x}}')),
    tagged('{"name": "now", "arguments": [1]}'): Spoken(tagged('{"name": "now", "arguments": [1]}')),
    tagged('{"name": "now", "arguments": 5}'): Spoken(tagged('{"name": "now", "arguments": 5}')),
    tagged('{"name": "now", "arguments": "five"}'): Spoken(tagged('{"name": "now", "arguments": "five"}')),
    tagged('{"arguments": {}}'): Spoken(tagged('{"arguments": {}}')),
    tagged('{"answer": {}}'): Spoken(tagged('{"answer": {}}')),
    tagged("now()"): Spoken(tagged("now()")),
    tagged(f"[{WEATHER}]"): Spoken(tagged(f"[{WEATHER}]")),
    '<tool_call>{"name": "now", "argum': Spoken('<tool_call>{"name": "now", "argum'),
    f"<tool_call><tool_call>{WEATHER}</tool_call>": Spoken("<tool_call>", (ROME,)),
    # What has begun as a call is one, whatever its arguments become.
    '<tool_call>{"name": "weather", "arguments": {"city": "Ro': Spoken("", (("weather", '{"city": "Ro'),)),
    tagged('{"name": "weather", "arguments": {"city": "Rome",}}') + "\nDone.": Spoken(
        "Done.", (("weather", '{"city": "Rome",}'),)
    ),
    tagged('{"name": "weather", "arguments": {"days": 07}}', WEATHER): Spoken("", (("weather", '{"days": 07}'), ROME)),
}
NATIVE = '{"name": "weather", "parameters": {"city": "Rome"}}'
LLAMA_EXAMPLES = {
    NATIVE: Spoken("", (ROME,)),
    f"\n{NATIVE}\n": Spoken("", (ROME,)),
    WEATHER: Spoken("", (ROME,)),
    f"<|python_tag|>{NATIVE}": Spoken("", (ROME,)),
    f"I look. <|python_tag|>{NATIVE}; {NATIVE}": Spoken("I look.", (ROME, ROME)),
    f"{NATIVE};{NATIVE}": Spoken("", (ROME, ROME)),
    f"{NATIVE};": Spoken("", (ROME,)),
    f"{NATIVE}; and so on": Spoken("; and so on", (ROME,)),
    f'{NATIVE} ; {{"a": 1}} .': Spoken('; {"a": 1} .', (ROME,)),
    f"Here: {NATIVE}": Spoken(f"Here: {NATIVE}"),
    '{"name": "Bob", "age": 7}': Spoken('{"name": "Bob", "age": 7}'),
    '{"age": 7, "name": "now"}': Spoken('{"age": 7, "name": "now"}'),
    '<|python_tag|>weather.call(city="Rome")': Spoken('<|python_tag|>weather.call(city="Rome")'),
    '{"name": "weather", "parameters": {"city": "Rome",}} ?': Spoken("", (("weather", '{"city": "Rome",}} ?'),)),
}
MISTRAL_EXAMPLES = {
    f"[TOOL_CALLS] [{WEATHER}]": Spoken("", (ROME,)),
    f"I look.[TOOL_CALLS][{WEATHER}, {WEATHER}] Done": Spoken("I look. Done", (ROME, ROME)),
    f"[TOOL_CALLS]{WEATHER}": Spoken("", (ROME,)),
    f"[TOOL_CALLS] [{WEATHER}": Spoken("", (ROME,)),
    f"[{WEATHER}]": Spoken(f"[{WEATHER}]"),
    "[TOOL_CALLS] []": Spoken("[TOOL_CALLS] []"),
    "[TOOL_CALLS]now[ARGS]{}": Spoken("[TOOL_CALLS]now[ARGS]{}"),
    "[TOOL_CALL [1, 2]": Spoken("[TOOL_CALL [1, 2]"),
}
EXAMPLES = [
    (form, *each)
    for form, examples in ((HERMES, HERMES_EXAMPLES), (LLAMA, LLAMA_EXAMPLES), (MISTRAL, MISTRAL_EXAMPLES))
    for each in examples.items()
]


@pytest.mark.parametrize(("form", "text", "spoken"), EXAMPLES)
def test_examples(form: ToolForm, text: str, spoken: Spoken) -> None:
    assert read(form, [text]) == spoken
    assert read(form, text) == spoken


FRAGMENTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "<tool",
        "_call>",
        "<",
        ">",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        ";",
    ),
    *('"name"', '"arguments"', '"parameters"', '"type"', '"weather"', '"now"', '"a"', '"', "\\", '\\"', "\\u00e9"),
    *(" ", "\n", "\t", "1", "-", "0.5e3", "true", "null", "Hello", "漢", "\x00", "\N{NO-BREAK SPACE}"),
    *(WEATHER, NATIVE, '{"name": "now", "arguments": ', '{"arguments": {"a": 1}, '),
]
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=25).map("".join)
forms = st.sampled_from(list(FORMS.values()))
places = st.lists(st.integers(0, 2000), max_size=12)


@settings(max_examples=100, deadline=None)
@given(forms, texts, places, st.sampled_from([None, 1, 2]))
def test_however_it_is_cut_the_same_comes_out(form: ToolForm, text: str, at: list[int], most: int | None) -> None:
    assert read(form, cut(text, at), most) == read(form, [text], most) == read(form, text, most)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)
calls = st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(), values, max_size=4))
words = st.text(st.characters(exclude_characters="<{")).filter(lambda text: text.strip(" \t\r\n;,") == text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(words, calls), max_size=4), words, places, st.booleans())
def test_calls_between_texts(said: list[tuple[str, tuple[str, dict]]], last: str, at: list[int], ascii: bool) -> None:
    """What is written in a form is read back: every text, and every call with the very arguments."""
    text, content = "", ""
    for words, (name, arguments) in said:
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii)
        text += f"{words}<tool_call>\n{call}\n</tool_call>"
        content += words
    spoken = read(HERMES, cut(text + last, at))
    assert spoken.content == content + last
    assert [(name, json.loads(arguments)) for name, arguments in spoken.calls] == [call for _, call in said]


@settings(max_examples=100, deadline=None)
@given(st.lists(calls, min_size=1, max_size=3), places)
def test_calls_alone_in_every_form(said: list[tuple[str, dict]], at: list[int]) -> None:
    for form in FORMS.values():
        objects = [json.dumps({"name": name, form.key: arguments}) for name, arguments in said]
        text = form.beginning + form.between.join(objects) + form.end
        for spoken, wanted in ((read(form, cut(text, at)), said), (read(form, [form.write(*said[0])]), said[:1])):
            assert spoken.content == ""
            assert [(name, json.loads(arguments)) for name, arguments in spoken.calls] == wanted


@settings(max_examples=100, deadline=None)
@given(texts)
def test_without_a_call_no_character_is_lost(text: str) -> None:
    for form in FORMS.values():
        spoken = read(form, [text])
        if not spoken.calls:
            assert spoken.content == text


def test_arguments_come_while_they_are_said() -> None:
    parser = CallParser(HERMES, NAMES)
    assert parser.feed('<tool_call>\n{"name": "weather", "arguments": {') == []
    assert parser.feed('"city": "Ro') == [CallBegins(0, "weather"), Arguments(0, '{"city": "Ro')]
    assert parser.feed("me") == [Arguments(0, "me")]
    assert parser.feed('"}}\n</tool_') == [Arguments(0, '"}')]
    assert parser.feed("call>") == parser.end() == []


def test_a_json_answer_is_not_held_back() -> None:
    """An answer of a Llama may be JSON that is no call; it streams from where that is known."""
    parser = CallParser(LLAMA, NAMES)
    assert parser.feed('{"report') == []
    assert parser.feed('": "') == [Text('{"report'), Text('": "')]
    assert parser.feed("good") == [Text("good")]


def test_what_follows_the_most_calls_is_dropped() -> None:
    text = f"One. {tagged(WEATHER, WEATHER)} Two."
    assert read(HERMES, [text], most=1) == Spoken("One. \n Two.", (ROME,))
    assert read(HERMES, [text], most=2).calls == (ROME, ROME)


def test_long_space_and_arguments_take_time_by_their_length() -> None:
    """Megabytes in pieces of a token's size; squared time would take minutes."""
    for form in FORMS.values():
        space = " " * 200_000
        text = space + form.write("now", {}) + space + "Done."
        assert read(form, [text[start : start + 10] for start in range(0, len(text), 10)]).calls == (("now", "{}"),)
    long = "x" * 1_000_000
    text = tagged(
        json.dumps({"arguments": {"a": long}, "name": "now"}), json.dumps({"name": "now", "arguments": {"a": long}})
    )
    spoken = read(HERMES, [text[start : start + 50] for start in range(0, len(text), 50)])
    assert [json.loads(arguments)["a"] == long for _, arguments in spoken.calls] == [True, True]
