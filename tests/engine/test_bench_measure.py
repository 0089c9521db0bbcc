"""What the engine's benchmark measures, on an engine whose every step is known."""

import pytest
import torch

from server.engine.bench_measure import BenchError, DeviceWaits, covered, decode, serve
from server.engine.bench_session import Session, Setup
from server.engine.config import EngineStats
from server.engine.sequence import FinishReason, Output, Request
from server.engine.workload import Lengths, Traffic
from tests.engine.tiny_bench import session

__all__ = ["session"]


class FakeEngine:
    """Gives every request a token a step, one step late; a step takes a second of `now`."""

    def __init__(self, broken: str = "") -> None:
        self.now = 0.0
        self.broken = broken
        self.running: dict[str, int] = {}
        self.late: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.late)

    def add_request(self, request: Request) -> None:
        self.running[request.id] = request.params.max_tokens

    def abort(self, request_id: str) -> None:
        self.running.pop(request_id, None)

    def step(self) -> list[Output]:
        self.now += 1.0
        done, self.late = self.late, list(self.running)
        for name in self.late:
            self.running[name] -= 1
            if not self.running[name]:
                del self.running[name]
        if self.broken == "lost":
            return [Output(name, (1,)) for name in done[1:]]
        reason = FinishReason.ERROR if self.broken == "error" else None
        return [Output(name, (1,), finish_reason=reason, error="overflow" if reason else None) for name in done]

    def stats(self) -> EngineStats:
        return EngineStats()


def test_serve_measures_from_when_a_request_was_due(session: Session) -> None:
    engine = FakeEngine()
    session.engine(Setup(3, 0))
    work = session.workload("w", Traffic.parse("0"), Lengths.constant(2, 3, 4), [0.0, 2.5])

    def sleep(seconds: float) -> None:
        engine.now += seconds

    second = work.requests[1].id
    served = serve(engine, work, lambda: engine.now, sleep, is_warm=lambda request: request.id == second)
    assert served.output_tokens == 8
    # the first is there after two steps; the second was due within the third and got in with the fourth
    assert served.ttft == [2.0, 2.5]
    assert served.warm == [2.5]
    assert served.gaps == [1.0] * 6
    assert served.elapsed == 8.0


@pytest.mark.parametrize(("broken", "message"), [("lost", "gave 0 tokens, expected 40"), ("error", "overflow")])
def test_lost_tokens_and_errors_end_a_measurement(session: Session, broken: str, message: str) -> None:
    session.engine(Setup(3, 0))
    work = session.workload("w", Traffic.parse("0"), Lengths.constant(3, 3, 40))
    engine = FakeEngine(broken)
    with pytest.raises(BenchError, match=message):
        serve(engine, work, lambda: engine.now, lambda _: None)


def test_errors_end_decoding(session: Session) -> None:
    session.engine(Setup(3, 0))
    work = session.workload("w", Traffic.parse("0"), Lengths.constant(1, 3, 40))
    with pytest.raises(BenchError, match="overflow"):
        decode(FakeEngine("error"), work, warm=1, steps=4, profiled=0, cuda=False)


def test_decode_counts_tokens_of_late_steps(session: Session) -> None:
    session.engine(Setup(3, 0))
    work = session.workload("w", Traffic.parse("0"), Lengths.constant(3, 5, 40))
    engine = FakeEngine()
    done = decode(engine, work, warm=2, steps=4, profiled=0, cuda=False)
    assert len(done.seconds) == 4
    assert done.context == 5 + 1 + 2 + 2
    assert not engine.has_work
    short = session.workload("w", Traffic.parse("0"), Lengths.constant(3, 5, 4))
    with pytest.raises(BenchError, match="expected a token"):
        decode(FakeEngine(), short, warm=2, steps=4, profiled=0, cuda=False)


def test_waits_are_counted_once_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def synchronize() -> None:
        calls.append("device")
        torch.cuda.Event.synchronize(None)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda _: calls.append("event"))
    before = torch.cuda.Event.synchronize
    with DeviceWaits() as waits:
        torch.cuda.synchronize()
    assert calls == ["device", "event"]
    assert waits.seconds > 0
    assert torch.cuda.synchronize is synchronize
    assert torch.cuda.Event.synchronize is before


def test_share_covered_by_overlapping_spans() -> None:
    spans = [(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75)]
    assert covered(spans, 0.0, 8.0) == 4 / 8
    assert covered(spans, 1.0, 5.5) == 2.5 / 4.5
    assert covered(spans, 3.0, 5.0) == 0.0
    assert covered([(0.0, 10.0)], 2.0, 4.0) == 1.0
