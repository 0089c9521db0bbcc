"""An engine's process without an engine, for measuring the other side: every request gets a token at a steady rate.

`python -m server.engine.bench_paced RATE TOKENS ADDRESS PARENT_PID` speaks as `loop.py` does. All requests together get
RATE tokens a second, one each in every step, the first one at once, and none ends before its `max_tokens`. TOKENS, ids
with commas between them, are said again and again.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import zmq

from server.engine.config import EngineInfo, EngineStats
from server.engine.fronts import Front, Fronts
from server.engine.loop import IDLE_POLL_MS, Inbox, send, take_orders
from server.engine.messages import Abort, Left, Ready, Shutdown, Start, Submit, ToEngine
from server.engine.sequence import FinishReason, Output, Request, Timings

INFO = EngineInfo(
    model_fingerprint="0" * 64,
    max_model_len=8192,
    num_kv_blocks=1024,
    block_size=16,
    num_pages={},
    vocab_size=1 << 20,
    eos_token_ids=(2,),
    device="none",
    dtype="none",
    memory={},
)


@dataclass
class Running:
    request: Request
    said: tuple[int, ...]
    num_tokens: int = 0

    def step(self) -> Output:
        first, self.num_tokens = not self.num_tokens, self.num_tokens + 1
        is_last = self.num_tokens >= self.request.params.max_tokens
        return Output(
            self.request.id,
            tokens=(self.said[self.num_tokens % len(self.said)],),
            finish_reason=FinishReason.LENGTH if is_last else None,
            timings=Timings(0.0, 0.0) if first else None,
        )


class PacedEngine:
    """Ends when it is told to, or when the process that started it is gone."""

    def __init__(self, inbox: Inbox, rate: float, said: tuple[int, ...]) -> None:
        self._inbox = inbox
        self._rate = rate
        self._said = said
        self._running: dict[str, Running] = {}

    def run(self) -> None:
        due = time.monotonic()
        while self._inbox.is_needed:
            left = due - time.monotonic()
            if not self._receive(max(1, round(1000 * left)) if self._running else IDLE_POLL_MS):
                return
            now = time.monotonic()
            if self._running and now >= due:
                due = max(now, due) if due < now - 0.1 else due  # what it is late it makes up for, up to a tenth
                due += len(self._running) / self._rate
                self._step(list(self._running))

    def _step(self, request_ids: Sequence[str]) -> None:
        outputs = [self._running[request_id].step() for request_id in request_ids]
        for output in outputs:
            if output.finish_reason is not None:
                del self._running[output.request_id]
        self._inbox.fronts.report(outputs, {}, EngineStats(running=len(self._running)))

    def _receive(self, timeout: int) -> bool:
        self._inbox.wait(timeout)
        for order in self._inbox.orders():
            if isinstance(order, Shutdown):
                return False
            if isinstance(order, Left) and (front := self._inbox.fronts.leave(order.front.encode())) is not None:
                for request_id in front.requests:
                    self._running.pop(request_id, None)
        while (received := self._inbox.fronts.receive()) is not None:
            self._take(*received)
        return True

    def _take(self, front: Front, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self._inbox.fronts.begin(front, message.request.id)
            self._running[message.request.id] = Running(message.request, self._said)
            self._step([message.request.id])
        elif isinstance(message, Abort):
            self._inbox.fronts.end(message.request_id)
            self._running.pop(message.request_id, None)


def main() -> int:
    rate, said = float(sys.argv[1]), tuple(map(int, sys.argv[2].split(",")))
    parent = int(sys.argv[4])
    return take_orders(sys.argv[3], parent, partial(_serve, parent, rate, said))


def _serve(
    parent: int,
    rate: float,
    said: tuple[int, ...],
    _: Start,
    orders: "zmq.Socket[bytes]",
    fronts: "zmq.Socket[bytes]",
) -> int:
    send(orders, Ready(INFO))
    PacedEngine(Inbox(orders, Fronts(fronts), parent), rate, said).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
