"""The server of server/bench_burst.py: everything real but the engine, and a stopwatch at every seam."""

import asyncio
import json
import os
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters_store.intake import NewAdapter
from adapters_store.leases import StoreLease
from adapters_store.peft_write import write_peft
from adapters_store.registry import Resolved
from adapters_store.store import AdapterStore, StoreConfig
from adapters_store.types import TARGETS, AdapterWeights, LinearShape, LoraPair
from routing.encoder import EncoderProcess, ServedEncoder
from server.app import create_app
from server.assembly import assemble
from server.bench_burst_encoder import NOTES, PASS_MS
from server.bench_front import PacedClient
from server.chat import ChatTokenizer
from server.config import RoutingSettings, ServeSettings, Settings
from server.engine.sequence import Output, Request
from server.serve import Server, run, uvicorn_config

MODEL = "measured"
SHAPE = LinearShape(1, dict.fromkeys(TARGETS, 8), dict.fromkeys(TARGETS, 8))
RATE = 1e6
LOADERS = {
    "table": "server.bench_burst_encoder:TableModel.load",
    "encoder": "server.bench_burst_encoder:NotedModel.load",
}

_Stamps = dict[str, Any]
_stamps: ContextVar[_Stamps] = ContextVar("stamps")


def stamp(name: str) -> None:
    """Note the time under a name, of the request whose context this is; the first time counts."""
    if (stamps := _stamps.get(None)) is not None:
        stamps.setdefault(name, time.perf_counter())


class StampedTokenizer(ChatTokenizer):
    async def encode_chat(self, messages: Any, *arguments: Any, **named: Any) -> list[int]:
        stamp("reading")
        if (stamps := _stamps.get(None)) is not None:
            stamps["text"] = messages[-1]["content"]
        try:
            return await super().encode_chat(messages, *arguments, **named)
        finally:
            stamp("read")


class StampedEncoder(EncoderProcess):
    async def embed(
        self, encoder: ServedEncoder, texts: Sequence[str], *, tenant: str = "", bulk: bool = False
    ) -> np.ndarray:
        stamp("asked")
        try:
            return await super().embed(encoder, texts, tenant=tenant, bulk=bulk)
        finally:
            stamp("embedded")


class StampedStore(AdapterStore):
    async def resolve(self, tenant: str, names: Sequence[str]) -> Mapping[str, Resolved]:
        stamp("naming")
        try:
            return await super().resolve(tenant, names)
        finally:
            stamp("named")

    async def lease(self, tenant: str, adapters: Sequence[Resolved], *, fetch: bool = True) -> StoreLease:
        try:
            return await super().lease(tenant, adapters, fetch=fetch)
        finally:
            stamp("leased")


class StampedEngine(PacedClient):
    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        stamp("submitted")
        async for output in super().submit(request):
            yield output


@dataclass(frozen=True)
class Setup:
    """What the server's process is started with. `forward` is `table` or `encoder`."""

    model: Path
    encoder: Path
    device: str
    forward: str
    pass_ms: float
    descriptions: tuple[str, ...]
    notes: Path
    stamps: Path


def serve(listener: socket.socket, setup: Setup, ready: Callable[[], object], stopped: Callable[[float], bool]) -> None:
    """The server's process. Its last act is to write the requests' stamps.

    `stopped` waits for so many seconds at most; the process does not outlive the one that started it.
    """
    os.environ[NOTES], os.environ[PASS_MS] = str(setup.notes), str(setup.pass_ms)
    parent = os.getppid()

    def stop() -> None:
        while not stopped(1.0) and os.getppid() == parent:
            pass

    run(_serve(listener, setup, ready, stop))


async def _serve(
    listener: socket.socket, setup: Setup, ready: Callable[[], object], stop: Callable[[], object]
) -> None:
    tokenizer = StampedTokenizer.from_folder(setup.model)
    process = StampedEncoder(setup.encoder, device=setup.device, cache_texts=0, loader=LOADERS[setup.forward])
    engine = StampedEngine(setup.model, RATE, [1])
    requests: list[_Stamps] = []

    def begin() -> str:
        stamps: _Stamps = {}
        _stamps.set(stamps)
        requests.append(stamps)
        stamp("arrived")
        return f"request-{len(requests)}"

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        settings = Settings(
            serve=ServeSettings(host="127.0.0.1"), routing=RoutingSettings(min_score=-1.0), data_dir=data / "data"
        )
        config = StoreConfig(f"sqlite:///{data}/registry.sqlite", f"{data}/blobs", data / "store")
        store = await asyncio.to_thread(StampedStore.open, SHAPE, MODEL, config, time.time, (MODEL,))
        await _register(store, data, setup.descriptions)
        services = assemble(settings, MODEL, engine, store, tokenizer, "0" * 64, process)
        services.generator.new_id = begin
        await services.routers.start()
        await engine.start()
        await services.routers.ready(600)

        def announce(_: str) -> None:
            ready()

        server = Server(uvicorn_config(create_app(settings, services), settings.http), services, 1.0, announce)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.to_thread(stop)
        server.should_exit = True
        await serving
        await engine.stop()
        await services.routers.close()
        await store.close()
    setup.stamps.write_text(json.dumps(requests), encoding="utf-8")


async def _register(store: AdapterStore, data: Path, descriptions: Sequence[str]) -> None:
    """An adapter of a few bytes for each description, public."""
    for number, description in enumerate(descriptions):
        pair = LoraPair(torch.full((1, 8), 1.0 + number), torch.ones(8, 1), 1.0)
        folder = data / f"adapter-{number}"
        write_peft(folder, AdapterWeights("", {(0, "q_proj"): pair}))
        await store.register(folder, NewAdapter(name_of(number), public=True, description=description))


def name_of(number: int) -> str:
    """An adapter's name."""
    return f"adapter-{number:04d}"
