"""POST /tokenize and /detokenize: their requests."""

from typing import Annotated, Any, Self

from pydantic import Field

from server.body import RequestModel, validate
from server.config import LimitSettings
from server.errors import BadRequest
from server.openai.chat import ChatMessage
from server.route_options import Name


class TokenizeRequest(RequestModel):
    """Either a text or messages in the chat template."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        request = validate(cls, data, limits)
        if (request.prompt is None) == (request.messages is None):
            raise BadRequest("prompt: expected either prompt or messages", param="prompt")
        return request


class DetokenizeRequest(RequestModel):
    model: Name | None = None
    tokens: list[int]

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        return validate(cls, data, limits)
