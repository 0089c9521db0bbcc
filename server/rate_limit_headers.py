"""Every answer to a tenant with quotas has headers `x-ratelimit-...`, errors and streams too."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)


class RateLimitHeaders:
    """ASGI middleware: adds what `rate_limits` of the request's state gives, as of the answer's beginning."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                rate_limits = scope.get("state", {}).get("rate_limits")
                if rate_limits is not None:
                    MutableHeaders(scope=message).update(rate_limits())
            await send(message)

        await self._app(scope, receive, send_with_limits)
