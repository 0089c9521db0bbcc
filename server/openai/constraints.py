"""`response_format`, and vLLM's `structured_outputs`: what an answer must be."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from server.body import RequestModel
from server.engine.constraint import LONGEST_SOURCE, Constraint, ConstraintKind
from server.errors import BadRequest

KINDS = ("json", "regex", "choice", "grammar", "json_object")


class JsonSchema(RequestModel):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    """Nobody reads it."""
    description: str | None = None
    """Ignored: the model is not shown it."""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    """What it asks for and cannot be kept is refused, such as `not` and `uniqueItems`."""
    strict: bool | None = None
    """Ignored: no answer leaves its schema."""


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    """`json_object` is any object."""
    json_schema: Annotated[JsonSchema | None, Field(validate_default=True)] = None
    """With type `json_schema`."""

    @field_validator("json_schema")
    @classmethod
    def _there_if_announced(cls, value: JsonSchema | None, info: Any) -> JsonSchema | None:
        if value is None and info.data.get("type") == "json_schema":
            raise PydanticCustomError("missing", "Field required")
        return value

    @property
    def constraint(self) -> Constraint | None:
        if self.type == "json_schema" and self.json_schema is not None:
            param = "response_format.json_schema.schema"
            return Constraint(ConstraintKind.JSON_SCHEMA, _schema_text(self.json_schema.schema_), param)
        return Constraint(ConstraintKind.JSON_OBJECT) if self.type == "json_object" else None


class StructuredOutputs(RequestModel):
    """One of the kinds. What vLLM has beside them, and would change the answer, is refused."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    """A schema, or its text."""
    regex: str | None = None
    """Of the whole answer, in the syntax of Rust's `regex`, without look-around."""
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    """One of these."""
    grammar: str | None = None
    """In Lark's notation, beginning with `start`, or in llama.cpp's GBNF with `root`."""
    json_object: bool | None = None
    """Any object."""
    structural_tag: None = None
    """Refused."""
    whitespace_pattern: None = None
    """Refused: between the tokens of JSON are at most a space, or a new line and its indentation."""
    disable_any_whitespace: Literal[False] | None = None
    """Refused."""
    disable_additional_properties: Literal[False] | None = None
    """Refused: the schema says it."""

    @field_validator(
        "structural_tag",
        "whitespace_pattern",
        "disable_any_whitespace",
        "disable_additional_properties",
        mode="before",
    )
    @classmethod
    def _not_served(cls, value: object) -> object:
        if value is not None and value is not False:
            raise PydanticCustomError("unsupported", "not supported by this server")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> "StructuredOutputs":
        if all(getattr(self, "json_" if kind == "json" else kind) is None for kind in KINDS):
            raise ValueError(f"expected one of {', '.join(KINDS)}")
        given = [kind for kind in KINDS if self._value(kind) is not None]
        if len(given) > 1:
            raise ValueError(f"expected one of {', '.join(KINDS)}, got {' and '.join(given)}")
        return self

    @property
    def constraint(self) -> Constraint | None:
        kind = next((kind for kind in KINDS if self._value(kind) is not None), None)
        if kind is None:
            return None
        value, param = self._value(kind), f"structured_outputs.{kind}"
        match kind:
            case "json":
                text = value if isinstance(value, str) else _schema_text(value)
                return Constraint(ConstraintKind.JSON_SCHEMA, text, param)
            case "json_object":
                return Constraint(ConstraintKind.JSON_OBJECT, param=param)
            case "choice":
                return Constraint(ConstraintKind.CHOICE, json.dumps(value, ensure_ascii=False), param)
        return Constraint(ConstraintKind(kind), str(value), param)

    def _value(self, kind: str) -> Any:
        value = getattr(self, "json_" if kind == "json" else kind)
        return None if value is False else value


def constraint_of(format: ResponseFormat | None, outputs: StructuredOutputs | None) -> Constraint | None:
    """What both fields ask for. Raises BadRequest if it is too much."""
    first = format.constraint if format is not None else None
    second = outputs.constraint if outputs is not None else None
    if first is not None and second is not None:
        raise BadRequest("structured_outputs: response_format excludes it", param="structured_outputs")
    found = first or second
    if found is not None and len(found.source) > LONGEST_SOURCE:
        message = f"{found.param}: has {len(found.source)} characters, expected at most {LONGEST_SOURCE}"
        raise BadRequest(message, param=found.param, code="invalid_constraint")
    return found


def _schema_text(schema: object) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
