"""`tools` and `tool_choice` of a chat request."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from server.body import RequestModel, schema_of
from server.errors import BadRequest
from server.tools.definition import Tool, ToolUse

T = TypeVar("T")

MOST_TOOLS = 128
MOST_FORCED = 100_000
"""Characters of tools that become a grammar."""
DEEPEST_SCHEMA = 64
"""Levels of objects and lists. What is far deeper would exhaust the stack of whoever walks through it."""

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(RequestModel):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Default false. Forced calls follow the schema; if it is true, keywords that a grammar cannot keep are refused."""

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        if value.get("type", "object") != "object":
            raise ValueError('expected the schema of an object, with "type": "object"')
        if not isinstance(value.get("properties", {}), dict):
            raise ValueError("properties: expected an object with a schema for each name")
        if _depth(value) > DEEPEST_SCHEMA:
            raise ValueError(f"expected at most {DEEPEST_SCHEMA} levels")
        return value

    @property
    def tool(self) -> Tool:
        schema = {"type": "object", **(self.parameters or {})}
        parameters = schema if self.parameters else {**schema, "properties": {}}
        return Tool(self.name, self.description, parameters, bool(self.strict))


class FunctionTool(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(RequestModel):
    name: FunctionName


class NamedTool(RequestModel):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(RequestModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS)]


def _choice(value: object) -> object:
    """A word as an object of that type."""
    if isinstance(value, str) and value in ("auto", "none", "required"):
        return {"type": value}
    if isinstance(value, dict):
        return value
    raise PydanticCustomError("choice_type", 'expected "auto", "none", "required" or an object that names a function')


class ToolChoice(RequestModel):
    type: Literal["auto", "none", "required", "function", "allowed_tools"]
    function: Annotated[NamedFunction | None, Field(validate_default=True)] = None
    allowed_tools: Annotated[AllowedTools | None, Field(validate_default=True)] = None

    @field_validator("function", "allowed_tools")
    @classmethod
    def _there_if_announced(cls, value: T | None, info: ValidationInfo) -> T | None:
        if value is None and info.data.get("type") == info.field_name:
            raise PydanticCustomError("missing", "Field required")
        return value

    @property
    def is_forced(self) -> bool:
        mode = self.allowed_tools.mode if self.allowed_tools is not None else None
        return self.type in ("required", "function") or (self.type == "allowed_tools" and mode == "required")

    @property
    def names(self) -> tuple[str, ...] | None:
        """The functions that may be called, if it says which."""
        if self.type == "function" and self.function is not None:
            return (self.function.name,)
        if self.type == "allowed_tools" and self.allowed_tools is not None:
            return tuple(tool.function.name for tool in self.allowed_tools.tools)
        return None


AnyToolChoice = Annotated[
    ToolChoice,
    BeforeValidator(_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, schema_of(ToolChoice)]}),
]
Tools = Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)]


def tool_use(
    tools: list[FunctionTool] | None, choice: ToolChoice | None, parallel: bool | None, *, has_grammar: bool = False
) -> ToolUse | None:
    """What this asks for; None where nothing may be called. `has_grammar`: the answer has one in any case.

    Raises BadRequest.
    """
    given = tuple(tool.function.tool for tool in tools or ())
    names = tuple(tool.name for tool in given)
    for index, name in enumerate(names):
        if name in names[:index]:
            param = f"tools.{index}.function.name"
            raise BadRequest(f"{param}: there is another function called {name}", param=param)
    if (choice is not None and choice.type == "none") or (choice is None and not given):
        return None
    if not given:
        raise BadRequest("tool_choice: only allowed when there are tools", param="tool_choice")
    allowed = (choice.names if choice is not None else None) or names
    if absent := [name for name in allowed if name not in names]:
        raise BadRequest(f"tool_choice: none of the tools is called {absent[0]}", param="tool_choice")
    is_parallel = parallel is not False and (
        choice is None or choice.type != "function"
    )  # who names one wants one call
    use = ToolUse(given, allowed, choice is not None and choice.is_forced, is_parallel)
    if use.length > MOST_FORCED and (use.is_forced or has_grammar):
        message = f"tools: have {use.length} characters, expected at most {MOST_FORCED} as a part of a grammar"
        raise BadRequest(message, param="tools")
    return use


def _depth(value: object) -> int:
    """Levels of nested objects and lists, without recursion."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    return depth
