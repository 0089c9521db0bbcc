"""A tiny model's shape and PEFT folders that fit it; registries in SQLite and in a real PostgreSQL."""

import hashlib
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy import Engine, event
from torch import Tensor

from adapters_store.registry import DEFAULT_TENANT, Database, Registry, TenantRow, open_engine
from adapters_store.registry.schema import metadata
from adapters_store.store import AdapterStore
from adapters_store.store_config import StoreConfig
from adapters_store.types import LinearShape
from loadtests.postgres import MISSING, find_binaries, running_server
from tests.adapters_store.registered import MakeUrl, forget_syncing
from tests.adapters_store.s3_server import make_bucket
from tests.adapters_store.s3_server import running_server as s3_running
from tests.adapters_store.stores import Stores

Writer = Callable[..., Path]


def empty(engine: Engine) -> None:
    """Delete all rows of a registry."""
    with engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())


@pytest.fixture
def shape() -> LinearShape:
    """Two layers: 16 hidden, 8 key/value, 24 feed-forward features."""
    inputs = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 16) | {"down_proj": 24}
    outputs = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16, "gate_proj": 24, "up_proj": 24, "down_proj": 16}
    return LinearShape(2, inputs, outputs)


@pytest.fixture
def config() -> dict[str, Any]:
    """The config of a rank-4 adapter on q_proj and down_proj."""
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"}


@pytest.fixture
def tensors(shape: LinearShape) -> dict[str, torch.Tensor]:
    """The tensors that go with `config`, under PEFT's names."""
    generator = torch.Generator().manual_seed(0)
    result: dict[str, torch.Tensor] = {}
    for layer in range(shape.num_layers):
        for block, target in (("self_attn", "q_proj"), ("mlp", "down_proj")):
            prefix = f"base_model.model.model.layers.{layer}.{block}.{target}"
            result[f"{prefix}.lora_A.weight"] = torch.randn(4, shape.inputs[target], generator=generator)
            result[f"{prefix}.lora_B.weight"] = torch.randn(shape.outputs[target], 4, generator=generator)
    return result


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes a folder of the given name with this config and these tensors, and returns it."""

    def write_folder(config: dict[str, Any], tensors: dict[str, torch.Tensor], name: str = "adapter") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return write_folder


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(MISSING)
    with running_server(binaries) as url:
        Registry.open(f"{url}/template1", lambda: 0.0).close()
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registry") / "template.db"
    Registry.open(f"sqlite:///{path}", lambda: 0.0).close()
    return path


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    with s3_running() as url:
        yield url


@pytest.fixture(params=["sqlite-local", "postgresql-s3"])
def store_config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreConfig:
    """An empty store's: all on one disk, or a database server and an object store."""
    if request.param == "sqlite-local":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "registry.db")
        return StoreConfig(f"sqlite:///{tmp_path / 'registry.db'}", str(tmp_path / "blobs"), tmp_path / "store")
    database: str = request.getfixturevalue("postgres")
    objects: str = request.getfixturevalue("s3_server")
    empty(request.getfixturevalue("postgresql_engine"))
    bucket = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    make_bucket(objects, bucket, monkeypatch)
    blobs = f"s3://{bucket}/adapters?endpoint={objects}&region=eu-west-1"
    return StoreConfig(f"{database}/shared", blobs, tmp_path / "store")


@pytest.fixture
async def stores(
    store_config: StoreConfig, shape: LinearShape, write: Writer, config: dict[str, Any], tensors: dict[str, Tensor]
) -> AsyncIterator[Stores]:
    stores = Stores(store_config, shape, lambda alpha, name: write(config | {"lora_alpha": alpha}, tensors, name))
    yield stores
    await stores.close()


@pytest.fixture
def store(stores: Stores) -> AdapterStore:
    return stores.open()


@pytest.fixture(params=["sqlite", "postgresql"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """`make_url()` is a database with the current schema, `make_url(empty=True)` one with nothing."""
    counter = itertools.count()
    if request.param == "sqlite":
        template = request.getfixturevalue("sqlite_template")

        def make_sqlite(empty: bool = False) -> str:
            path = tmp_path / f"{next(counter)}.db"
            if not empty:
                shutil.copy(template, path)
            return f"sqlite:///{path}"

        return make_sqlite
    server: str = request.getfixturevalue("postgres")

    def make_postgres(empty: bool = False) -> str:
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            name = f"test_{connection.execute('SELECT count(*) FROM pg_database').fetchone()[0]}"  # type: ignore[index]
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {'template0' if empty else 'template1'}".encode())
        return f"{server}/{name}"

    return make_postgres


@pytest.fixture(scope="session")
def sqlite_engine(sqlite_template: Path) -> Iterator[Engine]:
    """One database for all tests that leave only rows behind: a new engine compiles all its statements again."""
    path = sqlite_template.with_name("shared.db")
    shutil.copy(sqlite_template, path)
    engine = open_engine(f"sqlite:///{path}")
    event.listen(engine, "connect", forget_syncing)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def postgresql_engine(postgres: str) -> Iterator[Engine]:
    """As `sqlite_engine`, and for stores: 80 databases of 8 MB each are more than disks take as fast as they come."""
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE shared TEMPLATE template1")
    engine = open_engine(f"{postgres}/shared")
    yield engine
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def registry(request: pytest.FixtureRequest) -> Registry:
    """Tenants `default`, `acme` and `umbrella`; the clock ticks once a reading, from 100 on."""
    engine: Engine = request.getfixturevalue(f"{request.param}_engine")
    empty(engine)
    ticks = itertools.count(100)
    registry = Registry(Database(engine, lambda: float(next(ticks))))
    for tenant in (DEFAULT_TENANT, "acme", "umbrella"):
        registry.accounts.add(TenantRow(tenant))
    return registry
