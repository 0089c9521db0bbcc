"""The demo's requests on the real model: texts equal those of `transformers` + `peft`, and known targets are hit."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from adapters_store.peft_format import read_adapter
from adapters_store.types import Mix
from deploy.demo.reference import Reference
from deploy.demo.requests import GATES, MAX_TOKENS, ROUTERS, DemoRequest, demo_requests, held_out
from deploy.demo.run import ADAPTERS
from deploy.demo.tasks import TASKS
from routing.gate_folder import read_gates
from routing.prompt_folder import read_prompt_router
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.gates import GateUse
from server.engine.prompt_routers import PromptUse
from server.engine.sequence import Request, SamplingParams

FACTORIES = {
    "gates": "routing.token_router:TokenGateFactory",
    "prompt_routers": "routing.prompt_serving:PromptRouterFactory",
}


def answer(model: Path, requests: list[DemoRequest]) -> list[str]:
    """The engine's texts for all requests at once."""
    memory = {"kv_memory": 1 << 28, "max_model_len": 1024}
    engine = Engine.from_config(EngineConfig(str(model), device="cpu", **FACTORIES, **memory))
    tokenizer = AutoTokenizer.from_pretrained(model)
    folders = {name: ADAPTERS / name for name in TASKS}
    shape = engine.runner.model.linear_shape
    digests = {name: read_adapter(folder, shape).weights.digest for name, folder in folders.items()}
    paths = {digests[name]: str(folder) for name, folder in folders.items()}
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    for index, request in enumerate(requests):
        message = [{"role": "user", "content": request.prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        mix = Mix.of([(digests[name], weight) for name, weight in request.adapters])
        use = None if request.router is None else router_use(request.router)
        if use is not None:
            mix = Mix(tuple((digest, 1.0) for digest in sorted(digests.values())))
        key = mix.digest.encode()  # all prompts begin alike
        gates, routed = (use, None) if isinstance(use, GateUse) else (None, use)
        engine.add_request(
            Request(str(index), tuple(prompt), params, mix, paths, key, gates=gates, prompt_router=routed)
        )
    tokens: list[list[int]] = [[] for _ in requests]
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)] += output.tokens
    engine.check_integrity()
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


def router_use(name: str) -> GateUse | PromptUse:
    folder = ADAPTERS.parent / name
    if name == GATES:
        card = read_gates(folder)
        rows = tuple(adapter.digest for adapter in card.adapters)
        return GateUse(card.sha256, str(folder), rows, card.top_k, card.temperature, card.has_null)
    prompt_card = read_prompt_router(folder)
    rows = tuple(adapter.digest for adapter in prompt_card.adapters)
    return PromptUse(prompt_card.sha256, str(folder), rows, prompt_card.form.layered, prompt_card.form.top_k)


@pytest.fixture(scope="module")
def answers(smollm2: Path) -> list[str]:
    return answer(smollm2, demo_requests())


@pytest.mark.slow
def test_known_targets_are_hit(answers: list[str]) -> None:
    expected = {index: request.target for index, request in enumerate(demo_requests()) if request.target is not None}
    assert len(expected) == 12
    assert {index: answers[index] for index in expected} == expected


@pytest.mark.slow
def test_texts_equal_transformers_and_peft(answers: list[str], smollm2: Path) -> None:
    pairs = [pair for pair in zip(demo_requests(), answers, strict=True) if pair[0].fixed]
    requests, answers = [request for request, _ in pairs], [answer for _, answer in pairs]
    names = sorted({name for request in requests for name, _ in request.adapters})
    reference = Reference(smollm2, ADAPTERS, names)
    differing = {
        index: expected
        for index, (request, answer) in enumerate(zip(requests, answers, strict=True))
        if (expected := reference.disagreement(request, answer)) is not None
    }
    assert not differing
    assert reference.disagreement(requests[0], answers[1]) is not None, "the check must be able to fail"


@pytest.mark.slow
def test_every_adapter_is_as_good_as_its_card_says(smollm2: Path) -> None:
    """20 held-out rows a task, all seven adapters in the same batches; the cards promise 96 % and more on 100 rows."""
    requests = [held_out(task, row) for row in range(20) for task in TASKS]
    texts = answer(smollm2, requests)
    right = Counter(
        request.adapters[0][0] for request, text in zip(requests, texts, strict=True) if text == request.target
    )
    assert {task: right[task] >= 18 for task in TASKS} == dict.fromkeys(TASKS, True)


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_routers_are_as_good_as_the_adapters(smollm2: Path, router: str) -> None:
    """Ten held-out rows of every task, all through one router that is told nothing of the task."""
    requests = [replace(held_out(task, row), router=router) for row in range(10) for task in TASKS]
    texts = answer(smollm2, requests)
    right = sum(text == request.target for request, text in zip(requests, texts, strict=True))
    assert right >= 68, f"{right} of {len(requests)}"
