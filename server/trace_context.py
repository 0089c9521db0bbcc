"""W3C's trace context (www.w3.org/TR/trace-context-2)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class TraceContext:
    """A span in a trace: 32 and 16 hex digits, and two of flags. `state` is the header `tracestate` as it came."""

    trace_id: str
    parent_id: str
    flags: str
    state: str = ""

    def response(self, span_id: str) -> str:
        """The header `traceresponse`, with 16 hex digits for what this server did."""
        return f"00-{self.trace_id}-{span_id}-{self.flags}"


def parse_traceparent(values: Sequence[bytes], states: Sequence[bytes] = ()) -> TraceContext | None:
    """The context in the headers `traceparent` and `tracestate`; None unless there is one valid header (section 3.2.2).

    A later version than 00 may have more behind the fields that 00 has.
    """
    if len(values) != 1 or (match := _TRACEPARENT.fullmatch(values[0].strip())) is None:
        return None
    version, trace, parent, flags, rest = match.groups()
    if version == b"ff" or (version == b"00" and rest is not None) or not (trace.strip(b"0") and parent.strip(b"0")):
        return None
    state = b",".join(states).decode("latin-1")
    return TraceContext(trace.decode(), parent.decode(), flags.decode(), state)
