"""Token-level routing on a GPU: captured steps against the reference backend, slots that change hands, no waiting."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine import capacity
from server.engine.engine import Engine
from server.engine.graphs import GraphSteps
from server.engine.sequence import Output, Request
from tests.engine.gated_world import FACTORY, Routed, make_router, request
from tests.engine.tiny_engine import Registered, drain, tokens_of
from tests.gpu.test_gpu_engine import GREEDY, no_waiting, prompt, registered, tiny_engine

__all__ = ["registered"]

pytestmark = pytest.mark.gpu

SETS = (("r4", "r8", "qv16", "ou12"), ("down8", "r24", "r4"), ("qv16", "r8"), ("r64", "ou12", "r8", "r4", "down8"))
LENGTHS = (3, 17, 1, 33, 65, 8, 90, 2)
COUNT = 20

MakeRequests = Callable[[str], list[Request]]


@pytest.fixture
def routers(tiny_model: Path, registered: Registered, tmp_path: Path) -> list[Routed]:
    return [
        make_router(tmp_path / str(seed), tiny_model, registered, names, seed, null=seed % 2 == 0)
        for seed, names in enumerate(SETS)
    ]


@pytest.fixture
def requests(registered: Registered, routers: list[Routed]) -> MakeRequests:
    """Rows of all routers with various options, explicit mixes and base rows."""

    def make(prefix: str) -> list[Request]:
        made = []
        for row in range(COUNT):
            params = replace(GREEDY, max_tokens=8 + row % 7)
            tokens = prompt(row, LENGTHS[row % len(LENGTHS)])
            if row % 4 == 3:
                mix = registered.mix({"r8": 0.7, "qv16": -0.4} if row % 8 == 3 else {})
                made.append(Request(f"{prefix}{row}", tokens, params, mix, registered.paths, mix.digest.encode()))
                continue
            router = routers[row % len(routers)]
            use = router.use(1 + row % 3, (1.0, 4.0, 0.5)[row % 3], router.names[row % 2 :])
            made.append(request(f"{prefix}{row}", tokens, registered, use, params))
        return made

    return make


def served(engine: Engine, requests: list[Request]) -> dict[str, list[Output]]:
    for one in requests:
        engine.add_request(one)
    found = drain(engine)
    engine.check_integrity()
    return found


def engine_of(folder: Path, graphs: str = "lazy", backend: str = "triton", **settings: Any) -> Engine:
    return tiny_engine(folder, graphs, backend, gates=FACTORY, max_num_seqs=7, max_batch_tokens=64, **settings)


def assert_equal(found: dict[str, list[Output]], expected: dict[str, list[Output]]) -> None:
    assert found.keys() == expected.keys()
    for name, outputs in found.items():
        assert tokens_of(outputs) == tokens_of(expected[name]), name
        for one, other in zip(outputs, expected[name], strict=True):
            assert one.shares == pytest.approx(other.shares, abs=1e-3), name


@pytest.fixture
def expected(tiny_model: Path, requests: MakeRequests) -> dict[str, list[Output]]:
    found = served(engine_of(tiny_model, backend="reference"), requests(""))
    plain = [replace(one, gates=None) for one in requests("")]
    even = served(engine_of(tiny_model, backend="reference"), plain)
    changed = [name for name in found if tokens_of(found[name]) != tokens_of(even[name])]
    assert len(changed) > COUNT // 3, "the gates should change the texts"
    return found


@pytest.mark.parametrize("graphs", ["capture", "lazy", "eager"])
def test_every_mode_gives_the_same_tokens_and_shares(
    tiny_model: Path, requests: MakeRequests, expected: dict[str, list[Output]], graphs: str
) -> None:
    engine = engine_of(tiny_model, graphs)
    steps = engine.runner.steps
    assert isinstance(steps, GraphSteps)
    assert_equal(served(engine, requests("")), expected)
    assert (steps.eager_steps > 0) is (graphs == "eager")
    again = served(engine, [replace(one, id=f"again {one.id}") for one in requests("")])
    assert_equal({name.removeprefix("again "): outputs for name, outputs in again.items()}, expected)


@pytest.mark.parametrize("slots", [1, 2])
def test_slots_change_hands_behind_the_steps_under_way(
    tiny_model: Path, requests: MakeRequests, expected: dict[str, list[Output]], slots: int
) -> None:
    engine = engine_of(tiny_model, gate_slots=slots)
    assert engine.runner.lookahead
    assert_equal(served(engine, requests("")), expected)


def test_many_rows_by_tiles_and_as_dense_products(
    tiny_model: Path, requests: MakeRequests, expected: dict[str, list[Output]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 90 tokens in one chunk; with more pages than the dense way takes, and with fewer."""
    for pages in ((16,), (64,)):
        monkeypatch.setattr(capacity, "GATED_PAGES", pages)
        engine = tiny_engine(tiny_model, gates=FACTORY, max_num_seqs=20, max_batch_tokens=512)
        assert_equal(served(engine, requests("")), expected)


def test_a_step_that_no_graph_holds(
    tiny_model: Path, requests: MakeRequests, expected: dict[str, list[Output]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "GATED_PAGES", (1,))
    engine = engine_of(tiny_model)
    assert_equal(served(engine, requests("")), expected)
    assert isinstance(engine.runner.steps, GraphSteps)
    assert engine.runner.steps.eager_steps > 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("graphs", ["lazy", "eager"])
def test_launching_waits_for_nothing(
    tiny_model: Path, requests: MakeRequests, graphs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_model, graphs, prefix_cache=False)
    first = served(engine, requests("a"))  # compiles, captures, and fills the pool of pinned memory
    launch, launches = engine.runner.launch, 0

    def watched(*arguments: Any) -> Any:
        nonlocal launches
        launches += 1
        with no_waiting():
            return launch(*arguments)

    monkeypatch.setattr(engine.runner, "launch", watched)
    second = served(engine, requests("b"))
    assert launches >= 16
    assert {name[1:]: tokens_of(own) for name, own in second.items()} == {
        name[1:]: tokens_of(own) for name, own in first.items()
    }


def test_memory_counts_the_slots(tiny_model: Path) -> None:
    before = torch.cuda.memory_allocated()
    engine = engine_of(tiny_model, "eager", gate_slots=3, gates_per_slot=32)
    shape = engine.runner.model.linear_shape
    gates = 3 * 32 * shape.num_layers * sum(shape.inputs.values()) * 4
    assert engine.info().memory["gates"] == gates
    assert torch.cuda.memory_allocated() - before >= gates
