"""The HTTP application in a replica of a Serve deployment."""

from collections.abc import Callable
from time import perf_counter

from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray_serve.remote_engine import RemoteEngine
from server.app import create_app
from server.config import Settings
from server.log_setup import set_up_log
from server.part import Part
from server.request_id import HEADER
from server.served_model import ServedModel


class WithState:
    """ASGI middleware: gives every request what the lifespan has made, as uvicorn does and Serve does not.

    Serve's proxy makes a request's id if it has none, and puts it into the answer itself: ours would be the second one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._state: dict[str, object] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._state = scope.setdefault("state", {})
            await self._app(scope, receive, send)
            return

        async def without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[HEADER]
            await send(message)

        await self._app({**scope, "state": self._state.copy()}, receive, without_id)


def front_end(settings: Settings, engines: str) -> Callable[[], ASGIApp]:
    """What makes the application, in a replica. `engines` is the name of the engines' deployment."""

    def make() -> ASGIApp:
        set_up_log(settings, "front")
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(engines, context.app_name)
        shape = ServedModel.of(settings).base.linear_shape
        engine = RemoteEngine(handle, context.replica_id.unique_id, shape, perf_counter)
        app = create_app(settings, engines=engine, part=Part(fetches=False))
        app.add_middleware(WithState)
        return app

    return make
