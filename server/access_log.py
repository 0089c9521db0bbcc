"""One line of the log for each HTTP request that has ended: what was asked, who decided, how long each part took."""

import logging
from collections.abc import Sequence

from server.journal import Ending, Journal
from server.logs import FIELDS

logger = logging.getLogger("server.access")

QUIET = frozenset({"/health", "/health/decode", "/ready", "/metrics"})
"""What probes ask every few seconds: of these only failures are worth a line, and none is worth a trace."""


def log_access(journal: Journal, ended: float) -> None:
    """The line of a request that ended at this time, by the clock of its journal."""
    if logger.isEnabledFor(logging.INFO) and (journal.path not in QUIET or journal.status >= 400):
        message = f"{journal.method} {journal.path} {journal.status or '-'}"
        logger.info("%s", message, extra={FIELDS: access_fields(journal, ended)})


def access_fields(journal: Journal, ended: float) -> dict[str, object]:
    """What the line says besides what every line of the request does. Durations are milliseconds."""
    fields: dict[str, object] = {
        "method": journal.method,
        "path": journal.path,
        "status": journal.status,
        "outcome": outcome(journal),
        "duration_ms": _ms(ended - journal.started),
    }
    if journal.asked is not None:
        fields |= {"model": journal.asked.model, "operation": journal.asked.operation}
    fields |= {f"{phase.name}_ms": _ms(phase.end - phase.start) for phase in journal.phases}
    if journal.endings:
        fields |= _generated(journal.endings)
    return fields


def outcome(journal: Journal) -> str:
    """The code of the error if there was one, else how the choices ended, else how the answer did."""
    if journal.error is not None:
        return journal.error
    reasons = sorted({ending.finish_reason for ending in journal.endings})
    if reasons:
        return "+".join(reasons)
    return "ok" if 0 < journal.status < 400 else "error"


def _generated(endings: Sequence[Ending]) -> dict[str, object]:
    first, started = endings[0] if len(endings) == 1 else None, [ending.first_token for ending in endings]
    fields: dict[str, object] = {
        "prompt_tokens": sum(ending.prompt_tokens for ending in endings),
        "cached_tokens": sum(ending.cached_tokens for ending in endings),
        "completion_tokens": sum(ending.generation_tokens for ending in endings),
        "choices": len(endings),
        "first_token_ms": _ms(min((each for each in started if each is not None), default=None)),
    }
    if first is not None:
        fields |= {"queue_ms": _ms(first.queue), "prefill_ms": _ms(first.prefill), "decode_ms": _ms(first.decode)}
    preempted = sum(len(ending.preempted) for ending in endings)
    return fields | ({"preemptions": preempted} if preempted else {})


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
