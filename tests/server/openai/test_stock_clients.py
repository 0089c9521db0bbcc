"""Other libraries' clients over a real socket, each in a process of its own (`stock_clients.py`)."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stock_clients
from fake_engine import REPLY
from fakes import Harness
from in_process_encoder import InProcess
from tiny_encoder import make_encoder
from transformers import PreTrainedTokenizerFast

from adapters_store.store import AdapterStore
from server.config import RoutingSettings, Settings
from server.engine.sequence import Request
from server.tools.form import HERMES

QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "OPENAI_API_KEY": "none",
}
"""Switches off what these libraries fetch and report; their network is closed all the same."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
async def harness(store: AdapterStore, tokenizer: PreTrainedTokenizerFast, folder: Path) -> AsyncIterator[Harness]:
    """A server whose model calls a tool where it is shown one, and names a place where its words are constrained."""
    harness = Harness(store, tokenizer, Settings(routing=RoutingSettings(encoder=str(folder))), InProcess(folder))
    assert harness.engine.info is not None
    harness.engine.info = replace(harness.engine.info, max_model_len=4096)
    said = (HERMES.write("weather", {"city": "Rome"}), REPLY, '{"city": "Rome"}')
    call, reply, place = (harness.engine.encode(text) for text in said)

    def script(request: Request) -> list[int]:
        if request.params.constraint is not None:
            return place
        return call if "weather" in tokenizer.decode(request.prompt) else reply

    harness.engine.answer(script)
    yield harness
    harness.check_all_given_back()


async def run(name: str, url: str, tmp_path: Path) -> Any:
    """What the client said in its last line."""
    environment = os.environ | QUIET | {"LLM_USER_PATH": str(tmp_path), "HOME": str(tmp_path)}
    command = (sys.executable, stock_clients.__file__, name, url)
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-3000:]
    return json.loads(out.splitlines()[-1])


def models(harness: Harness) -> set[tuple[str, ...]]:
    """The names of the mixes that the engine was asked for."""
    names = {digest: name for name, digest in harness.digests.items()}
    return {tuple(names[digest] for digest, _ in request.mix.entries) for request in harness.engine.requests}


async def test_langchain(harness: Harness, live: str, folder: Path, tmp_path: Path) -> None:
    said = await run("langchain", live, tmp_path)
    vectors = InProcess(folder).model.embed(["a", "b", "a"])
    np.testing.assert_allclose(said.pop("embeddings"), vectors, atol=1e-6)
    assert said == {
        "whole": REPLY,
        "usage": True,
        "stream": REPLY,
        "batch": [REPLY, REPLY],
        "async": REPLY,
        "completion": REPLY,
        "calls": [["weather", {"city": "Rome"}]],
        "structured": {"city": "Rome"},
    }
    assert {frozenset(mix) for mix in models(harness)} == {
        frozenset({"sql", "german"}),
        frozenset(),
        frozenset({"pirate"}),
    }


async def test_litellm(harness: Harness, live: str, folder: Path, tmp_path: Path) -> None:
    said = await run("litellm", live, tmp_path)
    np.testing.assert_allclose(said.pop("embeddings"), InProcess(folder).model.embed(["a", "b"]), atol=1e-6)
    assert said == {
        "whole": REPLY,
        "stream": REPLY,
        "async": REPLY,
        "completion": REPLY,
        "calls": [["weather", {"city": "Rome"}]],
        "structured": {"city": "Rome"},
        "refused": 404,
    }
    assert models(harness) == {("sql",), (), ("pirate",)}


async def test_llm(harness: Harness, live: str, tmp_path: Path) -> None:
    assert await run("llm", live, tmp_path) == {"stream": REPLY, "whole": REPLY}
    assert models(harness) == {("sql",), ()}


def test_the_network_of_clients_is_closed() -> None:
    with pytest.raises(stock_clients.NetworkUsed):
        stock_clients.stay_here("socket.getaddrinfo", ("raw.githubusercontent.com", 443, 0, 0, 0))
    with pytest.raises(stock_clients.NetworkUsed):
        stock_clients.stay_here("socket.connect", (None, ("8.8.8.8", 53)))
    stock_clients.stay_here("socket.connect", (None, ("127.0.0.1", 53)))
