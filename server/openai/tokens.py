"""POST /tokenize and /detokenize: their requests."""

from functools import cached_property
from typing import Any, Self

from server.body import RequestModel, validate
from server.config import LimitSettings
from server.errors import BadRequest
from server.openai.messages import Messages, TemplateVariables
from server.openai.tools import Tools, tool_use
from server.route_options import Name
from server.tools.definition import ToolUse


class TokenizeRequest(RequestModel):
    """Either a text or messages in the chat template."""

    model: Name | None = None
    prompt: str | None = None
    """Either this or `messages`."""
    messages: Messages | None = None
    """As in chat completions."""
    tools: Tools | None = None
    """As in chat completions."""
    add_special_tokens: bool = True
    """Default true. For `prompt`."""
    add_generation_prompt: bool = True
    """Default true. For `messages`."""
    chat_template_kwargs: TemplateVariables | None = None
    """As in chat completions."""
    return_token_strs: bool | None = None
    """Default false."""

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        request = validate(cls, data, limits)
        if (request.prompt is None) == (request.messages is None):
            raise BadRequest("prompt: expected either prompt or messages", param="prompt")
        _ = request.tool_use
        return request

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """Raises BadRequest."""
        return tool_use(self.tools, None, None)


class DetokenizeRequest(RequestModel):
    model: Name | None = None
    tokens: list[int]

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        return validate(cls, data, limits)
