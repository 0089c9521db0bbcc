"""One engine and several front ends: everybody gets what is his own, and who is gone leaves nothing behind."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from adapters_store.peft_format import read_adapter
from adapters_store.types import Mix
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.fronts import Fronts
from server.engine.loop import EngineLoop, Inbox
from server.engine.messages import (
    Abort,
    FromEngine,
    Hello,
    Left,
    Pin,
    Submit,
    ToEngine,
    Unpin,
    Update,
    decode_from_engine,
    encode,
)
from server.engine.sequence import FinishReason, Output, Request, SamplingParams
from server.model.config import ModelConfig

LONG = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
SHORT = replace(LONG, max_tokens=3)


class Desk:
    """An engine's loop, taken by hand, with front ends that are sockets."""

    def __init__(self, engine: Engine, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.engine = engine
        self._context = context
        self._owner, orders, fronts = (context.socket(kind) for kind in (zmq.PAIR, zmq.PAIR, zmq.ROUTER))
        self._owner.bind("inproc://orders")
        orders.connect("inproc://orders")
        fronts.bind("inproc://fronts")
        self.loop = EngineLoop(engine, Inbox(orders, Fronts(fronts), os.getppid()))
        self._fronts: dict[str, zmq.Socket[bytes]] = {}
        self.heard: dict[str, list[Update]] = {}

    def say(self, front: str, *messages: ToEngine) -> None:
        if front not in self._fronts:
            self._fronts[front] = socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.IDENTITY, front.encode())
            socket.connect("inproc://fronts")
            self.heard[front] = []
        for message in messages:
            self._fronts[front].send(encode(message))

    def order(self, message: ToEngine) -> None:
        self._owner.send(encode(message))

    def turn(self) -> None:
        """One round of the loop: all messages, one step, all answers."""
        self.loop._receive()
        self.loop._report(self.engine.step())
        self.engine.check_integrity()
        self.hear()

    def hear(self) -> None:
        for front, socket in self._fronts.items():
            while socket.poll(0):
                message: FromEngine = decode_from_engine(socket.recv())
                assert isinstance(message, Update)
                self.heard[front].append(message)

    def outputs(self, front: str) -> list[Output]:
        return [output for update in self.heard[front] for output in update.outputs]

    def pages_used(self) -> int:
        return self.engine.stats().pages["used"]


@pytest.fixture
def desk(tiny_model: Path) -> Iterator[Desk]:
    config = EngineConfig(str(tiny_model), device="cpu", num_threads=1, kv_memory=1 << 22, page_memory=1 << 20)
    engine = Engine.from_config(config)
    with zmq.Context() as context:
        yield Desk(engine, context)
        context.destroy(linger=0)
    engine.close()


def test_answers_go_to_who_asked(desk: Desk) -> None:
    desk.say("a", Submit(Request("ra", (5, 6, 7), SHORT)))
    desk.say("b", Submit(Request("rb", (5, 6, 8), SHORT)))
    while desk.engine.has_work or not desk.heard["a"]:
        desk.turn()
    for front in ("a", "b"):
        assert {output.request_id for output in desk.outputs(front)} == {f"r{front}"}
        assert sum(len(output.tokens) for output in desk.outputs(front)) == 3
        assert desk.heard[front][-1].stats is not None


def test_who_asked_hears_that_before_the_engine_looks_at_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may die of it, and is then known to have had it."""

    def die(request: Request) -> None:
        raise SystemExit(request.id)

    monkeypatch.setattr(desk.engine, "add_request", die)
    desk.say("a", Submit(Request("ra", (5, 6, 7), SHORT)))
    with pytest.raises(SystemExit, match="ra"):
        desk.loop.run()
    desk.hear()
    assert [update.taken for update in desk.heard["a"]] == [["ra"]]


def test_nobody_ends_what_another_one_asked(desk: Desk) -> None:
    desk.say("a", Submit(Request("r", (5, 6, 7), LONG)))
    desk.turn()
    desk.say("b", Abort("r"), Submit(Request("r", (1, 2), SHORT)))
    desk.turn()
    (refusal,) = [refusal for update in desk.heard["b"] for refusal in update.refusals]
    assert refusal.request_id == "r"
    assert not any(output.finish_reason for output in desk.outputs("a"))
    desk.say("a", Abort("r"))
    desk.turn()
    assert desk.outputs("a")[-1].finish_reason is FinishReason.ABORT
    assert desk.outputs("b") == []


def test_who_is_gone_frees_everything_in_one_step(desk: Desk) -> None:
    desk.say("a", *(Submit(Request(f"a{i}", (5, 6, 7 + i), LONG)) for i in range(8)))
    desk.say("b", Submit(Request("b0", (9, 8, 7), LONG)))
    while not desk.outputs("b"):
        desk.turn()
    desk.say("a", Submit(Request("late", (3, 4), LONG)))  # under way when the front end is found dead
    desk.order(Left("a"))
    desk.turn()
    stats = desk.engine.stats()
    assert (stats.running, stats.waiting) == (1, 0)
    told = len(desk.outputs("a"))
    desk.say("a", Submit(Request("later", (3, 4), LONG)))
    desk.say("b", Abort("b0"))
    desk.turn()
    stats = desk.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_used_blocks) == (0, 0, 0)
    assert len(desk.outputs("a")) == told
    assert desk.outputs("b")[-1].finish_reason is FinishReason.ABORT


def test_a_pin_holds_while_one_front_end_wants_it(desk: Desk, tiny_model: Path, adapters: dict[str, Path]) -> None:
    path = adapters["wide24"]
    digest = read_adapter(path, ModelConfig.from_folder(tiny_model).linear_shape).digest
    for number, front in enumerate("abc"):
        desk.say(front, Pin(number, digest, str(path)))
    while not all(any(update.replies for update in desk.heard[front]) for front in "abc"):
        desk.turn()
    while desk.engine.adapters.busy:  # pages that are being written stay in use until they are
        desk.turn()
    assert desk.pages_used()
    desk.say("a", Unpin(digest), Unpin(digest))
    desk.turn()
    desk.order(Left("b"))
    desk.turn()
    assert desk.pages_used()
    desk.say("c", Unpin(digest))
    desk.turn()
    assert not desk.pages_used()


def test_who_comes_later_is_told_where_everything_is(desk: Desk, tiny_model: Path, adapters: dict[str, Path]) -> None:
    digest = read_adapter(adapters["all4"], ModelConfig.from_folder(tiny_model).linear_shape).digest
    mix = Mix.of([(digest, 1.0)])
    desk.say("a", Submit(Request("r", (5, 6, 7), SHORT, mix, {digest: str(adapters["all4"])})))
    desk.turn()
    while desk.engine.has_work:
        desk.turn()
    desk.say("b", Hello())
    desk.turn()
    assert desk.heard["b"][0].residency == {digest: "device"}
