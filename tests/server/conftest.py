"""The application around a fake engine, over httpx and over a real socket."""

import asyncio
import logging
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from byte_tokenizer import byte_level_tokenizer
from fakes import Harness, make_store, wait_for
from toy_routers import NAMES, write_tasks
from transformers import PreTrainedTokenizerFast

from adapters_store.store import AdapterStore
from server.config import ServeSettings, Settings
from server.serve import uvicorn_config


@pytest.fixture(autouse=True)
def _no_settings_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith("LORAMUX_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """`loramux serve` says where lines go, also where it is called in this process."""
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], sys.excepthook = handlers, hook
    root.setLevel(level)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    store = make_store(tmp_path_factory.mktemp("adapters"), ["sql", "german", "pirate"])
    yield store
    wait_for(store.close())


@pytest.fixture(scope="session")
def toy_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def toy_adapters(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the adapters of the toy tasks."""
    root = tmp_path_factory.mktemp("adapters-to-serve")
    for name in NAMES:
        shutil.copytree(adapters[name], root / name)
    return root


@pytest.fixture
def make_harness(store: AdapterStore, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Harness]:
    """`make_harness(**serve settings)`."""

    def make(**serve: Any) -> Harness:
        return Harness(store, tokenizer, Settings(serve=ServeSettings(**serve)))

    return make


@pytest.fixture
async def harness(make_harness: Callable[..., Harness]) -> AsyncIterator[Harness]:
    """The application; at the end of a test nothing of any request may be left."""
    harness = make_harness()
    yield harness
    harness.check_all_given_back()


@pytest.fixture
async def client(harness: Harness) -> AsyncIterator[httpx.AsyncClient]:
    async with harness.client() as client:
        yield client


@pytest.fixture
async def live(harness: Harness) -> AsyncIterator[str]:
    """The URL of the application behind uvicorn on a real socket, in this event loop."""
    # Its protocol is named, or asyncio leaves Nagle's algorithm on, and an answer in two pieces waits 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn_config(harness.app, harness.settings.http))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    await serving
    listener.close()
