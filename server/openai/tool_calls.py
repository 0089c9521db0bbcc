"""What a model says, as OpenAI shows it: text and tool calls."""

from collections.abc import Callable
from typing import Any

from server.tools.call_parser import Arguments, CallBegins, CallParser, Said, Text

Json = dict[str, Any]


class ToolCalls:
    """One choice of an answer that may have calls. `new_id` gives the id of the call with a number."""

    def __init__(self, parser: CallParser, new_id: Callable[[int], str]) -> None:
        self._parser = parser
        self._new_id = new_id

    @property
    def has_calls(self) -> bool:
        return self._parser.num_calls > 0

    def message(self, text: str) -> Json:
        """The content, null beside nothing but calls, and the calls of a whole answer."""
        content, calls = "", list[Json]()
        for said in [*self._parser.feed(text), *self._parser.end()]:
            if isinstance(said, Text):
                content += said.text
            elif isinstance(said, CallBegins):
                calls.append(self._call(said))
            else:
                calls[said.index]["function"]["arguments"] += said.text
        return {"content": content or None, "tool_calls": calls} if calls else {"content": content}

    def deltas(self, text: str, is_end: bool) -> list[Json]:
        """The same piece by piece: a call's id and name come first, then its arguments."""
        said = self._parser.feed(text) + (self._parser.end() if is_end else [])
        return [self._delta(each) for each in said]

    def _delta(self, said: Said) -> Json:
        if isinstance(said, Text):
            return {"content": said.text}
        if isinstance(said, Arguments):
            return {"tool_calls": [{"index": said.index, "function": {"arguments": said.text}}]}
        return {"tool_calls": [{"index": said.index, **self._call(said)}]}

    def _call(self, said: CallBegins) -> Json:
        function = {"name": said.name, "arguments": ""}
        return {"id": self._new_id(said.index), "type": "function", "function": function}
