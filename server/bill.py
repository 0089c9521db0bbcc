"""What a request costs its tenant: tokens of prompts are reserved, those of answers charged, and all counted once."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from routing.router import Route
from server.choice import Choice, OutputNotFinite
from server.errors import BadRequest, ServerError
from server.quotas import Meter
from server.usage import UsageLedger


class Billed(Protocol):
    """The request, as it is known by now."""

    @property
    def choices(self) -> Sequence[Choice]: ...

    @property
    def known(self) -> Route | None: ...


class Bill:
    """Of one request of a tenant, whose quotas the meter knows."""

    def __init__(self, meter: Meter, ledger: UsageLedger, tenant: str) -> None:
        self._meter = meter
        self._ledger = ledger
        self._tenant = tenant
        self._charged: Counter[int] = Counter()  # tokens by choice

    def charge(self, choice: Choice) -> None:
        """The tokens that a choice has got since last time."""
        new = choice.num_tokens - self._charged[choice.index]
        if new:
            self._charged[choice.index] += new
            self._meter.charge(new)

    @contextmanager
    def open(self, request: Billed, prompt_tokens: int) -> Iterator[None]:
        """The tokens of all prompts are reserved, and what was used is counted at the end, whichever it is.

        A prompt that the engine refused, or lost before the first token of an answer, costs nothing, and neither do
        tokens that it lost before their text was out; what it refused is not a use either. Raises TooManyRequests.
        """
        has_failed = is_refused = False
        self._meter.reserve(prompt_tokens)
        try:
            yield
        except OutputNotFinite:
            raise  # it was computed
        except ServerError as error:
            has_failed, is_refused = True, isinstance(error, BadRequest)
            raise
        finally:
            choices, route = request.choices, request.known
            for choice in choices if not has_failed else ():
                self.charge(choice)
            generated = self._charged.total()
            if not choices or (has_failed and not generated):
                self._meter.give_back(prompt_tokens)
                prompt_tokens = 0
            if route is not None and choices and (generated or not is_refused):
                self._ledger.count(self._tenant, route, prompt_tokens, generated)
