"""Who watches HTTP requests from their beginning to their end: log, metrics and, if there is one, a tracer."""

import logging
from collections.abc import Callable
from typing import Protocol

from server.access_log import QUIET, log_access
from server.journal import Journal
from server.metrics import Metrics
from server.trace_context import TraceContext

logger = logging.getLogger(__name__)


class Span(Protocol):
    """A request's part of a trace, while it lasts."""

    @property
    def context(self) -> TraceContext:
        """What names it."""

    def end(self, journal: Journal, endpoint: str | None, ended: float) -> None:
        """The request has ended, at this time by its journal's clock. `endpoint` is the path with its parameters'
        names, None for what there is not."""


class Tracer(Protocol):
    """Makes spans. Nothing is to be imported for it where there is none."""

    def begin(self, journal: Journal, caller: TraceContext | None) -> Span:
        """A request has come, by a caller with a trace of its own or without one."""

    def close(self) -> None:
        """Send what is left, for some seconds at most."""


class Observer:
    """`clock` counts seconds, and is the one that those use who write into the journals."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float], tracer: Tracer | None = None) -> None:
        self.clock = clock
        self.tracer = tracer
        self._metrics = metrics

    def begin(self, journal: Journal) -> Span | None:
        """A request has come. From now on its journal is in the trace of its span, if it has one; probes have none."""
        if self.tracer is None or journal.path in QUIET:
            return None
        span = self.tracer.begin(journal, journal.trace)
        journal.trace = span.context
        return span

    def end(self, journal: Journal, span: Span | None, endpoint: str | None) -> None:
        """It has ended, whichever way."""
        ended = self.clock()
        self._metrics.answered(journal.method, endpoint, journal.status)
        log_access(journal, ended)
        if span is None:
            return
        try:
            span.end(journal, endpoint, ended)
        except Exception:  # the answer is out, and worth more than its trace
            logger.exception("a request could not be traced")
