"""What a tenant may use: requests a second, sequences at once, tokens a minute."""

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from adapters_store.registry import BudgetWish, PlaceWish, Quotas
from server.borrowed_bucket import RETRY_SECONDS, BorrowedBucket
from server.errors import TooManyRequests
from server.lender import Lender
from server.tenants import Tenants
from server.token_bucket import TokenBucket

MINUTE = 60.0
LONGEST_WAIT = 86_400.0
"""Seconds; what `Retry-After` says at most."""
SETTLE_SECONDS = 0.5
BUSY_SECONDS = 1.0
"""What it says to those who have too many requests at once: nobody knows when one of them ends."""
NEVER = {"x-should-retry": "false"}
"""What will never be possible: tells clients that try again by themselves not to, as they understand it."""

Bucket = TokenBucket | BorrowedBucket
OnRejection = Callable[[str, str], None]


class QuotaGate:
    """Counts what each tenant uses against its quotas as `tenants` knows them now.

    `clock` counts seconds and never goes back. `on_rejection` hears of each refusal: the tenant's id and `requests`,
    `concurrency` or `tokens`.
    """

    def __init__(
        self, tenants: Tenants, clock: Callable[[], float], on_rejection: OnRejection, lender: Lender | None = None
    ) -> None:
        """With a `lender` the quotas are shared with other processes, and `fund` comes before everything else."""
        self.clock = clock
        self._lender = lender
        self._tenants = tenants
        self._on_rejection = on_rejection
        self._meters: dict[str, Meter] = {}

    async def fund(self, tenant: str, *, requests: int = 0, tokens: int = 0, sequences: int = 0) -> None:
        """Borrow what is needed for so much, if it is not at hand and can be had."""
        if self._lender is not None:
            await self._meter(tenant).fund(self._lender, requests, tokens, sequences)

    async def settle(self) -> None:
        """Give back what was borrowed and not used, and renew what is. To be called twice a second."""
        if self._lender is not None:
            lender = self._lender
            await asyncio.gather(*(meter.settle(lender) for meter in self._meters.values() if meter.is_overdue))

    async def close(self) -> None:
        """Give all back that can be."""
        if self._lender is not None:
            await self.settle()
            await self._lender.close()

    def knock(self, tenant: str) -> None:
        """Count a request for answers, before any work on it. Raises TooManyRequests; who is refused uses nothing up.

        `admit` has to follow, unless the request is refused for what it says.
        """
        meter = self._meter(tenant)
        meter.check_concurrency()
        # Whoever is in debt for earlier answers hears so before its prompt is tokenised.
        meter.check_tokens(1)
        meter.count_request()

    @contextmanager
    def admit(self, tenant: str, sequences: int = 1) -> Iterator["Meter"]:
        """Places for the sequences of a counted request until the block ends.

        Raises TooManyRequests, and then the request uses nothing up.
        """
        meter = self._meter(tenant)
        try:
            meter.check_concurrency(sequences)
            meter.check_tokens(1)
        except TooManyRequests:
            meter.uncount_request()
            raise
        meter.running += sequences
        try:
            yield meter
        finally:
            meter.running -= sequences

    def count_request(self, tenant: str) -> None:
        """One request that is answered without the engine. Raises TooManyRequests."""
        self._meter(tenant).count_request()

    def running(self, tenant: str) -> int:
        """How many sequences a tenant has at once."""
        return self._meter(tenant).running

    def headers(self, tenant: str) -> dict[str, str]:
        """What a tenant's answers say about its quotas."""
        return self._meter(tenant).headers()

    def _meter(self, tenant: str) -> "Meter":
        meter = self._meters.get(tenant)
        if meter is None:
            budget = self._lender.budget_seconds if self._lender is not None else None
            meter = self._meters[tenant] = Meter(tenant, lambda: self.clock(), self._on_rejection, budget)
        known = self._tenants.get(tenant)
        if known is not None and known.quotas != meter.quotas:
            meter.change(known.quotas)
        return meter


class Meter:
    """What one tenant uses. `running` is counted without a quota too: one may be given while requests run."""

    def __init__(
        self, tenant: str, clock: Callable[[], float], on_rejection: OnRejection, budget: float | None = None
    ) -> None:
        """`budget`: so many seconds' worth of the quotas are borrowed at most; None: they are this process's alone."""
        self.quotas = Quotas()
        self.running = 0
        self._budget = budget
        self._places = 0
        self._ask_for_places = 0.0
        self._funding = asyncio.Lock()
        self._tenant = tenant
        self._clock = clock
        self._on_rejection = on_rejection
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None

    def change(self, quotas: Quotas) -> None:
        """Other quotas from now on; what has been used stays used."""
        self.quotas = quotas
        rate, tokens = quotas.requests_per_second, quotas.tokens_per_minute
        self._requests = self._changed(self._requests, "requests", rate, max(1.0, rate or 0.0))
        per_second = None if tokens is None else tokens / MINUTE
        self._tokens = self._changed(self._tokens, "tokens", per_second, float(tokens or 0))

    @property
    def is_overdue(self) -> bool:
        """Whether something that was borrowed is to be given back, or renewed."""
        return self._places > 0 or any(bucket.is_overdue(self._clock()) for bucket in self._borrowed())

    async def fund(self, lender: Lender, requests: int, tokens: int, sequences: int) -> None:
        """Borrow what is needed for so much, as far as it can be had.

        An exchange that has begun comes to its end, also if its request does not wait for it: what was given back with
        it must not stay here as well, or who leaves often enough could use it many times.
        """
        if self._is_short(requests, tokens, sequences):
            await asyncio.shield(self._borrow(lender, requests, tokens, sequences))

    async def _borrow(self, lender: Lender, requests: int, tokens: int, sequences: int) -> None:
        async with self._funding:
            if self._is_short(requests, tokens, sequences):  # and not because somebody else has asked meanwhile
                await self._exchange(lender, requests, tokens, sequences)

    async def settle(self, lender: Lender) -> None:
        """Give back what is not used."""
        async with self._funding:
            await self._exchange(lender, 0, 0, 0)

    def _is_short(self, requests: int, tokens: int, sequences: int) -> bool:
        now = self._clock()
        wanted = ((self._requests, requests), (self._tokens, tokens))
        return self._needs_places(sequences, now) or any(
            isinstance(bucket, BorrowedBucket) and amount and bucket.is_short(amount, now) for bucket, amount in wanted
        )

    def _needs_places(self, sequences: int, now: float) -> bool:
        if not sequences or self.quotas.concurrency is None or now < self._ask_for_places:
            return False
        return self.running + sequences > self._places

    async def _exchange(self, lender: Lender, requests: int, tokens: int, sequences: int) -> None:
        now, most = self._clock(), self.quotas.concurrency
        wanted: list[tuple[BorrowedBucket, BudgetWish]] = []
        for bucket, amount in ((self._requests, requests), (self._tokens, tokens)):
            if isinstance(bucket, BorrowedBucket):
                short = amount if amount and bucket.is_short(amount, now) else 0
                if short or bucket.is_overdue(now):
                    wanted.append((bucket, bucket.wish(short)))
        need = self.running + (sequences if self._needs_places(sequences, now) else 0)
        places = [PlaceWish(self._tenant, most, self.running, need, need + need // 4)] if most is not None else []
        if not (need or self._places):
            places = []
        if not (wanted or places):
            return
        try:
            grants, held = await lender.exchange([wish for _, wish in wanted], places)
        except BaseException:
            for bucket, wish in wanted:
                bucket.failed(wish)
            raise
        for (bucket, wish), grant in zip(wanted, grants, strict=True):
            bucket.granted(grant, wish, self._clock())
        if places:
            self._places = held[0]
            self._ask_for_places = self._clock() + (RETRY_SECONDS if held[0] < need else 0.0)

    def _borrowed(self) -> Iterator[BorrowedBucket]:
        for bucket in (self._requests, self._tokens):
            if isinstance(bucket, BorrowedBucket):
                yield bucket

    def check_concurrency(self, sequences: int = 1) -> None:
        """Raises TooManyRequests unless so many more sequences may run."""
        most = self.quotas.concurrency
        if most is None or self.running + sequences <= (min(most, self._places) if self._budget is not None else most):
            return
        if sequences > most:
            what = f"may have {most} sequences at once, which is less than the {sequences} of this request"
            raise self._refusal("concurrency", what, BUSY_SECONDS, NEVER)
        running = "all" if self._budget is not None else self.running
        what = f"has {running} of its {most} sequences at once, and needs {sequences}"
        raise self._refusal("concurrency", what, BUSY_SECONDS)

    def count_request(self) -> None:
        """Raises TooManyRequests, and counts nothing, when the next request comes too early."""
        bucket = self._requests
        if bucket is None:
            return
        wait = bucket.wait(1, self._clock())
        if wait > 0:
            what = f"has used up its {self.quotas.requests_per_second:g} requests a second"
            raise self._refusal("requests", what, wait)
        bucket.take(1, self._clock())

    def uncount_request(self) -> None:
        """Undo `count_request`."""
        if self._requests is not None:
            self._requests.give_back(1, self._clock())

    def check_tokens(self, tokens: int) -> None:
        """Raises TooManyRequests unless so many tokens are there now."""
        bucket, most = self._tokens, self.quotas.tokens_per_minute
        if bucket is None:
            return
        if tokens > bucket.capacity:
            what = f"may use {most} tokens a minute, which is less than the {tokens} of this prompt"
            raise self._refusal("tokens", what, MINUTE, NEVER)
        wait = bucket.wait(tokens, self._clock())
        if wait > 0:
            left = max(0, math.floor(bucket.level(self._clock())))
            raise self._refusal("tokens", f"has {left} left of its {most} tokens a minute, and needs {tokens}", wait)

    def reserve(self, tokens: int) -> None:
        """Take a prompt's tokens, before any work on them. Raises TooManyRequests."""
        self.check_tokens(tokens)
        self.charge(tokens)

    def give_back(self, tokens: int) -> None:
        """What was reserved for work that never began."""
        if self._tokens is not None:
            self._tokens.give_back(tokens, self._clock())

    def charge(self, tokens: int) -> None:
        """Tokens of an answer. They are made already: what they are too many, later requests wait for."""
        if self._tokens is not None:
            self._tokens.take(tokens, self._clock())

    def headers(self) -> dict[str, str]:
        """The state of those quotas that there are, as OpenAI names them: `x-ratelimit-remaining-tokens`, ..."""
        now = self._clock()
        headers: dict[str, str] = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(math.floor(bucket.capacity))
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now) + 1e-6)))
                headers[f"x-ratelimit-reset-{name}"] = duration(bucket.wait(bucket.capacity, now))
        return headers

    def _refusal(self, kind: str, what: str, wait: float, headers: Mapping[str, str] | None = None) -> TooManyRequests:
        self._on_rejection(self._tenant, kind)
        return TooManyRequests(
            f"tenant {self._tenant!r} {what}",
            code=f"quota_{kind}",
            retry_after=min(wait, LONGEST_WAIT),
            limits=self.headers() | dict(headers or {}),
        )

    def _changed(self, bucket: Bucket | None, kind: str, rate: float | None, capacity: float) -> Bucket | None:
        if rate is None:
            return None
        if bucket is None and self._budget is not None:
            return BorrowedBucket(self._tenant, kind, rate, capacity, self._clock(), self._budget)
        if bucket is None:
            return TokenBucket(rate, capacity, self._clock())
        bucket.resize(rate, capacity, self._clock())
        return bucket


def duration(seconds: float) -> str:
    """As OpenAI's headers have it: `12ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    milliseconds = math.ceil(min(seconds, LONGEST_WAIT) * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{max(0, milliseconds)}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
