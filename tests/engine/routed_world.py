"""What tests of prompt-level routers through the whole engine share: the engine, the comparison, mixed traffic."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.prompt_routers import PromptUse
from server.engine.sequence import Output, Request
from tests.engine.gated_world import FACTORY as GATES
from tests.engine.gated_world import make_router
from tests.engine.gated_world import request as gated
from tests.engine.plain_routing import Made, Plain, routed
from tests.engine.tiny_engine import GREEDY, PROMPTS, SMALL, Registered, drain, tokens_of

FACTORY = "routing.prompt_serving:PromptRouterFactory"
SCORED = replace(GREEDY, logprobs=0, max_tokens=6)
TOLERANCE = 1e-3

Asked = tuple[str, tuple[int, ...], PromptUse]
"""A router's name, a prompt, and how the router is used for it."""


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return routed_engine(tiny_model)


def routed_engine(model: Path, **settings: Any) -> Engine:
    return Engine.from_config(EngineConfig(str(model), prompt_routers=FACTORY, **{**SMALL, **settings}))


def assert_equals_plain(outputs: list[Output], plain: Plain, prompt: tuple[int, ...], use: PromptUse) -> None:
    weights, probabilities = plain.decide(prompt, use)
    tokens, scores = plain.greedy(prompt, weights, SCORED.max_tokens)
    assert tokens_of(outputs) == tokens
    assert [output.logprobs[0].logprob for output in outputs] == pytest.approx(scores, abs=TOLERANCE)
    told = outputs[0].decided
    assert told is not None
    assert all(output.decided is None for output in outputs[1:])
    assert [list(own) for own in told.probabilities] == [pytest.approx(own, abs=TOLERANCE) for own in probabilities]
    assert len(told.chosen) == plain.made.form.num_layers


def assert_mixed_traffic_equals_plain(
    model: Path,
    known: Registered,
    made: Mapping[str, tuple[Plain, Made]],
    asked: Mapping[str, Asked],
    gates: Path,
    settings: Mapping[str, Any],
    seed: int,
) -> None:
    """Requests under these routers, mixed with base rows, explicit mixes and MeteoRA's, all in one engine.

    Routed ones equal the formulas, the others what an engine says that serves each alone. gates: where MeteoRA's
    router is written to. With a small `kv_memory` there must have been preemption.
    """
    others = [Request(f"base-{number}", prompt, SCORED) for number, prompt in enumerate(PROMPTS[:4])]
    mix = known.mix({"all4": 0.5, "qv16": 0.3})
    others += [Request(f"mix-{number}", prompt, SCORED, mix, known.paths) for number, prompt in enumerate(PROMPTS[:4])]
    router = make_router(gates, model, known, tuple(sorted(known.weights))[:3], 5, False)
    others += [gated(f"gated-{number}", PROMPTS[number], known, router.use(2), SCORED) for number in range(3)]
    requests = [routed(name, prompt, known, use, SCORED) for name, (_, prompt, use) in asked.items()] + others
    random.Random(seed).shuffle(requests)
    engine = routed_engine(model, gates=GATES, **settings)
    known.load(engine)
    for request in requests:
        engine.add_request(request)
    outputs = drain(engine)
    assert engine.scheduler.preemptions > 0 or "kv_memory" not in settings
    for name, (which, prompt, use) in asked.items():
        assert_equals_plain(outputs[name], made[which][0], prompt, use)
    alone = routed_engine(model, gates=GATES)
    for request in others:
        alone.add_request(request)
        assert tokens_of(drain(alone)[request.id]) == tokens_of(outputs[request.id])


def outputs_with_aborts(
    engine: Engine, requests: Sequence[Request], steps: int, aborted: Sequence[str]
) -> dict[str, list[Output]]:
    """Everything that is said of the requests, of which some are aborted after so many steps."""
    outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add_request(request)

    def step() -> None:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check_integrity()

    for _ in range(steps):
        step()
    for name in aborted:
        engine.abort(name)
    engine.check_integrity()
    while engine.has_work:
        step()
    return outputs
