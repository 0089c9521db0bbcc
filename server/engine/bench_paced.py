"""An engine's process without an engine, for measuring the other side: every request gets a token at a steady rate.

`python -m server.engine.bench_paced RATE TOKENS ADDRESS PARENT_PID` speaks as `loop.py` does. All requests together get
RATE tokens a second, one each in every step, and none ends before its `max_tokens`. TOKENS, ids with commas between
them, are said again and again.
"""

import os
import sys
import time
from dataclasses import dataclass

import zmq

from server.engine.config import EngineInfo, EngineStats
from server.engine.loop import IDLE_POLL_MS, send
from server.engine.messages import Abort, Ready, Shutdown, Start, Submit, Update, decode_to_engine
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

    def __init__(self, socket: "zmq.Socket[bytes]", rate: float, said: tuple[int, ...]) -> None:
        self._socket = socket
        self._rate = rate
        self._said = said
        self._running: dict[str, Running] = {}

    def run(self, parent: int) -> None:
        due = time.monotonic()
        while os.getppid() == parent:
            left = due - time.monotonic()
            if not self._receive(max(1, round(1000 * left)) if self._running else IDLE_POLL_MS):
                return
            now = time.monotonic()
            if self._running and now >= due:
                due = max(now, due) if due < now - 0.1 else due  # what it is late it makes up for, up to a tenth
                due += len(self._running) / self._rate
                self._step()

    def _step(self) -> None:
        outputs = [running.step() for running in self._running.values()]
        for output in outputs:
            if output.finish_reason is not None:
                del self._running[output.request_id]
        send(self._socket, Update(outputs, stats=EngineStats(running=len(self._running))))

    def _receive(self, timeout: int) -> bool:
        while self._socket.poll(timeout):
            timeout = 0
            message = decode_to_engine(self._socket.recv())
            if isinstance(message, Shutdown):
                return False
            if isinstance(message, Submit):
                self._running[message.request.id] = Running(message.request, self._said)
            elif isinstance(message, Abort):
                self._running.pop(message.request_id, None)
        return True


def main() -> None:
    rate, said = float(sys.argv[1]), tuple(map(int, sys.argv[2].split(",")))
    address, parent = sys.argv[3], int(sys.argv[4])
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.LINGER, 1000)
        socket.set_hwm(0)
        socket.connect(address)
        if not isinstance(decode_to_engine(socket.recv()), Start):
            raise TypeError("the first message must be Start")
        send(socket, Ready(INFO))
        PacedEngine(socket, rate, said).run(parent)


if __name__ == "__main__":
    main()
