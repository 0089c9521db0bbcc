"""What happens to one HTTP request, as those write it down who work on it. Its lines of the log and its trace are made
of this.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from routing.router import Route
from server.logs import CURRENT
from server.trace_context import TraceContext

MAX_SHOWN_ADAPTERS = 16
CLIENT_GONE = "client_gone"
"""The client closed its connection before the answer was complete."""
READER_STALLED = "reader_stalled"
"""It did not read what was sent for so long that its stream was ended."""
Operation = Literal["chat", "text_completion", "embeddings"]


@dataclass(frozen=True)
class Phase:
    """A part of a request's way. Times are seconds by the clock of the journal; `error` is what it ended with."""

    name: str
    start: float
    end: float
    error: str | None = None


@dataclass(frozen=True)
class Ending:
    """The account of one choice, given once, when it has ended. Times are seconds; None did not happen.

    `e2e`, `first_token`, `submitted` and `preempted` (when the choice lost its place) count from the arrival of the
    request. `prompt_tokens` and `cached_tokens` are 0 for all but the first choice of a prompt. `loading` is the part
    of `queue` in which adapters, routers or a grammar were not there yet. `error` is the code of what ended it.
    """

    tenant: str
    route: Route
    finish_reason: str
    prompt_tokens: int
    generation_tokens: int
    e2e: float
    first_token: float | None = None
    queue: float | None = None
    prefill: float | None = None
    decode: float | None = None
    submitted: float | None = None
    loading: float | None = None
    preempted: tuple[float, ...] = ()
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Asked:
    """A request to generate, as far as it may be shown to operators: nothing of its words.

    `arrival` is by the clock of the journal.
    """

    id: str
    arrival: float
    operation: Operation
    model: str
    choices: int
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    frequency_penalty: float
    presence_penalty: float
    priority: int


@dataclass
class Journal:
    """One HTTP request. `started` is by the clock of whoever opened it, `trace` the caller's or, where spans are made,
    that of this server's own span. `status` is 0 until an answer has begun; `error` the code of the answer, or of the
    last event of a stream.
    """

    request_id: str
    method: str = ""
    path: str = ""
    started: float = 0.0
    trace: TraceContext | None = None
    tenant: str | None = None
    status: int = 0
    error: str | None = None
    asked: Asked | None = None
    route: Route | None = None
    phases: list[Phase] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)

    def fields(self) -> Mapping[str, object]:
        """What every line of the request says."""
        return {
            "request_id": self.request_id,
            "trace_id": None if self.trace is None else self.trace.trace_id,
            "tenant": self.tenant,
            "generation": None if self.asked is None else self.asked.id,
            **(route_fields(self.route) if self.route is not None else {}),
        }


def route_fields(route: Route) -> Mapping[str, object]:
    """The decision in short: who decided, and the adapters by weight."""
    shown = [f"{adapter.name}:{adapter.weight:g}" for adapter in route.adapters[:MAX_SHOWN_ADAPTERS]]
    if len(route.adapters) > MAX_SHOWN_ADAPTERS:
        shown.append(f"{len(route.adapters) - MAX_SHOWN_ADAPTERS} more")
    return {"router": route.router, "adapters": shown}


def current() -> Journal | None:
    """The journal of the request of the running task, if it belongs to one."""
    journal = CURRENT.get()
    return journal if isinstance(journal, Journal) else None


@contextmanager
def opened(journal: Journal) -> Iterator[Journal]:
    """Within the block it is the current one."""
    token = CURRENT.set(journal)
    try:
        yield journal
    finally:
        CURRENT.reset(token)


def log_names(journal: Journal | None) -> Mapping[str, str]:
    """Under which names the log knows the request, for lines that another process writes."""
    if journal is None:
        return {}
    names = {"request_id": journal.request_id}
    return names if journal.trace is None else names | {"trace_id": journal.trace.trace_id}


def failed(code: str | None) -> None:
    """The answer to the current request is an error."""
    journal = current()
    if journal is not None:
        journal.error = code
