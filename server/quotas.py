"""What a tenant may use: requests a second, sequences at once, tokens a minute."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from adapters_store.registry import Quotas
from server.errors import TooManyRequests
from server.tenants import Tenants
from server.token_bucket import TokenBucket

MINUTE = 60.0
LONGEST_WAIT = 86_400.0
"""Seconds; what `Retry-After` says at most."""
BUSY_SECONDS = 1.0
"""What it says to those who have too many requests at once: nobody knows when one of them ends."""
NEVER = {"x-should-retry": "false"}
"""What will never be possible: tells clients that try again by themselves not to, as they understand it."""

OnRejection = Callable[[str, str], None]


class QuotaGate:
    """Counts what each tenant uses against its quotas as `tenants` knows them now.

    `clock` counts seconds and never goes back. `on_rejection` hears of each refusal: the tenant's id and `requests`,
    `concurrency` or `tokens`.
    """

    def __init__(self, tenants: Tenants, clock: Callable[[], float], on_rejection: OnRejection) -> None:
        self.clock = clock
        self._tenants = tenants
        self._on_rejection = on_rejection
        self._meters: dict[str, Meter] = {}

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
            meter = self._meters[tenant] = Meter(tenant, lambda: self.clock(), self._on_rejection)
        known = self._tenants.get(tenant)
        if known is not None and known.quotas != meter.quotas:
            meter.change(known.quotas)
        return meter


class Meter:
    """What one tenant uses. `running` is counted without a quota too: one may be given while requests run."""

    def __init__(self, tenant: str, clock: Callable[[], float], on_rejection: OnRejection) -> None:
        self.quotas = Quotas()
        self.running = 0
        self._tenant = tenant
        self._clock = clock
        self._on_rejection = on_rejection
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None

    def change(self, quotas: Quotas) -> None:
        """Other quotas from now on; what has been used stays used."""
        self.quotas = quotas
        rate, tokens = quotas.requests_per_second, quotas.tokens_per_minute
        self._requests = self._changed(self._requests, rate, max(1.0, rate or 0.0))
        self._tokens = self._changed(self._tokens, None if tokens is None else tokens / MINUTE, float(tokens or 0))

    def check_concurrency(self, sequences: int = 1) -> None:
        """Raises TooManyRequests unless so many more sequences may run."""
        most = self.quotas.concurrency
        if most is None or self.running + sequences <= most:
            return
        if sequences > most:
            what = f"may have {most} sequences at once, which is less than the {sequences} of this request"
            raise self._refusal("concurrency", what, BUSY_SECONDS, NEVER)
        what = f"has {self.running} of its {most} sequences at once, and needs {sequences}"
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

    def _changed(self, bucket: TokenBucket | None, rate: float | None, capacity: float) -> TokenBucket | None:
        if rate is None:
            return None
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
