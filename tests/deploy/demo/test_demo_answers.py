"""The demo's requests on the real model: texts equal those of `transformers` + `peft`, and known targets are hit."""

from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from adapters_store.peft_format import read_adapter
from adapters_store.types import Mix
from deploy.demo.reference import Reference
from deploy.demo.requests import MAX_TOKENS, DemoRequest, demo_requests, held_out
from deploy.demo.run import ADAPTERS
from deploy.demo.tasks import TASKS
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.sequence import Request, SamplingParams


def answer(model: Path, requests: list[DemoRequest]) -> list[str]:
    """The engine's texts for all requests at once."""
    engine = Engine.from_config(EngineConfig(str(model), kv_memory=1 << 28, max_model_len=1024, device="cpu"))
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
        key = mix.digest.encode()  # all prompts begin alike
        engine.add_request(Request(str(index), tuple(prompt), params, mix, paths, key))
    tokens: list[list[int]] = [[] for _ in requests]
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)] += output.tokens
    engine.check_integrity()
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


@pytest.fixture(scope="module")
def answers(smollm2: Path) -> list[str]:
    return answer(smollm2, demo_requests())


@pytest.mark.slow
def test_known_targets_are_hit(answers: list[str]) -> None:
    expected = {index: request.target for index, request in enumerate(demo_requests()) if request.target is not None}
    assert len(expected) == 8
    assert {index: answers[index] for index in expected} == expected


@pytest.mark.slow
def test_texts_equal_transformers_and_peft(answers: list[str], smollm2: Path) -> None:
    requests = demo_requests()
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
