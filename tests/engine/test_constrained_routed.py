"""Constrained rows of every kind of routing in one batch: each keeps to its language, and is what it is alone."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from server.engine.constraint import Constraint
from server.engine.engine import Engine
from server.engine.masks import MaskThreads
from server.engine.sequence import FinishReason, Request, SamplingParams
from tests.engine.constrained_requests import (
    BLOCK_BYTES,
    CHOICE,
    REGEX,
    SCHEMA,
    LazyMasks,
    compile_all,
    matches,
    text_of,
)
from tests.engine.gated_world import FACTORY as GATES
from tests.engine.gated_world import make_router
from tests.engine.gated_world import request as gated
from tests.engine.plain_routing import MILORA, make_prompt_router, routed
from tests.engine.routed_world import routed_engine
from tests.engine.tiny_engine import PROMPTS, Registered, drain, run, texts

GREEDY = SamplingParams(temperature=0.0, max_tokens=100)
CONSTRAINTS: tuple[Constraint | None, ...] = (SCHEMA, REGEX, CHOICE, None)
MIX = {"all4": 0.5, "qv16": -0.3}
Ask = Callable[[str, tuple[int, ...], SamplingParams], Request]


@pytest.fixture(scope="module")
def kinds(model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ask]:
    """How a request of each kind is made."""
    known, folder = Registered(model, adapters), tmp_path_factory.mktemp("routers")
    names = tuple(sorted(known.weights))
    moa = make_prompt_router(folder / "moa", model, known, names).use()
    linears = make_prompt_router(folder / "linears", model, known, ("all4",), **MILORA).use()
    layers = make_prompt_router(folder / "layers", model, known, names, **MILORA | {"experts": "adapters"}).use(2)
    meteora = make_router(folder / "meteora", model, known, names[:3], 5, True).use(2)
    return {
        "base": lambda name, prompt, params: Request(name, prompt, params),
        "mix": lambda name, prompt, params: Request(name, prompt, params, known.mix(MIX), known.paths),
        "moa": lambda name, prompt, params: routed(name, prompt, known, moa, params),
        "linears": lambda name, prompt, params: routed(name, prompt, known, linears, params),
        "layers": lambda name, prompt, params: routed(name, prompt, known, layers, params),
        "meteora": lambda name, prompt, params: gated(name, prompt, known, meteora, params),
    }


def batch(kinds: dict[str, Ask]) -> list[Request]:
    """Two choices, one greedy and one sampled, of each kind under each constraint."""
    requests = [
        ask(
            f"{kind}-{number}-{seed}",
            PROMPTS[(number + place) % 4],
            replace(
                GREEDY,
                constraint=constraint,
                seed=seed,
                temperature=float(seed > 0),
                max_tokens=GREEDY.max_tokens if constraint is not None else 12,
            ),
        )
        for place, (kind, ask) in enumerate(kinds.items())
        for number, constraint in enumerate(CONSTRAINTS)
        for seed in (0, 5)
    ]
    random.Random(2).shuffle(requests)
    return requests


def engine_of(model: Path, **settings: Any) -> Engine:
    return routed_engine(model, device="cpu", gates=GATES, **settings)


@pytest.fixture(scope="module")
def together(model: Path, kinds: dict[str, Ask], words: Tokenizer) -> dict[str, tuple[int, ...]]:
    """What comes of them all at once, each of its language."""
    requests, engine = batch(kinds), engine_of(model, mask_threads=2)
    for request in requests:
        engine.add_request(request)
    outputs = drain(engine)
    for request in requests:
        own, constraint = outputs[request.id], request.params.constraint
        if constraint is not None:
            assert own[-1].finish_reason is FinishReason.STOP, request.id
            assert matches(constraint, text_of(own, words)), request.id
    assert engine.arrivals.grammars is not None
    assert not engine.arrivals.grammars._users
    return texts(outputs)


def test_each_is_what_it_is_alone(model: Path, kinds: dict[str, Ask], together: dict[str, tuple[int, ...]]) -> None:
    alone = engine_of(model)
    for request in batch(kinds):
        assert run(alone, [request])[request.id] == together[request.id], request.id
    assert len(set(together.values())) > len(together) // 2, "routing shows in the texts"


@pytest.mark.parametrize("late", [False, True])
def test_preemption_and_late_masks_change_nothing(
    model: Path, kinds: dict[str, Ask], together: dict[str, tuple[int, ...]], late: bool
) -> None:
    engine = engine_of(model, kv_memory=12 * BLOCK_BYTES, max_model_len=192, max_num_seqs=24)
    compile_all(engine, batch(kinds))
    engine.masks = LazyMasks(1) if late else MaskThreads(2)
    assert run(engine, batch(kinds)) == together
    assert engine.scheduler.preemptions > 0


def test_aborted_in_any_step_it_gives_back_what_it_held(model: Path, kinds: dict[str, Ask]) -> None:
    engine = engine_of(model)
    for steps in range(7):
        for request in batch(kinds)[::5]:
            engine.add_request(request)
        for _ in range(steps):
            engine.step()
        for request in batch(kinds)[::5]:
            engine.abort(request.id)
        outputs = drain(engine)
        assert all(own[-1].finish_reason for own in outputs.values())
        assert engine.arrivals.grammars is not None
        assert not engine.arrivals.grammars._users
        assert not engine.scheduler.running
