"""The death of an engine, as its parent examines it."""

import asyncio
from typing import Any, cast

import pytest

from server.engine.config import EngineConfig
from server.frontends.engines import SupervisedEngine, SuspectDesk
from server.frontends.messages import EngineDown


class Front:
    """What the parent sees of one. `line` None: it does not serve yet."""

    def __init__(self, name: str, line: str | None) -> None:
        self.name = name
        self.line = line
        self.told: list[object] = []

    def send(self, message: object) -> None:
        self.told.append(message)


@pytest.mark.parametrize("says", [[b"a", b"b"], None], ids=["it answers", "it dies"])
async def test_the_next_engine_waits_for_front_ends_that_serve(
    says: list[bytes] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.frontends.engines.IN_FLIGHT_SECONDS", 600.0)
    serving, starting = Front("0.1", "serves"), Front("1.2", None)
    suspects = SuspectDesk(lambda _name, _message: None)
    engine = SupervisedEngine(3, EngineConfig("model"), 60.0, suspects, lambda: cast(Any, [serving, starting]))
    engine.conversation.alive = True
    lost = asyncio.create_task(engine._lost("it died"))
    await asyncio.sleep(0)
    assert [type(front.told[0]) for front in (serving, starting)] == [EngineDown, EngineDown]
    assert not lost.done()
    if says is None:
        engine.part("0.1")
    else:
        engine.had("0.1", says)
    await asyncio.wait_for(lost, 60)
    engine.had("1.2", [b"b"])  # however late
    assert suspects.crashes == ({} if says is None else {b"a": 1, b"b": 1}) | ({b"b": 1})
    await engine.stop()
