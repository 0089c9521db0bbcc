"""What route handlers ask for: the services of the application, and who calls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypedDict, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from adapters_store.store import AdapterStore
from server.chat import ChatTokenizer
from server.choice import Engine
from server.config import LimitSettings
from server.errors import Unauthorized
from server.generation import Generator
from server.metrics import Metrics
from server.tenants import Caller, Keys


@dataclass(frozen=True)
class Services:
    """What lives as long as the application. `now` counts seconds since the epoch, `started` is its first reading."""

    served_name: str
    engine: Engine
    store: AdapterStore
    tokenizer: ChatTokenizer
    generator: Generator
    metrics: Metrics
    keys: Keys
    limits: LimitSettings
    metrics_public: bool
    now: Callable[[], float]
    started: float


class State(TypedDict):
    """The lifespan's state; every request sees it as `request.state`."""

    services: Services


def get_services(request: Request) -> Services:
    return cast(Services, request.state.services)


ServicesDep = Annotated[Services, Depends(get_services)]
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def get_caller(services: ServicesDep, bearer: Bearer) -> Caller:
    """Raises Unauthorized without one of the configured keys."""
    caller = services.keys.caller(bearer.credentials if bearer is not None else None)
    if caller is None:
        problem = "the key is not valid" if bearer is not None else "a key is needed"
        raise Unauthorized(f"{problem}: expected the header `Authorization: Bearer <key>`")
    return caller


CallerDep = Annotated[Caller, Depends(get_caller)]


def check_metrics_key(services: ServicesDep, bearer: Bearer) -> None:
    """Raises Unauthorized unless the caller may read the metrics."""
    key = bearer.credentials if bearer is not None else None
    if not services.metrics_public and not services.keys.may_read_metrics(key):
        raise Unauthorized("metrics need the admin key or the metrics key")
