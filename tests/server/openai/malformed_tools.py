"""Malformed requests with tools: the tools, the choice among them, and calls in the conversation."""

from typing import Any

from malformed import USER, Case, chat


def function(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def tools(param: str, code: str = "invalid_value", *given: Any, **fields: Any) -> Case:
    return chat(param, code, tools=list(given) or [function()], **fields)


def said(**fields: Any) -> dict[str, Any]:
    return {"messages": [*USER, {"role": "assistant", "content": None, **fields}]}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NESTED: dict[str, Any] = {"type": "object"}
for _ in range(100):
    NESTED = {"type": "object", "properties": {"a": NESTED}}

TOOLS = [
    chat("tools", "invalid_type", tools="f"),
    chat("tools", "invalid_type", tools={"name": "f"}),
    chat("tools", tools=[function(f"f{number}") for number in range(129)]),
    tools("tools.0", "invalid_type", "f"),
    tools("tools.0.type", "missing_required_parameter", {"function": {"name": "f"}}),
    tools("tools.0.type", "invalid_value", {"type": "custom", "custom": {"name": "f"}}),
    tools("tools.0.function", "missing_required_parameter", {"type": "function"}),
    tools("tools.0.function.name", "missing_required_parameter", {"type": "function", "function": {}}),
    tools("tools.0.function.name", "invalid_type", function(7)),
    tools("tools.0.function.name", "invalid_value", function("")),
    tools("tools.0.function.name", "invalid_value", function("a.b")),
    tools("tools.0.function.name", "invalid_value", function("get weather")),
    tools("tools.0.function.name", "invalid_value", function("f\n")),
    tools("tools.0.function.name", "invalid_value", function("größe")),
    tools("tools.0.function.name", "invalid_value", function("f" * 65)),
    tools("tools.2.function.name", "invalid_value", function("f"), function("g"), function("f")),
    tools("tools.0.function.description", "invalid_type", function(description=["Does."])),
    tools("tools.0.function.parameters", "invalid_type", function(parameters="{}")),
    tools("tools.0.function.parameters", "invalid_type", function(parameters=[])),
    tools("tools.0.function.parameters", "invalid_value", function(parameters={"type": "array"})),
    tools("tools.0.function.parameters", "invalid_value", function(parameters={"type": ["object", "null"]})),
    tools("tools.0.function.parameters", "invalid_value", function(parameters={"properties": ["a"]})),
    tools("tools.0.function.parameters", "invalid_value", function(parameters=NESTED)),
    tools("tools.0.function.strict", "invalid_type", function(strict="yes")),
    tools("parallel_tool_calls", "invalid_type", parallel_tool_calls="no"),
    tools("tool_choice", "invalid_type", tool_choice="sometimes"),
    tools("tool_choice", "invalid_type", tool_choice=5),
    tools("tool_choice.type", "missing_required_parameter", tool_choice={}),
    tools("tool_choice.type", "invalid_value", tool_choice={"type": "custom", "name": "f"}),
    tools("tool_choice.function", "missing_required_parameter", tool_choice={"type": "function"}),
    tools("tool_choice.function.name", "missing_required_parameter", tool_choice={"type": "function", "function": {}}),
    tools("tool_choice", "invalid_value", tool_choice=function("g")),
    tools("tool_choice.allowed_tools", "missing_required_parameter", tool_choice={"type": "allowed_tools"}),
    tools(
        "tool_choice",
        tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("g")]}},
    ),
    chat("tool_choice", tool_choice="auto"),
    chat("tool_choice", tool_choice="required"),
    chat("tool_choice", tool_choice=function(), tools=[]),
    chat("messages.0.tool_call_id", "missing_required_parameter", messages=[{"role": "tool", "content": "Hi"}]),
    chat("messages.0.tool_call_id", "invalid_type", messages=[{"role": "tool", "content": "Hi", "tool_call_id": 5}]),
    chat("messages.0.content", "missing_required_parameter", messages=[{"role": "tool", "tool_call_id": "1"}]),
    chat("messages.0.tool_calls", messages=[{"role": "user", "content": "Hi", "tool_calls": [CALL]}]),
    chat("messages.1.content", "invalid_type", **said()),
    chat("messages.1.content", "invalid_type", **said(tool_calls=[])),
    chat("messages.1.content", "invalid_type", **said(tool_calls=[CALL], content=5)),
    chat("messages.1.tool_calls", "invalid_type", **said(tool_calls="f")),
    chat("messages.1.tool_calls.0.function", "missing_required_parameter", **said(tool_calls=[{"id": "1"}])),
    chat("messages.1.tool_calls.0.type", **said(tool_calls=[{**CALL, "type": "custom"}])),
    chat(
        "messages.1.tool_calls.0.function.arguments",
        "invalid_type",
        **said(tool_calls=[{**CALL, "function": {"name": "f", "arguments": {}}}]),
    ),
    chat(
        "messages.1.function_call",
        "unsupported_parameter",
        **said(content="", function_call={"name": "f", "arguments": "{}"}),
    ),
    chat("messages.0.content.0.type", messages=[{"role": "user", "content": [{"type": "input_audio"}]}]),
    chat("messages", "context_length_exceeded", tools=[function(description="x" * 1_000_000)]),
    Case("/tokenize", {"messages": USER, "tools": [function("a.b")]}, "tools.0.function.name"),
]
