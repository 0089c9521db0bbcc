"""Which request a line of the log belongs to, and W3C's trace context (www.w3.org/TR/trace-context-2)."""

import logging
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s"


@dataclass(frozen=True)
class TraceContext:
    """The caller's trace: 32 and 16 hex digits, and two of flags."""

    trace_id: str
    parent_id: str
    flags: str

    def response(self, span_id: str) -> str:
        """The header `traceresponse`, with 16 hex digits for what this server did."""
        return f"00-{self.trace_id}-{span_id}-{self.flags}"


@dataclass(frozen=True)
class RequestContext:
    """What is said of a request in the log."""

    request_id: str
    trace: TraceContext | None = None

    def __str__(self) -> str:
        return f"[{self.request_id}]" if self.trace is None else f"[{self.request_id} trace {self.trace.trace_id}]"


CURRENT: ContextVar[RequestContext | None] = ContextVar("loramux_request", default=None)
"""Of the task that runs, and of all tasks and threads that it starts."""


class RequestFilter(logging.Filter):
    """Gives records the field `request` of `LOG_FORMAT`: `[<request id>] `, empty outside of requests."""

    def filter(self, record: logging.LogRecord) -> bool:
        current = CURRENT.get()
        record.request = "" if current is None else f"{current} "
        return True


def parse_traceparent(values: Sequence[bytes]) -> TraceContext | None:
    """The context in the headers `traceparent`; None unless there is one valid header (section 3.2.2).

    A later version than 00 may have more behind the fields that 00 has.
    """
    if len(values) != 1 or (match := _TRACEPARENT.fullmatch(values[0].strip())) is None:
        return None
    version, trace, parent, flags, rest = match.groups()
    if version == b"ff" or (version == b"00" and rest is not None) or not (trace.strip(b"0") and parent.strip(b"0")):
        return None
    return TraceContext(trace.decode(), parent.decode(), flags.decode())
