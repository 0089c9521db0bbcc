"""What a request says of tools."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function that the client can call. `parameters` is the JSON schema of an object.

    What a grammar cannot keep of the schema is left out, unless it is `strict`.
    """

    name: str
    description: str | None
    parameters: Json
    strict: bool = False

    @property
    def shown(self) -> dict[str, Any]:
        """In OpenAI's form, which chat templates know; some of them fail without a description."""
        function = {"name": self.name, "description": self.description or "", "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolUse:
    """Tools that the model is told of. Those called `names` may be called, one of them must be if `is_forced`."""

    tools: tuple[Tool, ...]
    names: tuple[str, ...]
    is_forced: bool = False
    is_parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if tool.name in self.names)

    @cached_property
    def length(self) -> int:
        """Characters that the tools take as JSON, at least."""
        return sum(len(json.dumps(tool.shown, ensure_ascii=False)) for tool in self.tools)
