"""POST /v1/chat/completions: its request and its answer."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from server.ask import Ask
from server.body import RequestModel
from server.choice import Piece, ScoredToken
from server.errors import BadRequest
from server.openai.answer import Answer, Collected, Json
from server.openai.protocol import MAX_LOGPROBS, GenerationRequest
from server.tenants import Tenant


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


def _parts(content: object) -> object:
    """Plain text as its only part, so that errors in parts have one path."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content_type", "expected a string or a list of text parts")
    return content


Content = Annotated[
    list[TextPart],
    Field(min_length=1),
    BeforeValidator(_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": TextPart.model_json_schema()}]}),
]


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    tool_calls: list[Any] | None = None

    @field_validator("tool_calls")
    @classmethod
    def _no_calls(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise ValueError("tool calls are not supported by this server")
        return value

    @property
    def plain(self) -> dict[str, str]:
        """For the chat template. Templates know `system`, OpenAI's newer name for it is `developer`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs: only allowed when logprobs is true", param="top_logprobs")

    def longest_answer(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def ask(self, tenant: Tenant) -> Ask:
        return replace(super().ask(tenant), messages=tuple(message.plain for message in self.messages))


class ChatAnswer(Answer):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *arguments: Any, with_logprobs: bool, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._with_logprobs = with_logprobs
        self._begun: set[int] = set()

    def choice(self, index: int, collected: Collected) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": collected.text},
            "logprobs": self._logprobs(collected.tokens),
            "finish_reason": collected.finish_reason,
        }

    def whole(self, choices: list[Collected]) -> Json:
        """The scores of the prompt, of which there is one, stand beside the choices."""
        body = super().whole(choices)
        if self._prompt_logprobs is not None:
            body["prompt_logprobs"] = self.scored_prompt(0, choices[0])
        return body

    def deltas(self, piece: Piece) -> Iterator[Json]:
        """First the role, then text, at last the reason of the ending."""
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield self._delta(piece.index, {"role": "assistant", "content": ""})
        if piece.text or piece.tokens:
            yield self._delta(piece.index, {"content": piece.text}, piece.tokens)
        if piece.finish_reason is not None:
            yield self._delta(piece.index, {}) | {"finish_reason": piece.finish_reason}

    def _delta(self, index: int, delta: Json, tokens: tuple[ScoredToken, ...] = ()) -> Json:
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": None,
        }

    def _logprobs(self, tokens: tuple[ScoredToken, ...]) -> Json | None:
        if not self._with_logprobs:
            return None
        content = [
            _scored(token.data, token.logprob) | {"top_logprobs": [_scored(data, value) for data, value in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _scored(data: bytes, logprob: float) -> Json:
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}
