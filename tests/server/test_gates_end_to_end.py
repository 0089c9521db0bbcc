"""A token-level router as its users meet it: trained, added and asked by commands, over restarts, in a real process."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served
from toy_routers import KEY, NAMES, loramux, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ASKED = {"model": "auto:gates", "messages": [{"role": "user", "content": "abab"}], "temperature": 0, "max_tokens": 6}


@pytest.fixture
def served(served_model: Path, toy_adapters: Path, tmp_path: Path) -> Iterator[Served]:
    served = start(served_model, toy_adapters, tmp_path)
    yield served
    if served.process.poll() is None:
        served.stop(signal.SIGKILL)


def start(model: Path, folder: Path, data: Path) -> Served:
    return Served(model, data / "data", "--adapters", str(folder), "--admin-key", KEY, key=KEY)


def ask(served: Served) -> Any:
    with served.client() as client:
        answer = client.post("/v1/chat/completions", json=ASKED | {"lora": {"explain": True}})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_from_training_to_answers(
    served: Served, served_model: Path, toy_adapters: Path, toy_tasks: Path, tmp_path: Path
) -> None:
    options = ("--adapters", str(toy_adapters), "--steps", "6", "--learning-rate", "0.05")
    train("meteora", tmp_path / "gates", served_model, toy_tasks, *options)
    assert "registered gates" in loramux("routers", "add", "gates", str(tmp_path / "gates"), url=served.url)
    first = ask(served)
    lora = first["lora"]
    assert (lora["router"], {each["name"] for each in lora["adapters"]}) == ("gates", set(NAMES))
    assert sum(each["share"] for each in lora["adapters"]) == pytest.approx(1.0, abs=1e-5)
    text = "".join(token["text"] for token in lora["tokens"][0])
    assert text
    assert first["choices"][0]["message"]["content"].startswith(text)  # bytes of no whole character may follow
    shown = json.loads(loramux("explain", "abab", "--router", "gates", "--tokens", "6", "--json", url=served.url))
    assert shown["tokens"] == lora["tokens"]

    # The engine starts anew without them, and reads them for the next request.
    served.kill_engine()
    assert ask(served)["lora"]["tokens"] == lora["tokens"]

    # They are still there after a crash of everything.
    assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    again = start(served_model, toy_adapters, tmp_path)
    try:
        assert ask(again)["lora"]["tokens"] == lora["tokens"]
    finally:
        assert again.stop() == 0
