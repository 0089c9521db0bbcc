"""What a token-level router did in an answer."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from routing.router import Route


@dataclass(frozen=True)
class RoutedToken:
    """A token by the text that it added, the row of the router's gates that led it, and that row's mean weight."""

    text: str
    row: int
    share: float


class RoutedTokens:
    """The shares of one choice: their sum, and with `keeps_tokens` who led each token."""

    def __init__(self, keeps_tokens: bool) -> None:
        self.count = 0
        self.sums: list[float] = []
        self.tokens: list[RoutedToken] = []
        self._keeps_tokens = keeps_tokens

    def add(self, text: str, shares: Sequence[float]) -> None:
        """A token with the mean weight of each row of the gates."""
        self.count += 1
        self.sums = [total + share for total, share in zip(self.sums, shares, strict=True)] if self.sums else [*shares]
        if self._keeps_tokens:
            row = max(range(len(shares)), key=shares.__getitem__)
            self.tokens.append(RoutedToken(text, row, shares[row]))


def with_shares(route: Route, choices: Sequence[RoutedTokens]) -> Route:
    """The route with the share that every adapter had in these choices; as it is if nothing was routed by token."""
    count = sum(choice.count for choice in choices)
    if route.gates is None or not count:
        return route
    sums: defaultdict[str | None, float] = defaultdict(float)
    for choice in choices:
        for digest, total in zip(route.gates.rows, choice.sums, strict=False):  # the row for no adapter has no digest
            sums[digest] += total
    return replace(route, adapters=tuple(replace(each, share=sums[each.digest] / count) for each in route.adapters))


def routed_tokens(route: Route, choices: Sequence[RoutedTokens]) -> dict[str, Any]:
    """By choice and generated token, the adapter that a token-level router gave most weight; null is the base alone."""
    if route.gates is None:
        return {}
    names = {adapter.digest: adapter.name for adapter in route.adapters}
    rows = [None if digest is None else names[digest] for digest in route.gates.rows]

    def shown(token: RoutedToken) -> dict[str, Any]:
        return {"text": token.text, "adapter": rows[token.row] if token.row < len(rows) else None, "share": token.share}

    return {"tokens": [[shown(token) for token in choice.tokens] for choice in choices]}
