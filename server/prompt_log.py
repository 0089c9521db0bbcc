"""What clients ask, in the log: only where the operator has asked for it (`--log-prompts`)."""

import json
import logging

from server.ask import Ask
from server.logs import FIELDS

logger = logging.getLogger("server.prompts")

MOST_CHARACTERS = 20_000
"""Of one prompt; what is beyond is left out, and said to be."""


def log_prompt(ask: Ask) -> None:
    """A line with the messages, or with the prompts as text or token ids."""
    asked = ask.prompts if ask.messages is None else ask.messages
    text = json.dumps(asked, ensure_ascii=False, default=str)
    left_out = len(text) - MOST_CHARACTERS
    fields: dict[str, object] = {"prompt": text[:MOST_CHARACTERS]}
    logger.info("prompt", extra={FIELDS: fields | ({"characters_left_out": left_out} if left_out > 0 else {})})
