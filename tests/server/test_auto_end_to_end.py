"""The model `auto` as its users meet it: a server process on the real model, with the real encoder and adapters."""

import json
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import Served

from adapters_store.registry import Registry
from deploy.demo.requests import MAX_TOKENS, DemoRequest, held_out
from deploy.demo.run import ADAPTERS
from deploy.demo.tasks import TASKS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KEY = "the-admin-key"
ROW = 2
"""Of the held-out rows; none of them is among the adapters' samples."""
PEOPLE = ("aunt", "uncle", "neighbour", "best friend", "grandmother", "teacher", "boss", "sister", "nephew", "dentist")
SAMPLES = [
    text
    for person in PEOPLE
    for text in (
        f"Write a birthday card for my {person}, who loves gardening.",
        f"My {person} is turning {30 + 3 * len(person)} next week. Write something warm and funny for the card.",
    )
]
UNSEEN = "I need a few cheerful lines for the birthday card of my cousin, who plays the cello."
Json = dict[str, Any]


class Start:
    """The same command each time, on the same data folder."""

    def __init__(self, model: Path, encoder: Path, data: Path) -> None:
        self.model, self.encoder, self.data = model, encoder, data

    def __call__(self) -> Served:
        memory = ("--kv-memory", "256MiB", "--page-memory", "256MiB", "--num-threads", "2", "--max-model-len", "1024")
        options = (*memory, "--adapters", str(ADAPTERS), "--encoder", str(self.encoder), "--admin-key", KEY)
        return Served(self.model, self.data, *options, key=KEY)


@pytest.fixture(scope="module")
def start(smollm2: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(smollm2, minilm, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def registry(served: Served, start: Start) -> Iterator[Registry]:  # noqa: ARG001  the server makes the schema
    registry = Registry.open(f"sqlite:///{start.data}/registry/{start.model.name}.sqlite", time.time)
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def served(start: Start) -> Iterator[Served]:
    served = start()
    yield served
    if served.process.poll() is None:
        served.stop(signal.SIGKILL)


def ask(served: Served, prompt: str, model: str = "auto", **lora: object) -> Json:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    with served.client() as client:
        answer = client.post("/v1/chat/completions", json=body | {"max_tokens": MAX_TOKENS, "lora": lora})
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def names(answer: Json) -> list[str]:
    return [adapter["name"] for adapter in answer["lora"]["adapters"]]


def text(answer: Json) -> str:
    return str(answer["choices"][0]["message"]["content"])


def register(served: Served, name: str, folder: Path, samples: Sequence[str]) -> None:
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    with served.client() as client:
        data = {"name": name, "samples": json.dumps(list(samples))}
        answer = client.post("/admin/v1/adapters", data=data, files=files)
    assert answer.status_code == 201, answer.text


def test_prompts_find_their_adapters_and_new_ones_too(served: Served, start: Start, registry: Registry) -> None:
    # Every task's prompt finds its own adapter, all at the same time, and gets that adapter's answer.
    requests = [held_out(task, ROW) for task in TASKS]

    def answered(request: DemoRequest) -> Json:
        return ask(served, request.prompt, top_k=1)

    with ThreadPoolExecutor(len(requests)) as threads:
        answers = list(threads.map(answered, requests))
    assert [names(answer) for answer in answers] == [[task] for task in TASKS]
    assert [text(answer) for answer in answers] == [request.target for request in requests]

    # An adapter for another kind of prompt is registered while the server runs: the next request uses it.
    before = ask(served, UNSEEN, top_k=1, explain=True)
    base = ask(served, UNSEEN, min_score=1)
    assert (names(base), base["lora"]["outcome"]) == ([], "below_min_score")
    register(served, "birthday_cards", ADAPTERS / "iso_date", SAMPLES)
    after = ask(served, UNSEEN, top_k=1)
    assert names(after) == ["birthday_cards"]
    assert after["lora"]["cached"] is False
    assert after["lora"]["adapters"][0]["score"] > before["lora"]["scores"][0]["score"] + 0.2
    assert text(after) == text(ask(served, UNSEEN, model="birthday_cards")) != text(base)
    assert names(ask(served, requests[0].prompt, top_k=1)) == [next(iter(TASKS))]

    # It is still there after a crash, with the prototypes that were stored: nothing is embedded again.
    version = registry.prototypes.version()
    assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    again = start()
    try:
        assert text(ask(again, UNSEEN, top_k=1)) == text(after)
        assert names(ask(again, UNSEEN, top_k=1)) == ["birthday_cards"]
        assert registry.prototypes.version() == version
    finally:
        assert again.stop() == 0
