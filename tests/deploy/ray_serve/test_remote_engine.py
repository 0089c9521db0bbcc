"""One front end's engine client over Ray, with replicas that answer by script."""

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import RequestCancelledError

from adapters_store.types import TARGETS, LinearShape, Mix
from deploy.ray_serve.fleet import Fleet
from deploy.ray_serve.pinned import PinBudget
from deploy.ray_serve.remote_engine import RemoteEngine
from deploy.ray_serve.watch import Watch
from deploy.ray_serve.wire import Hint, Part, Report, decode_request, encode
from server.engine.adapter_calls import EngineUnavailable
from server.engine.config import EngineInfo, EngineStats, RequestError
from server.engine.messages import Refusal
from server.engine.sequence import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from server.engine.suspects import Quarantined

SHAPE = LinearShape(1, dict.fromkeys(TARGETS, 8), dict.fromkeys(TARGETS, 8))
Step = Part | BaseException | None
"""A part of the answer, an error of the call, or silence."""


class Answer:
    """A streaming answer of Serve."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.cancelled = asyncio.Event()
        self._steps = iter(steps)

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> bytes:
        step = next(self._steps, StopAsyncIteration())
        if step is None:
            await self.cancelled.wait()
            raise RequestCancelledError
        if isinstance(step, BaseException):
            raise step
        return encode(step)

    def cancel(self) -> None:
        self.cancelled.set()


class Calls:
    """A handle whose calls of `generate` are answered in turn."""

    def __init__(self, *answers: Sequence[Step]) -> None:
        self.generate = self
        self.name = self.report = self.info = self.prefetch = self
        self.sent: list[tuple[Hint, Request]] = []
        self.given: list[Answer] = []
        self._answers = iter(answers)

    def options(self, stream: bool) -> "Calls":
        assert stream
        return self

    def remote(self, hint: Hint, payload: bytes) -> Answer:
        self.sent.append((hint, decode_request(payload)))
        answer = Answer(next(self._answers))
        self.given.append(answer)
        return answer


def request(**fields: Any) -> Request:
    return Request("r", (1, 2, 3), SamplingParams(max_tokens=2), **fields)


def part(*tokens: int, reason: FinishReason | None = None, replica: str = "a") -> Part:
    return Part(replica, [Output("r", tokens=tokens, finish_reason=reason)])


def engine_over(calls: Calls, clock: Callable[[], float] = lambda: 0.0) -> RemoteEngine:
    return RemoteEngine(calls, "front", SHAPE, clock)


async def outputs(engine: RemoteEngine, asked: Request) -> list[tuple[tuple[int, ...], FinishReason | None]]:
    return [(output.tokens, output.finish_reason) async for output in engine.submit(asked)]


DIED = ActorDiedError()
END = [part(7), part(8, reason=FinishReason.LENGTH)]
WHOLE = [((7,), None), ((8,), FinishReason.LENGTH)]


@pytest.mark.parametrize(
    "lost",
    [[DIED], [Part("a", lost="no engine")], [Part("a", lost="it died", crashed=True)], []],
    ids=["actor died", "no engine", "engine died", "ended early"],
)
async def test_what_is_lost_before_its_first_token_goes_to_another(lost: Sequence[Step]) -> None:
    calls = Calls(lost, END)
    assert await outputs(engine_over(calls), request()) == WHOLE
    expected = ("a",) if lost and isinstance(lost[0], Part) else ()
    assert [hint.avoid for hint, _ in calls.sent] == [(), expected]


@pytest.mark.parametrize("lost", [DIED, Part("a", lost="it died", crashed=True), StopAsyncIteration()])
async def test_what_has_begun_ends_with_an_error(lost: Step) -> None:
    calls = Calls([part(7), lost])
    got = [output async for output in engine_over(calls).submit(request())]
    assert [output.finish_reason for output in got] == [None, FinishReason.ERROR]
    assert "please retry" in str(got[1].error)
    assert len(calls.sent) == 1


async def test_a_request_is_given_up_after_three_engines() -> None:
    calls = Calls(*[[DIED]] * 3)
    with pytest.raises(EngineUnavailable, match="please retry"):
        await outputs(engine_over(calls), request())
    assert len(calls.sent) == 3


async def test_a_request_that_kills_engines_kills_two() -> None:
    crash = Part("a", lost="it died", crashed=True)
    calls = Calls([crash], [crash])
    engine = engine_over(calls)
    for _ in range(2):  # also when it comes again
        with pytest.raises(Quarantined):
            await outputs(engine, request())
    assert len(calls.sent) == 2


async def test_one_that_was_there_by_chance_is_cleared_by_its_answer() -> None:
    crash = Part("a", lost="it died", crashed=True)
    calls = Calls([crash], END, [crash], END)
    engine = engine_over(calls)
    for _ in range(2):
        assert await outputs(engine, request()) == WHOLE


async def test_a_refusal_is_the_engine_clients() -> None:
    calls = Calls([Part("a", refusal=Refusal("r", "too long", "prompt", "context_length_exceeded"))])
    with pytest.raises(RequestError, match="too long") as refused:
        await outputs(engine_over(calls), request())
    assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")


async def test_leaving_early_cancels_the_call_and_an_end_does_not() -> None:
    calls = Calls([part(7), None], END)
    engine = engine_over(calls)
    stream = engine.submit(request())
    assert (await anext(stream)).tokens == (7,)
    await stream.aclose()
    await outputs(engine, request())
    assert [answer.cancelled.is_set() for answer in calls.given] == [True, False]


async def test_an_abort_ends_the_stream() -> None:
    calls = Calls([part(7), None])
    engine = engine_over(calls)
    stream = engine.submit(request())
    await anext(stream)
    engine.abort("r")
    engine.abort("another")
    assert [output.finish_reason async for output in stream] == [FinishReason.ABORT]


async def test_time_that_was_lost_with_an_engine_is_not_given_again() -> None:
    times = itertools.chain([100.0], itertools.repeat(104.0))
    calls = Calls([DIED], END)
    assert await outputs(engine_over(calls, lambda: next(times)), request(timeout=10.0)) == WHOLE
    assert [sent.timeout for _, sent in calls.sent] == [10.0, 6.0]


async def test_what_came_before_the_first_token_comes_once() -> None:
    scored = Part("a", [Output("r", prompt_logprobs=(TokenLogprobs(-1.0),))])
    calls, moves = Calls([scored, DIED], [scored, *END]), []
    engine = engine_over(calls)
    engine.on_move = lambda: moves.append(1)
    got = [output async for output in engine.submit(request())]
    assert [len(output.prompt_logprobs) for output in got] == [1, 0, 0]
    assert len(moves) == 1


async def test_calls_tell_the_router_what_they_want_and_who_they_are() -> None:
    calls = Calls([DIED], END)
    mix = Mix((("d" * 64, 1.0),))
    await outputs(engine_over(calls), request(mix=mix, paths={"d" * 64: "/somewhere"}))
    assert [hint.wanted.digests for hint, _ in calls.sent if hint.wanted is not None] == [("d" * 16,)] * 2
    assert len({hint.key for hint, _ in calls.sent}) == 2
    assert {hint.front for hint, _ in calls.sent} == {"front"}


async def test_without_an_engine_a_request_waits_for_its_time_only() -> None:
    calls = Calls([None])
    got = await outputs(engine_over(calls), request(timeout=0.01))
    assert got == [((), FinishReason.TIMEOUT)]
    assert calls.given[0].cancelled.is_set()
    assert math.isclose(calls.sent[0][1].timeout or 0, 0.01)


class Replicas:
    """A handle of replicas that report, of which Serve's router takes the target, or one that need not be avoided."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.silent: set[str] = set()
        self.name = Method(lambda hint: self._take(hint))
        self.report = Method(lambda hint, version: self._report(hint, version))

    def _take(self, hint: Hint) -> str:
        wanted = [hint.target] if hint.target in self.names else [n for n in self.names if n not in hint.avoid]
        (name, *_) = wanted or self.names
        if name in self.silent:
            raise DIED
        return str(name)

    def _report(self, hint: Hint, version: int) -> bytes:
        return encode(Report(self._take(hint), True, False, EngineStats(), version + 1, {}))


class Method:
    """One method of a handle."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    async def remote(self, *args: Any) -> Any:
        return self._call(*args)


async def test_engines_that_come_and_go_are_seen_one_look_later() -> None:
    replicas, fleet, looks = Replicas("a", "b"), Fleet(), []
    watch = Watch(replicas, "front", fleet)
    for _ in range(3):
        await watch.look()
        looks.append(fleet.replicas)
    assert looks == [("a",), ("a", "b"), ("a", "b")]
    assert (fleet.version("a"), fleet.version("b")) == (3, 2)
    replicas.names = ["b", "c"]
    replicas.silent = {"b"}
    await watch.look()
    await watch.look()
    assert set(fleet.replicas) == {"c"}
    replicas.silent = set()
    await watch.look()
    assert set(fleet.replicas) == {"b", "c"}


async def test_pins_take_half_of_the_pages_at_most(make_adapter: Callable[..., Path], tiny_model: Path) -> None:
    from server.model.config import ModelConfig

    info = EngineInfo("", 512, 8, 16, {"qkv": 6, "o": 6, "gate_up": 6, "down": 6}, 512, (1,), "cpu", "float32", {})
    budget = PinBudget(ModelConfig.from_folder(tiny_model).linear_shape)
    small, large = make_adapter("pin-small", seed=3), make_adapter("pin-large", seed=4, r=24)
    assert await budget.pin("small", str(small), info)
    assert await budget.pin("large", str(large), info)  # one page and two of each group
    assert not await budget.pin("more", str(small), info)
    assert await budget.pin("large", str(large), info)
    budget.unpin("large")
    budget.unpin("unknown")
    assert await budget.pin("more", str(small), info)
