"""Steps from captured graphs against the reference backend, on a CPU: see `recorded_graph`."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from server.engine import capacity
from server.engine.engine import Engine
from server.engine.graphs import GraphSteps
from server.engine.sequence import Output, Request, SamplingParams
from tests.conftest import HAS_GPU
from tests.engine.constrained_requests import CHOICE, REGEX
from tests.engine.gated_world import FACTORY as GATES
from tests.engine.gated_world import make_router
from tests.engine.gated_world import request as gated
from tests.engine.micro_engine import micro, micro_engine, micro_model
from tests.engine.plain_routing import ADAPTERS, MILORA, make_prompt_router, routed
from tests.engine.recorded_graph import RecordedGraph, recorded_graphs
from tests.engine.routed_world import FACTORY as ROUTERS
from tests.engine.spoken import spoken, tokenizer
from tests.engine.tiny_engine import Registered, drain, tokens_of

__all__ = ["micro", "micro_model"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # padding rows compute with what was never written
    pytest.mark.skipif(HAS_GPU, reason="a GPU has graphs of its own"),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=0)
BOTH = ("all4", "qv20")


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small graphs: the interpreter computes all of their padding."""
    monkeypatch.setattr(capacity, "GATED_PAGES", (4,))
    monkeypatch.setattr(capacity, "MIXED_ROWS", (12,))
    with recorded_graphs():
        yield


@pytest.fixture(scope="module")
def spoken_model(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As large, but for a vocabulary that can be spoken."""
    folder = tmp_path_factory.mktemp("spoken")
    config = LlamaConfig.from_pretrained(micro_model, vocab_size=300)
    torch.manual_seed(2)
    LlamaForCausalLM(config).save_pretrained(folder / "wide")
    return spoken(folder / "wide", folder / "spoken")


@pytest.fixture
def serve(micro_model: Path) -> Callable[..., tuple[dict[str, list[Output]], GraphSteps]]:
    """`serve(requests, **settings)`: the outputs, which equal the reference backend's, and the steps."""

    def run(
        requests: Sequence[Request], model: Path = micro_model, **settings: Any
    ) -> tuple[dict[str, list[Output]], GraphSteps]:
        found = {}
        for backend in ("reference", "triton"):
            options = {"max_num_seqs": 3, "max_batch_tokens": 12, **settings}
            engine = micro_engine(model, backend, **options)
            steps = engine.runner.steps
            if isinstance(steps, GraphSteps):
                steps.use_graphs = True
            found[backend] = _served(engine, requests)
        assert isinstance(steps, GraphSteps)
        _assert_equal(found["triton"], found["reference"])
        return found["triton"], steps

    return run


def _served(engine: Engine, requests: Sequence[Request]) -> dict[str, list[Output]]:
    for request in requests:
        engine.add_request(request)
    return drain(engine)


def _assert_equal(found: dict[str, list[Output]], expected: dict[str, list[Output]]) -> None:
    assert found.keys() == expected.keys()
    for name, outputs in found.items():
        assert tokens_of(outputs) == tokens_of(expected[name]), name
        for one, other in zip(outputs, expected[name], strict=True):
            scores = [[scored.logprob for scored in output.logprobs] for output in (one, other)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-3)
            assert one.shares == pytest.approx(other.shares, abs=1e-3), name
    told = [{name: outputs[0].decided for name, outputs in side.items()} for side in (found, expected)]
    chosen = [{name: each.chosen for name, each in side.items() if each is not None} for side in told]
    assert chosen[0] == chosen[1]


Serve = Callable[..., tuple[dict[str, list[Output]], GraphSteps]]


def replays(steps: GraphSteps) -> int:
    return sum(graph.replays for graph in steps._graphs.values() if isinstance(graph, RecordedGraph))


@pytest.mark.parametrize("refused", [False, True])
def test_capturing_between_steps_changes_nothing(
    serve: Serve, micro: Registered, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step needs another graph than the one before, whose tokens the host does not know; or cannot have one."""
    monkeypatch.setattr(RecordedGraph, "refuses", refused)
    requests = [
        Request("0", (5, 9, 11), replace(GREEDY, max_tokens=5)),
        Request("1", (6, 4), GREEDY),
        Request("2", (8, 2, 7), replace(GREEDY, max_tokens=2), micro.mix({"qv20": 1.0}), micro.paths, b"qv"),
    ]
    _, steps = serve(requests)
    assert steps.eager_steps == 0
    assert (steps.num_graphs == 0) is refused
    assert refused or steps.num_graphs >= 4


def test_a_graph_serves_one_set_of_adapters_after_the_other(serve: Serve, micro: Registered) -> None:
    """Other pages, weights and ranks in the same graphs, and pages that change hands."""
    mixes = ({"all4": 1.0}, {"qv20": -0.7}, {"all4": 0.3, "qv20": 0.9}, {"all4": -1.2}, {})
    requests = [
        Request(str(row), (5, 9, 11 + row), GREEDY, micro.mix(mix), micro.paths, b"%d" % row)
        for row, mix in enumerate(mixes)
    ]
    found, steps = serve(requests, max_num_seqs=1)
    assert steps.eager_steps == 0
    assert replays(steps) > steps.num_graphs
    assert len({tuple(tokens_of(outputs)) for outputs in found.values()}) >= 4


def test_gates_in_graphs(serve: Serve, micro_model: Path, micro: Registered, tmp_path: Path) -> None:
    """Two routers take turns in one slot."""
    routers = [make_router(tmp_path / str(seed), micro_model, micro, BOTH[::-1], seed, seed > 3) for seed in (3, 4)]
    requests = [
        gated("a", (5, 9, 33), micro, routers[0].use(1), GREEDY),
        gated("b", (7, 3, 30, 31), micro, routers[0].use(2, 4.0), GREEDY),
        Request("mix", (5, 9, 33), GREEDY, micro.mix({"all4": 0.5}), micro.paths),
        gated("c", (7, 3, 30), micro, routers[1].use(2, only=("all4",)), GREEDY),
    ]
    found, steps = serve(requests, gates=GATES, gate_slots=1)
    assert steps.eager_steps == 0
    assert replays(steps) > 0
    assert found["b"][-1].shares != pytest.approx(found["c"][-1].shares)


def test_decided_rows_in_graphs(serve: Serve, micro_model: Path, micro: Registered, tmp_path: Path) -> None:
    """Steps in which routers read prompts do without; the rows that they decided for do not, beside all others."""
    made = {
        "milora": make_prompt_router(tmp_path / "milora", micro_model, micro, ("all4",), **MILORA),
        "layered": make_prompt_router(tmp_path / "layered", micro_model, micro, BOTH, **ADAPTERS | {"top_k": 1}),
        "moa": make_prompt_router(tmp_path / "moa", micro_model, micro, BOTH, norm="rms"),
    }
    requests = [
        routed(name, (5, 9, 33 + row), micro, router.use(), GREEDY) for row, (name, router) in enumerate(made.items())
    ]
    requests += [
        Request("late", (3, 4), GREEDY),
        Request("mix", (8, 9), GREEDY, micro.mix({"all4": 0.5}), micro.paths),
    ]
    found, steps = serve(requests, prompt_routers=ROUTERS)
    assert all(found[name][0].decided is not None for name in made)
    assert replays(steps) >= 2
    assert any(shape.decided for shape in steps._graphs)


def test_decided_and_gated_rows_in_one_graph(
    serve: Serve, micro_model: Path, micro: Registered, tmp_path: Path
) -> None:
    router = make_router(tmp_path / "gates", micro_model, micro, BOTH, 3, False)
    layered = make_prompt_router(tmp_path / "layered", micro_model, micro, BOTH, **ADAPTERS | {"top_k": 1})
    params = replace(GREEDY, max_tokens=10)  # so many that both decode in one step, whichever begins first
    requests = [
        routed("layered", (5, 9, 33), micro, layered.use(), params),
        gated("gated", (7, 3), micro, router.use(2), params),
    ]
    _, steps = serve(requests, prompt_routers=ROUTERS, gates=GATES)
    assert any(shape.decided and shape.gates is not None for shape in steps._graphs)
    assert replays(steps) > 0


def test_constrained_rows_of_every_kind_of_routing(
    serve: Serve, spoken_model: Path, micro: Registered, tmp_path: Path
) -> None:
    """Their masks are made beside steps that were launched ahead."""
    router = make_router(tmp_path / "gates", spoken_model, micro, BOTH, 3, False)
    layered = make_prompt_router(tmp_path / "layered", spoken_model, micro, BOTH, **ADAPTERS | {"top_k": 1})
    params = [
        replace(GREEDY, max_tokens=6, ignore_eos=False, constraint=constraint) for constraint in (CHOICE, REGEX, CHOICE)
    ]
    requests = [
        gated("gated", (7, 3), micro, router.use(2), params[0]),
        routed("layered", (5, 9, 33), micro, layered.use(), params[1]),
        Request("mix", (8, 9), params[2], micro.mix({"all4": 0.5}), micro.paths),
    ]
    found, steps = serve(requests, spoken_model, prompt_routers=ROUTERS, gates=GATES)
    assert replays(steps) > 0
    words = tokenizer()
    texts = {name: words.decode([*tokens_of(outputs)]) for name, outputs in found.items()}
    assert {texts["gated"], texts["mix"]} <= set(json.loads(CHOICE.source))
    assert re.fullmatch(r"[a-c]{2,9}(-\d{0,5}.*)?", texts["layered"])
