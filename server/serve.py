"""A running server: binds its address, opens the services, serves, and ends without cutting streams off."""

import asyncio
import errno
import gc
import socket
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from types import FrameType
from typing import Any, cast

import uvicorn
import uvloop
from starlette.types import ASGIApp

from adapters_store.blobs import BlobError
from adapters_store.registry import RegistryError
from adapters_store.store import StoreOpenError
from adapters_store.types import AdapterError
from server.app import create_app
from server.chat import TokenizerError
from server.checkpoint import CheckpointError
from server.config import HttpSettings, ServeSettings, Settings
from server.connections import protocol
from server.deps import Services
from server.engine.engine_process import EngineStartError
from server.in_flight import InFlight
from server.model.config import ModelError
from server.opening import open_services
from server.tracing import TracingError

START_ERRORS = (
    AdapterError,
    BlobError,
    CheckpointError,
    EngineStartError,
    ModelError,
    RegistryError,
    StoreOpenError,
    TokenizerError,
    TracingError,
)
"""Why a server may not come up, in one sentence each."""
LAST_WORDS_SECONDS = 2
"""How long requests have to deliver their last event or answer once they were ended."""


class BindError(RuntimeError):
    """The address cannot be listened on. The message is one sentence."""


def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. `announce` gets one line when requests can come.

    Raises BindError, and what `open_services` raises.
    """
    run(_serve(settings, announce))


def run(work: Coroutine[Any, Any, None]) -> None:
    """To its end. uvloop takes about half of the time that asyncio takes for a request (docs/results.md)."""
    uvloop.run(work)


def uvicorn_config(app: ASGIApp, http: HttpSettings) -> uvicorn.Config:
    # Many proxies keep connections for 60 seconds, and openai's client, as httpx, for 5, which is uvicorn's own time: a
    # request that comes as the server closes is lost.
    return uvicorn.Config(
        app,
        http=protocol(http),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=http.idle_timeout,
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,
    )


async def _serve(settings: Settings, announce: Callable[[str], None]) -> None:
    # The address first: a model can take a minute to load, only to find the port taken.
    with bind(settings.serve) as listener:
        async with open_services(settings) as services:
            app = create_app(settings, services)
            # What is there now stays. The collector went through all of its 300,000 objects whenever a large body made
            # many new ones: the event loop stood still for 0.2 s instead of 0.06.
            gc.collect()
            gc.freeze()
            config = uvicorn_config(app, settings.http)
            server = Server(config, services, settings.serve.shutdown_timeout, announce)
            await server.serve(sockets=[listener])


def bind(settings: ServeSettings, port: int | None = None, *, is_shared: bool = False) -> socket.socket:
    """A socket bound to the configured address, not listening yet. Raises BindError.

    `port` instead of the configured one. One that `is_shared` may be bound by others that are, and connections are
    spread over those that listen. Of one listening socket in several processes, whichever woke first took all of a
    burst: 64 of 64.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is given; with it every answer on a kept connection,
    # and small pieces of a stream, waited 43 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port = settings.port if port is None else port
    try:
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((settings.host, port))
    except OSError as error:
        listener.close()
        advice = ", give another one with --port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
        problem = f"{error.strerror or error}{advice}"
        raise BindError(f"cannot listen on {settings.host} port {port}: {problem}") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn, with an end that waits for requests.

    The first signal refuses new work with 503 and gives what runs, streams and registrations alike, `timeout` seconds;
    then streams end with an error event, and all else with 503. The second signal stops at once.
    """

    def __init__(
        self, config: uvicorn.Config, services: Services, timeout: float, announce: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._requests = config.app = InFlight(cast(ASGIApp, config.app))
        self._services = services
        self._timeout = timeout
        self._announce = announce
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._announce(_line(self._services, sockets or [], await self._services.store.names.count()))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The signal handler. That the server may be draining already is an administrator's doing, and no signal."""
        if self._loop is None or self._is_stopping:
            self.should_exit = self.force_exit = True
        else:
            self.drain()

    def drain(self) -> None:
        """Take no new requests, and end when those that run have; nothing happens the second time."""
        if self._loop is None:
            self.should_exit = True
        elif not self._is_stopping:
            self._is_stopping = self._services.generator.is_draining = True
            self._loop.call_soon_threadsafe(self._start_drain)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Before uvicorn does it, and before the services close beneath the requests that use them.
        await self._requests.cut(LAST_WORDS_SECONDS)
        await super().shutdown(sockets)

    def _start_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        if not await self._requests.idle(self._timeout):
            self._services.generator.end_all()
            await self._requests.idle(LAST_WORDS_SECONDS)
        self.should_exit = True


def _line(services: Services, sockets: list[socket.socket], adapters: int) -> str:
    host, port = sockets[0].getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    return (
        f"loramux {version('loramux')} serves {services.served_name} with {adapters} adapters"
        f" on http://{address}:{port}/v1"
    )
