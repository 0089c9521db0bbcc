"""A token-level router as its users meet it: trained, added and asked by commands, over restarts, in a real process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import byte_level_tokenizer
from served import Served

from routing.train.data import Task, TaskRow, write_task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KEY = "the-admin-key"
NAMES = ("all4", "qv16")
ASKED = {"model": "auto:gates", "messages": [{"role": "user", "content": "abab"}], "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_model, folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for name, letters in zip(NAMES, ("ab", "xyz"), strict=True):
        texts = [letters * (2 + number) for number in range(9)]
        rows = tuple(TaskRow(name, "toy", letters, text, letters[-1], 0) for text in texts)
        write_task(root, Task(name, rows[:5], rows[5:7], rows[7:]))
    return root


@pytest.fixture(scope="module")
def folder(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters-to-serve")
    for name in NAMES:
        shutil.copytree(adapters[name], root / name)
    return root


@pytest.fixture
def served(model: Path, folder: Path, tmp_path: Path) -> Iterator[Served]:
    served = start(model, folder, tmp_path)
    yield served
    if served.process.poll() is None:
        served.stop(signal.SIGKILL)


def start(model: Path, folder: Path, data: Path) -> Served:
    return Served(model, data / "data", "--adapters", str(folder), "--admin-key", KEY, key=KEY)


def loramux(*arguments: str, url: str = "", **env: str) -> str:
    env = {**os.environ, "LORAMUX_URL": url, "LORAMUX_ADMIN_KEY": KEY, **env}
    done = subprocess.run([sys.executable, "-m", "server.cli", *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(served: Served) -> Any:
    with served.client() as client:
        answer = client.post("/v1/chat/completions", json=ASKED | {"lora": {"explain": True}})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_from_training_to_answers(served: Served, model: Path, folder: Path, tasks: Path, tmp_path: Path) -> None:
    run = ["--tasks", str(tasks), "--adapters", str(folder), "--model", str(model), "--out", str(tmp_path / "gates")]
    printed = loramux("train", "meteora", *run, "--steps", "6", "--batch", "2", "--learning-rate", "0.05")
    assert printed.splitlines()[-1] == str(tmp_path / "gates")
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
    again = start(model, folder, tmp_path)
    try:
        assert ask(again)["lora"]["tokens"] == lora["tokens"]
    finally:
        assert again.stop() == 0
