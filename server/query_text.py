"""What a router reads of a request: the user's own words, never the chat template."""

from collections.abc import Sequence
from enum import StrEnum

from server.chat import ChatTokenizer
from server.errors import BadRequest
from server.tools.instructions import Message


class QueryScope(StrEnum):
    """How much of a conversation a router reads."""

    LAST_TURN = "last_turn"
    CONVERSATION = "conversation"


def of_messages(messages: Sequence[Message], scope: QueryScope, *, sticky: bool = False) -> str:
    """The last user turn; with `sticky` the first one, which stays the same while the conversation grows.

    The whole conversation is what user and assistant said, without the system's instructions and the tools' results.
    """
    if scope is QueryScope.CONVERSATION and not sticky:
        said = [message["content"] for message in messages if message["role"] in ("user", "assistant")]
        return "\n".join(text for text in said if text)
    turns: list[str] = [message["content"] for message in messages if message["role"] == "user"]
    if not turns:
        return ""
    return turns[0] if sticky else turns[-1]


async def of_prompts(prompts: Sequence[str | tuple[int, ...]], tokenizer: ChatTokenizer) -> str:
    """The only prompt as text. Raises BadRequest for several: one request has one decision."""
    if len(prompts) != 1:
        message = f"prompt: a router chooses for one prompt at a time, got {len(prompts)}; send one request for each"
        raise BadRequest(message, param="prompt")
    (prompt,) = prompts
    return prompt if isinstance(prompt, str) else await tokenizer.decode(prompt, skip_special_tokens=True)
