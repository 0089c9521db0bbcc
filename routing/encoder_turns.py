"""Texts of many tenants, who take turns: one that asks for thousands delays another's by a forward pass or two."""

from collections import deque
from collections.abc import Iterator

from routing.encoder_text import Text


class Turns:
    """Texts in order of arrival, by tenant. It is the turn of the tenant that waits longest since its last."""

    def __init__(self) -> None:
        self._texts: dict[str, dict[int, Text]] = {}  # the first tenant's turn it is
        self._tenants: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._tenants)

    def __iter__(self) -> Iterator[Text]:
        """The oldest text of each tenant, the one first whose turn it is, then the second of each, and so on."""
        waiting = deque(iter(texts.values()) for texts in self._texts.values())
        while waiting:
            texts = waiting.popleft()
            if (text := next(texts, None)) is not None:
                yield text
                waiting.append(texts)

    def add(self, text: Text) -> None:
        """It waits from now on."""
        self._texts.setdefault(text.tenant, {})[text.number] = text
        self._tenants[text.number] = text.tenant

    def pop(self, number: int) -> Text | None:
        """This one waits no longer. None if it did not wait."""
        tenant = self._tenants.pop(number, None)
        if tenant is None:
            return None
        texts = self._texts[tenant]
        text = texts.pop(number)
        if not texts:
            del self._texts[tenant]
        return text

    def give_on(self) -> None:
        """The first tenant has had its turn, if it has more texts."""
        tenant = next(iter(self._texts))
        self._texts[tenant] = self._texts.pop(tenant)
