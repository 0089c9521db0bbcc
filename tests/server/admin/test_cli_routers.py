"""`loramux routers` and `loramux explain`, against the application behind a real socket."""

import asyncio
import json
import tarfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from commands import Loramux, line_of
from fakes import Harness
from typer.testing import CliRunner
from word_encoder import WordEncoder
from world import ADMIN_KEY, files_of, form

from routing.router_folder import RouterCard, write_router
from server import cli

SQL = ["how many orders were placed in may", "list all customers of berlin"]
PIRATE = ["talk like a pirate", "say ahoy like a pirate"]
runner = CliRunner()


class Trainable(WordEncoder):
    """Every change of it turns the vectors around, which leaves similarities alone."""

    def __init__(self, folder: Path, id: str = WordEncoder.id) -> None:
        super().__init__(folder)
        self.id = id

    def encoder(self, change: Path | None = None) -> WordEncoder:
        return self if change is None else Reversed(self.folder, "fedcba9876543210")


class Reversed(Trainable):
    async def embed(self, texts: Sequence[str], *, tenant: str = "", bulk: bool = False) -> np.ndarray:
        await asyncio.sleep(0.2)  # as one that has to compute: who registers it finds its adapters all the same
        return -(await super().embed(texts, tenant=tenant, bulk=bulk))


@pytest.fixture
async def harness(
    make_world: Callable[..., Harness], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Harness]:
    monkeypatch.setattr("server.routers.encoder_id", lambda *_: "fedcba9876543210")
    harness = make_world(process=Trainable(tmp_path))
    await harness.services.routers.start()
    yield harness
    await harness.services.routers.close()


@pytest.fixture
async def adapters(live: str, tmp_path: Path) -> None:
    from fakes import write_adapter

    write_adapter(tmp_path / "made", 0)
    async with httpx.AsyncClient(base_url=live, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60) as client:
        for name, samples in (("sql", SQL), ("sea", PIRATE)):
            data = form(name=name, samples=samples)
            answer = await client.post("/admin/v1/adapters", data=data, files=files_of(tmp_path / "made"))
            assert answer.status_code == 201, answer.text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trained router's, as training writes it."""
    card = RouterCard(
        base_id="0123456789abcdef",
        base_name="words",
        mode="head",
        prefix="",
        width=2,
        sha256="",
        min_score=0.25,
        training={"tasks": ["sql", "sea"], "steps": 7},
    )
    write_router(tmp_path / "router", card, {"head": torch.eye(2)})
    return tmp_path / "router"


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


async def test_a_router_from_its_folder_to_its_end(loramux: Loramux, adapters: None, folder: Path) -> None:  # noqa: ARG001
    (_, built_in) = cells((await loramux("routers", "list")).stdout)
    assert built_in[:2] == ["retriever", "retriever"]
    assert built_in[2:5] == ["2", "0.300", "serving"]

    done = await loramux("routers", "add", "support", str(folder))
    assert done.stderr == ""
    shown = done.stdout.splitlines()
    assert shown[0] == "registered support"
    assert ["min", "score", "0.250"] in cells(done.stdout)
    assert "2 can be chosen" in done.stdout
    assert "retriever, trained head" in shown[2]
    shown = (await loramux("routers", "show", "support")).stdout
    assert "training tasks  sql, sea" in shown
    assert "training steps  7" in shown
    listed = {line[0] for line in cells((await loramux("routers", "list")).stdout)[1:]}
    assert listed == {"retriever", "support"}
    found = json.loads((await loramux("routers", "list", "--json")).stdout)["data"]
    assert [router["name"] for router in found] == ["retriever", "support"]

    assert (await loramux("routers", "default", "support")).stdout == "default: auto means support\n"
    assert json.loads((await loramux("tenants", "show", "default", "--json")).stdout)["default_router"] == "support"
    await loramux("tenants", "add", "acme")
    line = (await loramux("routers", "default", "retriever", "--tenant", "acme")).stdout
    assert line == "acme: auto means retriever\n"

    assert (await loramux("routers", "rm", "support")).stdout == "support: deleted\n"
    assert "(router_not_found)" in line_of(await loramux("routers", "show", "support", code=1))
    assert json.loads((await loramux("tenants", "show", "default", "--json")).stdout)["default_router"] is None


async def test_tenants_of_a_router_that_is_gone_get_the_servers_default(
    loramux: Loramux,
    adapters: None,  # noqa: ARG001
    folder: Path,
    harness: Harness,
    live: str,
) -> None:
    await loramux("routers", "add", "support", str(folder))
    await loramux("routers", "default", "support")
    await harness.services.accounts.refresh()  # as it does twice a second
    asked = {"model": "auto", "prompt": SQL[0]}
    async with httpx.AsyncClient(base_url=live, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60) as client:
        assert (await client.post("/v1/completions", json=asked)).json()["lora"]["router"] == "support"
        await loramux("routers", "rm", "support")
        assert (await client.post("/v1/completions", json=asked)).json()["lora"]["router"] == "retriever"


async def test_replacing_and_archives(loramux: Loramux, folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "support.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname="support")
    first = json.loads((await loramux("routers", "add", "support", str(archive), "--json")).stdout)
    assert (first["name"], first["mode"], first["stale"]) == ("support", "head", False)
    assert "(router_exists)" in line_of(await loramux("routers", "add", "support", str(folder), code=1))
    await loramux("routers", "add", "support", str(folder), "--replace")


async def test_what_would_be_chosen(loramux: Loramux, adapters: None) -> None:  # noqa: ARG001
    done = await loramux("explain", "list customers of hamburg")
    table = cells(done.stdout)
    assert table[0] == ["rank", "adapter", "score", "weight"]
    (first, second) = table[1:3]
    assert (first[:2], first[3]) == (["1", "sql"], "1")
    assert 0.3 < float(first[2]) < 1
    assert (second[:2], len(second)) == (["2", "sea"], 3)
    assert done.stdout.splitlines()[-1].startswith("retriever, mixture, ")

    table = cells((await loramux("explain", "list all customers like a pirate", "--top-k", "1")).stdout)
    assert [len(row) for row in table[1:3]] == [4, 3]
    table = cells((await loramux("explain", "list all customers like a pirate", "--candidate", "sea")).stdout)
    assert [row[1] for row in table[1:-1]] == ["sea"]

    done = await loramux("explain", "list customers of hamburg", "--limit", "1")
    assert "and 1 more, shown by --limit 2" in done.stdout
    found = json.loads((await loramux("explain", "list customers of hamburg", "--json")).stdout)
    assert [entry["name"] for entry in found["scores"]] == ["sql", "sea"]


@pytest.mark.parametrize(
    ("prompt", "reason"), [("zebra", "no adapter is similar enough to the prompt"), (" ", "the prompt is empty")]
)
async def test_why_the_base_model_answers(
    loramux: Loramux,
    adapters: None,  # noqa: ARG001
    prompt: str,
    reason: str,
) -> None:
    assert f"the base model answers: {reason}\n" in (await loramux("explain", prompt)).stdout


async def test_another_tenants_view(loramux: Loramux, adapters: None) -> None:  # noqa: ARG001
    await loramux("tenants", "add", "acme")
    done = await loramux("explain", SQL[0], "--tenant", "acme")
    assert done.stdout.splitlines()[0] == "the base model answers: there is no adapter to choose from"
    key = (await loramux("keys", "add", "acme")).stdout.strip()
    assert (await loramux("explain", SQL[0], key=key)).stdout.startswith("the base model answers")
    assert "(forbidden)" in line_of(await loramux("explain", SQL[0], "--tenant", "default", key=key, code=1))
    assert "(forbidden)" in line_of(await loramux("routers", "list", key=key, code=1))


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["routers", "show", "nobody"], 1, "(router_not_found)"),
        (["routers", "show", "a/b"], 2, "is no name"),
        (["routers", "add", "x", "/nowhere/at/all"], 2, "does not exist: expected the folder of a trained router"),
        (["routers", "add", "x", "."], 1, "has no router.json and no router.safetensors"),
        (["routers", "add", "x", "ftp://nowhere"], 1, "source"),
        (["routers", "rm", "retriever"], 1, "(invalid_name)"),
        (["routers", "default", "nobody"], 1, "(router_not_found)"),
        (["routers", "default", "retriever", "--tenant", "nobody"], 1, "(tenant_not_found)"),
        (["explain", "hello", "--router", "nobody"], 1, "(router_not_found)"),
        (["explain", "hello", "--candidate", "nobody"], 1, "(model_not_found)"),
        (["explain", "hello", "--top-k", "0"], 1, "top_k"),
    ],
)
async def test_failures_are_one_line(loramux: Loramux, arguments: list[str], code: int, part: str) -> None:
    assert part in line_of(await loramux(*arguments, code=code))


@pytest.mark.parametrize("arguments", [["routers"], ["routers", "add", "x"], ["explain"], ["explain", "a", "--top-k"]])
def test_wrong_usage(arguments: list[str]) -> None:
    assert runner.invoke(cli.app, arguments).exit_code == 2
