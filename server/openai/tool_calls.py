"""What a model says, as OpenAI shows it: text and tool calls."""

from collections.abc import Callable
from typing import Any

from server.tools.call_parser import Arguments, CallBegins, CallParser, Said, Text

Json = dict[str, Any]


class ToolCalls:
    """One choice of an answer that may have calls. `new_id` gives the id of the call with a number.

    Where calls are forced there is no text: what looks like it is a part of a call that was cut.
    """

    def __init__(self, parser: CallParser, new_id: Callable[[int], str], *, is_forced: bool = False) -> None:
        self._parser = parser
        self._new_id = new_id
        self._is_forced = is_forced

    @property
    def has_calls(self) -> bool:
        return self._parser.num_calls > 0

    def message(self, text: str) -> Json:
        """The content, null beside nothing but calls, and the calls of a whole answer."""
        content, calls = "", list[Json]()
        for said in self._said(text, is_end=True):
            if isinstance(said, Text):
                content += said.text
            elif isinstance(said, CallBegins):
                calls.append(self._call(said))
            else:
                calls[said.index]["function"]["arguments"] += said.text
        shown = content or (None if calls or self._is_forced else "")
        return {"content": shown, "tool_calls": calls} if calls else {"content": shown}

    def deltas(self, text: str, is_end: bool) -> list[Json]:
        """The same piece by piece: a call's id and name come first, then its arguments."""
        return [self._delta(each) for each in self._said(text, is_end)]

    def _said(self, text: str, is_end: bool) -> list[Said]:
        said = self._parser.feed(text) + (self._parser.end() if is_end else [])
        return [each for each in said if not (self._is_forced and isinstance(each, Text))]

    def _delta(self, said: Said) -> Json:
        if isinstance(said, Text):
            return {"content": said.text}
        if isinstance(said, Arguments):
            return {"tool_calls": [{"index": said.index, "function": {"arguments": said.text}}]}
        return {"tool_calls": [{"index": said.index, **self._call(said)}]}

    def _call(self, said: CallBegins) -> Json:
        function = {"name": said.name, "arguments": ""}
        return {"id": self._new_id(said.index), "type": "function", "function": function}
