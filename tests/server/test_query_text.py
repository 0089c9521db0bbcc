"""What a router reads of a conversation."""

from typing import Any

from server.query_text import QueryScope, of_messages

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "the result"},
    {"role": "assistant", "content": "Two"},
    {"role": "user", "content": "Three"},
    {"role": "tool", "content": "the last result"},
]


def test_only_what_user_and_assistant_said() -> None:
    assert of_messages(CONVERSATION, QueryScope.LAST_TURN) == "Three"
    assert of_messages(CONVERSATION, QueryScope.LAST_TURN, sticky=True) == "One"
    assert of_messages(CONVERSATION, QueryScope.CONVERSATION) == "One\nTwo\nThree"
    assert of_messages(CONVERSATION[:1], QueryScope.LAST_TURN) == ""
