"""`loramux routers` and `loramux explain` with routers inside the model."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from commands import Loramux
from fakes import Harness, write_adapter
from rich.console import Console
from test_gated_routers import make_folder
from test_prompt_routers import MOA
from test_prompt_routers import make_folder as make_prompt_folder
from world import ADMIN_KEY, files_of, form

from server.admin_tables import Printer
from server.engine.prompt_routers import Decided
from server.token_views import print_tokens


@pytest.fixture
async def harness(make_world: Callable[..., Harness]) -> AsyncIterator[Harness]:
    harness = make_world()
    yield harness
    await harness.services.routers.close()


@pytest.fixture
async def digests(live: str, tmp_path: Path) -> dict[str, str]:
    """Of two adapters that are registered."""
    digests = {}
    async with httpx.AsyncClient(base_url=live, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60) as client:
        for seed, name in enumerate(("sql", "sea")):
            write_adapter(tmp_path / name, seed)
            answer = await client.post("/admin/v1/adapters", data=form(name=name), files=files_of(tmp_path / name))
            digests[name] = answer.json()["digest"]
    return digests


@pytest.fixture
def folder(digests: dict[str, str], tmp_path: Path) -> Path:
    """A router over them that decides token by token."""
    return make_folder(tmp_path / "router", digests, has_null=True)


async def test_a_router_is_added_and_shown(loramux: Loramux, folder: Path) -> None:
    done = await loramux("routers", "add", "gate", str(folder))
    assert done.stdout.splitlines()[0] == "registered gate"
    shown = [line.split() for line in (await loramux("routers", "show", "gate")).stdout.splitlines()]
    assert ["kind", "meteora"] in shown
    assert ["adapter", "sql", "current"] in shown
    assert not [line for line in shown if line[:2] == ["min", "score"]]


async def test_an_answer_is_shown_by_adapter(loramux: Loramux, folder: Path, harness: Harness) -> None:
    await loramux("routers", "add", "gate", str(folder))
    harness.engine.say("one two three four")
    lines = (await loramux("explain", "Hi", "--router", "gate")).stdout.splitlines()
    assert lines[0].startswith("[sql]o[sea]n[base]e[sql] t")  # the tokenizer knows letters only
    cells = [line.split() for line in lines]
    assert ["adapter", "share", "tokens"] in cells
    shown = json.loads((await loramux("explain", "Hi", "--router", "gate", "--json")).stdout)
    leading = [token["adapter"] for token in shown["tokens"][0]]
    for entry in shown["adapters"]:
        assert [entry["name"], f"{entry['share']:.1%}", str(leading.count(entry["name"]))] in cells
    dry = (await loramux("explain", "Hi", "--router", "gate", "--tokens", "0")).stdout
    assert "gate, mixture" in dry


def test_colours_belong_to_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    lora = {
        "adapters": [{"name": "sql", "share": 0.2}, {"name": "sea", "share": 0.7}],
        "tokens": [
            [{"text": "ahoy", "adapter": "sea"}, {"text": " 1", "adapter": "sql"}, {"text": "!", "adapter": None}]
        ],
    }
    print_tokens(Printer(Console(force_terminal=True, color_system="standard", width=80)), lora)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "\x1b[32mahoy\x1b[0m\x1b[33m 1\x1b[0m\x1b[2m!\x1b[0m"


async def test_what_was_decided_for_a_prompt_is_shown_by_layer(
    loramux: Loramux, digests: dict[str, str], harness: Harness, tmp_path: Path
) -> None:
    moa = make_prompt_folder(tmp_path / "moa", digests, replace(MOA, num_experts=3), has_null=True)
    await loramux("routers", "add", "moa", str(moa))
    harness.engine.decided = Decided(((1,),), ((0.25, 0.625, 0.125),), 0.002)
    lines = (await loramux("explain", "Hi", "--router", "moa")).stdout.splitlines()
    cells = [line.split() for line in lines]
    assert ["sea", "1", "100.0%"] in cells
    assert ["0", "sea", "sea", "0.62", "sql", "0.25", "none", "0.12"] in cells
    shown = json.loads((await loramux("explain", "Hi", "--router", "moa", "--json")).stdout)
    assert shown["layers"][0]["chosen"] == ["sea"]
    harness.engine.decided = Decided(((2,),), ((0.25, 0.25, 0.5),), 0.0, cached=True)
    lines = (await loramux("explain", "Hi", "--router", "moa")).stdout.splitlines()
    assert lines[0] == "the base model answers: the router chose no adapter"
    assert lines[-1].endswith("remembered")
    lines = (await loramux("explain", "Hi", "--router", "moa", "--tokens", "0")).stdout.splitlines()
    assert lines[0] == "decided when the prompt is computed, among sql, sea"
