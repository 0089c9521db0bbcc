"""POST /v1/completions: its request and its answer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.ask import Ask
from server.body import limits_of
from server.choice import Piece, ScoredToken
from server.errors import BadRequest
from server.openai.answer import Answer, Collected, Json
from server.openai.protocol import GenerationRequest
from server.tenants import Tenant


def _prompts(value: object, info: ValidationInfo) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or many, as text or token ids, in one form."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("prompt_type", "expected a string, token ids, or a list of either, not empty")
    if _is_ids(value):
        return (tuple(value),)
    most = limits_of(info).prompts
    if len(value) > most:
        raise PydanticCustomError("prompt_count", "expected at most {most} prompts", {"most": most})
    if all(isinstance(prompt, str) for prompt in value):
        return tuple(value)
    if all(isinstance(prompt, list) and prompt and _is_ids(prompt) for prompt in value):
        return tuple(tuple(prompt) for prompt in value)
    raise PydanticCustomError("prompt_type", "expected all prompts to be strings, or all lists of token ids")


def _is_ids(value: list[Any]) -> bool:
    return set(map(type, value)) <= {int}  # true and false are no token ids


_IDS = {"type": "array", "items": {"type": "integer"}}
_TEXTS = {"type": "array", "items": {"type": "string"}}
Prompts = Annotated[
    Any,
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS}]}),
]


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            raise BadRequest("echo: not supported together with logprobs by this server", param="echo")

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def ask(self, tenant: Tenant) -> Ask:
        return replace(super().ask(tenant), prompts=self.prompt)


class CompletionAnswer(Answer):
    """`echoes` are the prompts' texts, one a prompt, if they are to stand before the answers."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, *arguments: Any, with_logprobs: bool, n: int, echoes: Sequence[str] = (), **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._with_logprobs = with_logprobs
        self._n = n
        self._echoes = echoes
        self._begun: set[int] = set()

    def choice(self, index: int, collected: Collected) -> Json:
        return {
            "index": index,
            "text": self._echo(index) + collected.text,
            "logprobs": self._logprobs(collected.tokens),
            "finish_reason": collected.finish_reason,
        }

    def deltas(self, piece: Piece) -> Iterator[Json]:
        text = piece.text if piece.index in self._begun else self._echo(piece.index) + piece.text
        self._begun.add(piece.index)
        yield {
            "index": piece.index,
            "text": text,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n] if self._echoes else ""

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> Json | None:
        """OpenAI's older form: parallel lists."""
        if not self._with_logprobs:
            return None
        return {
            "tokens": [_name(token.data) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{_name(data): value for data, value in token.top} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def _name(data: bytes) -> str:
    """The token's text, or `bytes:\\xNN...` where it is a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
