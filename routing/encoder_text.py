"""A text that is to be embedded."""

from dataclasses import dataclass

BYTES_PER_TOKEN = 4
SPECIAL_TOKENS = 12
"""The instruction before each text, and the marks around it."""


@dataclass(frozen=True, slots=True)
class Text:
    """What a `tenant` asks of the encoder `encoder`: the base plus the trained router in the folder `change`, or
    `plain`.
    """

    number: int
    encoder: str
    change: str | None
    text: str
    tokens: int
    plain: bool = False
    tenant: str = ""

    @classmethod
    def of(
        cls,
        number: int,
        encoder: str,
        change: str | None,
        text: str,
        max_tokens: int,
        plain: bool = False,
        tenant: str = "",
    ) -> "Text":
        """With its length estimated from its bytes: rough, but it only decides who shares a pass."""
        longest = max_tokens * BYTES_PER_TOKEN
        size = len(text[:longest].encode("utf-8", "replace")) // BYTES_PER_TOKEN
        return cls(number, encoder, change, text, min(SPECIAL_TOKENS + size, max_tokens), plain, tenant)
