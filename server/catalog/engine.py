"""What the catalog needs of an engine, and what callers are told when there is none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from server.engine.adapter_calls import EngineUnavailable
from server.engine.config import EngineInfo, RequestError
from server.errors import BadRequest, Unavailable


class TieredEngine(Protocol):
    """An engine client, which repeats pins to an engine that starts again.

    Calls that are awaited raise EngineUnavailable, and RequestError for an adapter that cannot be read.
    """

    on_residency: Callable[[str, str], None] | None

    @property
    def info(self) -> EngineInfo | None:
        """None before the first engine has started."""

    async def pin(self, digest: str, path: str) -> bool:
        """Whether there is room: pins take at most half of the page pool. Pinning again gives the new path."""

    def unpin(self, digest: str) -> None: ...

    async def prefetch_now(self, digest: str, path: str) -> str:
        """Bring an adapter to the device if there is room; returns where it is then."""

    def evict(self, digest: str) -> None:
        """Free what an adapter takes, as soon as nothing uses it."""


@contextmanager
def engine_errors() -> Iterator[None]:
    """Errors of the engine become answers."""
    try:
        yield
    except EngineUnavailable as error:
        raise Unavailable("the engine is being restarted; please retry", code="engine_unavailable") from error
    except RequestError as error:
        if error.code == "adapter_unavailable":
            raise Unavailable("the adapter cannot be read at the moment", code=error.code) from error
        raise BadRequest(str(error), code=error.code) from error
