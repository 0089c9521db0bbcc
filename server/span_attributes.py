"""What spans say, as OpenTelemetry's conventions name it (opentelemetry.io/docs/specs/semconv, HTTP 1.44 and GenAI).

What has no name there begins with `loramux.`. Nothing of prompts and answers is in it.
"""

from collections.abc import Mapping, Sequence

from routing.router import Route
from server.journal import Asked, Ending, Journal

Value = str | bool | int | float | Sequence[str] | Sequence[float]
Attributes = Mapping[str, Value]

PROVIDER = "loramux"
MOST_ADAPTERS = 64
RESPONSE_ID = {"chat": "chatcmpl-", "text_completion": "cmpl-"}


def http_attributes(journal: Journal, endpoint: str | None) -> Attributes:
    """Of the span of an HTTP request."""
    return _known(
        {
            "http.request.method": journal.method,
            "http.route": endpoint,
            "http.response.status_code": journal.status or None,
            "url.path": journal.path,
            "error.type": journal.error,
            "loramux.request_id": journal.request_id,
            "loramux.tenant": journal.tenant,
        }
    )


def request_attributes(asked: Asked, route: Route | None, endings: Sequence[Ending]) -> Attributes:
    """Of the span of a request to generate, with all its choices."""
    started = [ending.first_token for ending in endings if ending.first_token is not None]
    return _known(
        {
            "gen_ai.operation.name": asked.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": asked.model,
            "gen_ai.request.choice.count": asked.choices if asked.choices > 1 else None,
            "gen_ai.request.max_tokens": asked.max_tokens,
            "gen_ai.request.temperature": asked.temperature,
            "gen_ai.request.top_p": asked.top_p,
            "gen_ai.request.top_k": asked.top_k or None,
            "gen_ai.request.seed": asked.seed,
            "gen_ai.request.frequency_penalty": asked.frequency_penalty or None,
            "gen_ai.request.presence_penalty": asked.presence_penalty or None,
            "gen_ai.response.id": f"{RESPONSE_ID.get(asked.operation, '')}{asked.id}",
            "gen_ai.response.model": None if route is None else route.label,
            "gen_ai.response.time_to_first_chunk": min(started, default=None),
            "loramux.priority": asked.priority or None,
            **(usage_attributes(endings) if endings else {}),
            **(route_attributes(route) if route is not None else {}),
        }
    )


def usage_attributes(endings: Sequence[Ending]) -> Attributes:
    """Of choices that have ended."""
    return {
        "gen_ai.response.finish_reasons": [ending.finish_reason for ending in endings],
        "gen_ai.usage.input_tokens": sum(ending.prompt_tokens for ending in endings),
        "gen_ai.usage.output_tokens": sum(ending.generation_tokens for ending in endings),
        "gen_ai.usage.cache_read.input_tokens": sum(ending.cached_tokens for ending in endings),
    }


def route_attributes(route: Route) -> Attributes:
    """Who decided for which adapters. Lists run parallel; scores and shares are there where all adapters have one."""
    shown = route.adapters[:MOST_ADAPTERS]
    scores = [adapter.score for adapter in shown if adapter.score is not None]
    shares = [adapter.share for adapter in shown if adapter.share is not None]
    return _known(
        {
            "loramux.router": route.router or "base",
            "loramux.route.outcome": route.outcome.value,
            "loramux.route.cached": route.cached,
            "loramux.composition": route.composition.value,
            "loramux.adapters.count": len(route.adapters),
            "loramux.adapters.names": [adapter.name for adapter in shown],
            "loramux.adapters.digests": [adapter.digest for adapter in shown],
            "loramux.adapters.weights": [float(adapter.weight) for adapter in shown],
            "loramux.adapters.scores": scores if len(scores) == len(shown) > 0 else None,
            "loramux.adapters.shares": shares if len(shares) == len(shown) > 0 else None,
        }
    )


def _known(values: Mapping[str, Value | None]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if value is not None}
