"""A model's chat template, also for conversations that it was not written for."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from server.tools.definition import Tool, ToolUse
from server.tools.form import HERMES, LLAMA, MISTRAL, ToolForm
from server.tools.instructions import Message, without_tools

PROBE = Tool("loramux_probe", "A probe.", {"type": "object", "properties": {}})
LLAMA_MARKS = ("ipython", LLAMA.opening)
"""What templates of Llama 3.1 and later mention: the role of results, and the token before calls of built-in tools."""
Variables = Mapping[str, bool | int | float | str]
"""Values of variables that a template reads beside messages and tools, such as Qwen3's `enable_thinking`."""
GREETING: Message = {"role": "user", "content": "Hello"}


class Render(Protocol):
    """Applies the template. Raises whatever the template does."""

    def __call__(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Variables,
    ) -> str: ...


class ChatTemplate:
    """`source` is the template's text. `form` is how the model writes calls; None finds out by the template."""

    def __init__(self, render: Render, source: str, form: ToolForm | None = None) -> None:
        self._render = render
        self._source = source
        self._form = form

    @cached_property
    def knows_tools(self) -> bool:
        """Whether a tool that it is given appears in the text: what a template does is surer than what it mentions."""
        try:
            return PROBE.name in self._render([dict(GREETING)], [PROBE.shown], True, {})
        except Exception:  # a template is a program of the model's: it raises what it likes
            return False

    @cached_property
    def form(self) -> ToolForm:
        if self._form is not None:
            return self._form
        if not self.knows_tools or HERMES.opening in self._source:
            return HERMES
        if MISTRAL.opening in self._source:
            return MISTRAL
        return LLAMA if any(mark in self._source for mark in LLAMA_MARKS) else HERMES

    def render(
        self, messages: Sequence[Message], use: ToolUse | None, add_generation_prompt: bool, variables: Variables
    ) -> str:
        """The prompt. Where a call is forced it ends with the beginning of one. Raises what the template raises."""
        tools = use.tools if use is not None else ()
        said = [_with_objects(message) for message in messages]
        if self.knows_tools:
            said = _one_call_each(said) if self.form.has_one_call else said
            text = self._render(said, [tool.shown for tool in tools] or None, add_generation_prompt, variables)
        else:
            text = self._render(without_tools(said, tools, self.form), None, add_generation_prompt, variables)
        return text + self.form.beginning if use is not None and use.is_forced and add_generation_prompt else text


def _one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several calls of one answer as an answer each, with its result behind it."""
    results = {message.get("tool_call_id"): message for message in messages if message["role"] == "tool"}
    apart: list[dict[str, Any]] = []
    moved: set[object] = set()
    for message in messages:
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            apart += [message] if message["role"] != "tool" or message.get("tool_call_id") not in moved else []
            continue
        for number, call in enumerate(calls):
            apart.append({**message, "content": "" if number else message["content"], "tool_calls": [call]})
            if call["id"] in results:
                apart.append(results[call["id"]])
                moved.add(call["id"])
    return apart


def _with_objects(message: Message) -> dict[str, Any]:
    """The message with the arguments of its calls as objects, as templates want them; what is none stays text."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            arguments = function["arguments"]
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}
