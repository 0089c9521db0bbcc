"""Conversations with tools for chat templates that know none: everything in messages of system, user and assistant."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.tools.definition import Tool
from server.tools.form import ToolForm

Message = Mapping[str, Any]

OPENING, CLOSING = "<tool_response>\n", "\n</tool_response>"


def instructions(tools: Sequence[Tool], form: ToolForm) -> str:
    """What the system tells of the tools, after Hermes (Nous Research, Hermes-Function-Calling)."""
    listed = "\n".join(json.dumps(tool.shown, ensure_ascii=False) for tool in tools)
    example = f'{{"name": <name of the function>, "{form.key}": <object with its arguments>}}'
    call = form.beginning + example + form.end
    return (
        "You can call functions. Each line between <tools> and </tools> describes one:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "To call a function, answer with its name and arguments as JSON in exactly this form:\n"
        f"{call}\n"
        "Its result comes between <tool_response> and </tool_response>. If no function helps, answer in plain words."
    )


def without_tools(messages: Sequence[Message], tools: Sequence[Tool], form: ToolForm) -> list[dict[str, Any]]:
    """The same conversation in plain messages.

    The system's message ends with the instructions, if there are tools; calls are text of the assistant as it would
    write them; results that follow each other are one message of the user, since templates often want turns to
    alternate.
    """
    plain: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"{OPENING}{message['content']}{CLOSING}"
            if plain and plain[-1].get("has_results"):
                plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{result}"}
            else:
                plain.append({"role": "user", "content": result, "has_results": True})
        elif message.get("tool_calls"):
            functions = [call["function"] for call in message["tool_calls"]]
            calls = [form.write(function["name"], function["arguments"]) for function in functions]
            plain.append({"role": message["role"], "content": "\n".join([message["content"], *calls]).strip("\n")})
        else:
            plain.append(message)
    if tools:
        plain = _instructed(plain, instructions(tools, form))
    return [{"role": message["role"], "content": message["content"]} for message in plain]


def _instructed(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}".strip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
