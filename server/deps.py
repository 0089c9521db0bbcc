"""What route handlers ask for: the services of the application, and who calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Protocol, TypedDict, cast

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from fastapi.security.utils import get_authorization_scheme_param

from adapters_store.store import AdapterStore
from server.accounts import AccountService
from server.catalog import Catalog, TieredEngine
from server.chat import ChatTokenizer
from server.choice import Engine
from server.config import HttpSettings, LimitSettings
from server.embedder import Embedder
from server.engine.config import EngineInfo, EngineStats
from server.errors import Unauthorized, Unavailable
from server.generation import Generator
from server.journal import current
from server.metrics import Metrics
from server.observer import Observer
from server.process_state import Processes
from server.quotas import QuotaGate
from server.routers import RouterService
from server.siblings import Siblings
from server.tenants import Caller, Keys
from server.usage import UsageLedger


class ServingMember(Protocol):
    """What is shown of one engine."""

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def alive(self) -> bool: ...

    @property
    def stalled(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...


class ServingEngine(Engine, TieredEngine, Protocol):
    """All that the application needs of an engine's client, or of a pool of engines."""

    @property
    def members(self) -> Sequence[ServingMember]: ...


class EngineGroup(ServingEngine, Protocol):
    """Several engines, as a pool has them: `on_stats` is told an engine's number with its snapshot."""

    on_stats: Callable[[int, EngineStats], None] | None
    on_move: Callable[[], None] | None

    async def start(self) -> None:
        """Wait until they serve. Raises EngineStartError."""

    async def stop(self) -> None:
        """End them; requests in flight end with an error."""

    def prefetch(self, paths: Mapping[str, str]) -> None:
        """Read adapters, folder by digest, into host memory while there is nothing better to do."""


@dataclass(frozen=True)
class Services:
    """What lives as long as the application. `now` counts seconds since the epoch, `started` is its first reading."""

    served_name: str
    engine: ServingEngine
    store: AdapterStore
    catalog: Catalog
    routers: RouterService
    tokenizer: ChatTokenizer
    embedder: Embedder | None
    generator: Generator
    metrics: Metrics
    keys: Keys
    accounts: AccountService
    quotas: QuotaGate
    usage: UsageLedger
    siblings: Siblings
    processes: Processes
    limits: LimitSettings
    http: HttpSettings
    metrics_public: bool
    observer: Observer
    now: Callable[[], float]
    started: float


class State(TypedDict):
    """The lifespan's state; every request sees it as `request.state`."""

    services: Services


def services_of(request: Request) -> Services:
    """What a dependency takes itself: one that depends on this instead costs the framework 6 us more a request."""
    return cast(Services, request.state.services)


async def get_services(request: Request) -> Services:
    """A coroutine, as all dependencies are: the framework calls plain functions in a thread, for 66 us more each."""
    return services_of(request)


class BearerKey(SecurityBase):
    """The key that a request brings, None where it brings none."""

    model = HTTPBearer()
    scheme_name = "HTTPBearer"

    async def __call__(self, request: Request) -> str | None:
        return _key(request)


class CallerKey(SecurityBase):
    """Who calls, by that key. Raises Unauthorized without a valid one where one is needed.

    The answer will show the state of the caller's quotas.
    """

    model = HTTPBearer()
    scheme_name = "HTTPBearer"

    async def __call__(self, request: Request) -> Caller:
        services, key = services_of(request), _key(request)
        caller = await services.keys.caller(key)
        if caller is None:
            problem = "the key is not valid" if key is not None else "a key is needed"
            raise Unauthorized(f"{problem}: expected the header `Authorization: Bearer <key>`")
        journal = current()
        if journal is not None:
            journal.tenant = caller.tenant.id
        request.state.rate_limits = partial(services.quotas.headers, caller.tenant.id)
        return caller


def _key(request: Request) -> str | None:
    scheme, key = get_authorization_scheme_param(request.headers.get("Authorization"))
    return key if key and scheme.lower() == "bearer" else None


ServicesDep = Annotated[Services, Depends(get_services)]
get_caller = CallerKey()
CallerDep = Annotated[Caller, Depends(get_caller)]


async def count_request(request: Request, caller: CallerDep) -> None:
    """For requests that cost work of this process alone. Raises TooManyRequests."""
    services = services_of(request)
    await services.quotas.fund(caller.tenant.id, requests=1)
    services.quotas.count_request(caller.tenant.id)


async def knock(request: Request, caller: CallerDep) -> None:
    """For requests for answers, before their bodies are read: parsing is work too. Raises TooManyRequests."""
    services = services_of(request)
    await services.quotas.fund(caller.tenant.id, requests=1, tokens=1, sequences=1)
    services.quotas.knock(caller.tenant.id)


async def check_not_draining(services: ServicesDep) -> None:
    """For work that may take long. Raises Unavailable when the server is shutting down."""
    if services.generator.is_draining:
        raise Unavailable("the server is shutting down", code="draining")


async def check_metrics_key(services: ServicesDep, key: Annotated[str | None, Depends(BearerKey())]) -> None:
    """Raises Unauthorized unless the caller may read the metrics."""
    if not services.metrics_public and not services.keys.may_read_metrics(key):
        raise Unauthorized("metrics need the admin key or the metrics key")
