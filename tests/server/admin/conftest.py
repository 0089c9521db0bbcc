"""A server with tenants, over httpx and a fake engine."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Loramux, commands
from fakes import Harness, make_store
from transformers import PreTrainedTokenizerFast
from word_encoder import WordEncoder
from world import ADMIN_KEY, MEMBER_KEY, World, open_world

from server.config import LimitSettings, ServeSettings, Settings, SourceSettings


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """The folder from which the server may read adapters."""
    folder = tmp_path / "roots"
    folder.mkdir()
    return folder


@pytest.fixture
async def make_world(
    tmp_path: Path, roots: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Harness]]:
    """`make_world(**limits)`: the harness of a server of its own, closed after the test. Readers of use do not wait."""
    monkeypatch.setattr("server.usage.READ_SECONDS", 0.0)
    made: list[Harness] = []

    def make(sources: dict[str, Any] | None = None, process: Any = None, **limits: Any) -> Harness:
        settings = Settings(
            serve=ServeSettings(admin_key=ADMIN_KEY, api_key=(MEMBER_KEY,), adapter_root=(roots,)),
            limits=LimitSettings(**limits),
            sources=SourceSettings(**(sources or {})),
            data_dir=tmp_path / "data",
        )
        made.append(Harness(make_store(tmp_path, []), tokenizer, settings, process))
        return made[-1]

    yield make
    for harness in made:
        await harness.services.catalog.close()
        harness.check_all_given_back()
        await harness.services.usage.close()
        harness.services.accounts.close()
        await harness.store.close()


@pytest.fixture
async def world(make_world: Callable[..., Harness], tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(make_world(), tmp_path) as world:
        yield world


@pytest.fixture
async def routed(make_world: Callable[..., Harness], tmp_path: Path) -> AsyncIterator[World]:
    """The same with a router."""
    harness = make_world(process=WordEncoder(tmp_path))
    await harness.services.routers.start()
    async with open_world(harness, tmp_path) as world:
        yield world
    await harness.services.routers.close()


@pytest.fixture
def loramux(live: str) -> Loramux:
    """The command line, as the administrator of the application on a socket calls it."""
    return commands(live, ADMIN_KEY)


@pytest.fixture
def world_paths(world: World) -> list[tuple[str, str]]:
    """(method, path) of every endpoint, as documented."""
    paths = world.harness.app.openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]
