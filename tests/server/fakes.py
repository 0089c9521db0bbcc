"""Adapters made in code, and the application around them and an engine without a model."""

import asyncio
import contextlib
import functools
import json
import tempfile
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from fake_engine import FakeEngine
from fastapi import FastAPI
from safetensors.torch import save_file
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedTokenizerFast

from adapters_store.registry import Registry
from adapters_store.store import AdapterStore, StoreConfig
from adapters_store.types import TARGETS, LinearShape
from server.app import create_app
from server.assembly import assemble
from server.chat import ChatTokenizer
from server.config import HttpSettings, ServeSettings, Settings
from server.deps import Services

MODEL = "tiny"
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
"""The time in every test: the ledger has a line for each day."""
Json = dict[str, Any]
T = TypeVar("T")


SHAPE = LinearShape(1, dict.fromkeys(TARGETS, 8), dict.fromkeys(TARGETS, 8))


def write_adapter(folder: Path, seed: int) -> None:
    """A rank-2 adapter of `q_proj`, in PEFT's format."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(2, 8, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(8, 2, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@functools.cache
def empty_registry() -> bytes:
    """The file of a registry in which nothing is: the steps of its schema are taken once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "registry.sqlite"
        Registry.open(f"sqlite:///{file}", lambda: 1000.0).close()
        return file.read_bytes()


def make_store(folder: Path, names: Sequence[str]) -> AdapterStore:
    """A store with public adapters of these names; everything lies in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "registry.sqlite").write_bytes(empty_registry())
    config = StoreConfig(f"sqlite:///{folder / 'registry.sqlite'}", str(folder / "blobs"), folder / "store")
    store = AdapterStore.open(SHAPE, MODEL, config, lambda: 1000.0, reserved=(MODEL,))
    for seed, name in enumerate(names):
        write_adapter(folder / "given" / name, seed)
    if names:
        wait_for(store.register_folder(folder / "given"))
    return store


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """The result of what needs an event loop, for fixtures that have none; the loop is gone afterwards."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


@functools.cache
def shared_app(serve: ServeSettings, http: HttpSettings) -> FastAPI:
    """An application without services, for all tests with these settings.

    What the framework makes of an application's routes, it makes when they are first asked for, in 0.1 seconds.
    """
    return create_app(Settings(serve=serve, http=http))


class Harness:
    """The application around a fake engine."""

    def __init__(
        self,
        store: AdapterStore,
        tokenizer: PreTrainedTokenizerFast,
        settings: Settings,
        process: Any = None,
        tracer: Any = None,
    ) -> None:
        self.engine = FakeEngine(tokenizer)
        self.store = store
        self.settings = settings
        self.services: Services = assemble(
            settings,
            MODEL,
            self.engine,
            store,
            ChatTokenizer(tokenizer),
            "f" * 64,
            process,
            tracer=tracer,
            now=lambda: NOON,
        )

    @functools.cached_property
    def app(self) -> FastAPI:
        """The application, for a server that runs its lifespan."""
        return create_app(self.settings, self.services)

    @property
    def asgi(self) -> ASGIApp:
        """The application with the state that its lifespan gives; httpx's transport runs no lifespan."""
        app = shared_app(self.settings.serve.model_copy(update={"adapter_root": ()}), self.settings.http)

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope | {"state": {"services": self.services}}, receive, send)

        return with_state

    @contextlib.asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=self.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", **options) as client:
            yield client

    def check_all_given_back(self) -> None:
        """Nothing is left of any request."""
        self.store.check_integrity()
        assert not self.services.generator.running
        assert not [name for name in self.digests if self.store.leases("default", "default", name)]
        assert self.engine.ended.keys() == {request.id for request in self.engine.requests}

    @property
    def digests(self) -> dict[str, str]:
        """Of the adapters that the built-in tenant sees, by name."""
        return {model.name: model.digest for model in self.store.registry.models("default").items}

    def endings(self) -> dict[str, float]:
        """Accounted endings by reason, over all adapters."""
        counted: dict[str, float] = {}
        for family in self.services.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == "loramux_request_success_total":
                    reason = sample.labels["finish_reason"]
                    counted[reason] = counted.get(reason, 0.0) + sample.value
        return counted


def events(text: str) -> list[Json]:
    """The JSON of every server-sent event but the closing `[DONE]`, which must be there. Comments are none."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
