"""What an output must be, in the words of the client."""

from dataclasses import dataclass, field
from enum import StrEnum

LONGEST_SOURCE = 1 << 17
"""Characters. OpenAI's own bound is 120,000 for the names and values of a schema."""


class ConstraintKind(StrEnum):
    """How the `source` of a `Constraint` is read.

    - json_object: any JSON object; the source is empty
    - json_schema: a JSON schema, as JSON text
    - regex: a regular expression that the whole output matches
    - choice: a JSON array of the texts that the output may be
    - grammar: a context-free grammar in Lark's notation, its first rule being `start`, or in GBNF with `root`
    """

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class Constraint:
    """The whole output, from its first token to the end of text, is a text of this kind.

    Nothing may follow a complete one but the end of text; a request that reaches `max_tokens` before is cut. `param` is
    the field of the request that errors name.
    """

    kind: ConstraintKind
    source: str = ""
    param: str = field(default="response_format", compare=False)
