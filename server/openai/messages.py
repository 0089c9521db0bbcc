"""The messages of a chat, as clients send them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from server.body import RequestModel, limits_of
from server.chat import RESERVED

LONGEST_VARIABLE = 1024


def _kind(value: object) -> object:
    if isinstance(value, str) and value != "text":
        raise PydanticCustomError("part_kind", "only parts of type text are supported by this server")
    return value


class TextPart(RequestModel):
    type: Annotated[Literal["text"], BeforeValidator(_kind)]
    text: str


def _parts(content: object, info: ValidationInfo) -> object:
    """Plain text as its only part, so that errors in parts have one path. Calls need no text beside them."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content in (None, ()) and info.data.get("tool_calls"):
        return []
    if content == ():
        raise PydanticCustomError("missing", "Field required")
    if not isinstance(content, list):
        raise PydanticCustomError("content_type", "expected a string or a list of text parts")
    if not content:
        raise PydanticCustomError("content_length", "expected at least one part")
    return content


Content = Annotated[
    list[TextPart],
    Field(default_factory=tuple, validate_default=True),
    BeforeValidator(_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": TextPart.model_json_schema()}]}),
]


class CalledFunction(RequestModel):
    """`arguments` are JSON text, as the model wrote them: they need not be what they should."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str


class ToolCall(RequestModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[ToolCall] | None = None
    """Only of the assistant."""
    content: Content
    """Required, except beside tool calls. Several parts are joined by line ends."""
    tool_call_id: Annotated[str | None, Field(validate_default=True)] = None
    """Of messages with role `tool`: the call that this is the result of."""
    name: str | None = None
    """Of results: the function. Ignored otherwise."""
    function_call: Any | None = None
    """Refused: the older form of `tool_calls`."""

    @field_validator("tool_calls")
    @classmethod
    def _only_the_assistant_calls(cls, value: list[ToolCall] | None, info: ValidationInfo) -> list[ToolCall] | None:
        if value and info.data.get("role") != "assistant":
            raise ValueError("only messages of the assistant have tool calls")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _results_belong_to_calls(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("role") == "tool":
            raise PydanticCustomError("missing", "Field required: the id of the call that this is the result of")
        return value

    @field_validator("function_call")
    @classmethod
    def _no_older_form(cls, value: object) -> None:
        if value is not None:
            raise PydanticCustomError("unsupported", "not supported by this server; use tool_calls")

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)


def _few(value: object, info: ValidationInfo) -> object:
    """Before they are looked at one by one: 40,000 of them held the interpreter for a quarter of a second."""
    most = limits_of(info).messages
    if isinstance(value, list):
        contents = [message.get("content") for message in value if isinstance(message, dict)]
        parts = sum(len(content) for content in contents if isinstance(content, list))
        if len(value) + parts > most:
            message = "expected at most {most} messages, parts of their content included"
            raise PydanticCustomError("message_count", message, {"most": most})
    return value


Messages = Annotated[list[ChatMessage], Field(min_length=1), BeforeValidator(_few)]


def _variables(value: dict[str, Any]) -> dict[str, Any]:
    for name, given in value.items():
        if name in RESERVED or not name.isidentifier():
            raise PydanticCustomError("name", "{name} is no variable of a template", {"name": repr(name[:64])})
        if not isinstance(given, bool | int | float | str) or (
            isinstance(given, str) and len(given) > LONGEST_VARIABLE
        ):
            message = "expected booleans, numbers and texts of at most {most} characters"
            raise PydanticCustomError("variable", message, {"most": LONGEST_VARIABLE})
    return value


TemplateVariables = Annotated[
    dict[str, Any],
    Field(max_length=32),
    AfterValidator(_variables),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"anyOf": [{"type": "boolean"}, {"type": "number"}, {"type": "string"}]},
            "maxProperties": 32,
        }
    ),
]


def plain(messages: Sequence[ChatMessage]) -> tuple[dict[str, Any], ...]:
    """For the chat template, whose messages always have text. Results get the name of the function that was called.

    Templates know `system`; OpenAI's newer name for it is `developer`.
    """
    names: dict[str, str] = {}
    shown: list[dict[str, Any]] = []
    for message in messages:
        one: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
        }
        if message.tool_calls:
            one["tool_calls"] = [call.model_dump() for call in message.tool_calls]
            names |= {call.id: call.function.name for call in message.tool_calls}
        if message.role == "tool" and message.tool_call_id is not None:
            one["tool_call_id"] = message.tool_call_id
            name = message.name or names.get(message.tool_call_id)
            one |= {"name": name} if name else {}
        shown.append(one)
    return tuple(shown)
