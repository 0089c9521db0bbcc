"""Constrained rows on a GPU: the texts of a CPU, launched ahead, and nothing waits for the device."""

from pathlib import Path
from typing import Any

import pytest

from server.engine.config import EngineConfig
from server.engine.engine import Engine
from tests.engine.constrained_requests import batch
from tests.engine.delayed_steps import CPU
from tests.engine.spoken import spoken
from tests.engine.tiny_engine import outputs_of, texts
from tests.gpu.test_gpu_engine import no_waiting, tiny_engine

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spoken(tiny_model, tmp_path_factory.mktemp("spoken") / "model")


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, tuple[int, ...]]:
    return texts(outputs_of(Engine.from_config(EngineConfig(str(model), **CPU)), batch()))  # type: ignore[arg-type]


@pytest.mark.parametrize("graphs", ["capture", "eager"])
def test_constrained_texts_are_those_of_a_cpu(model: Path, expected: dict[str, tuple[int, ...]], graphs: str) -> None:
    engine = tiny_engine(model, graphs, max_num_seqs=16)
    assert engine.runner.lookahead
    assert texts(outputs_of(engine, batch())) == expected


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_choosing_constrained_tokens_waits_for_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(model, "lazy", max_num_seqs=64)
    first = texts(outputs_of(engine, batch()))  # compiles, captures, and fills the pool of pinned memory

    def watched(call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            with no_waiting():
                return call(*arguments)

        return wrapped

    for name in ("launch", "choose"):
        monkeypatch.setattr(engine.runner, name, watched(getattr(engine.runner, name)))
    assert texts(outputs_of(engine, batch())) == first
