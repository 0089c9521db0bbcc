"""Prompt-level routers: registered, used by tenants that see some of their adapters, told, stale, and refused."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import SHAPE, events
from safetensors.torch import load_file, save_file
from test_gated_routers import ask, register
from world import Json, World, error_of

from adapters_store.types import BASE, TARGETS
from routing.card_adapters import CardAdapter
from routing.card_file import file_sha256
from routing.prompt_folder import PromptCard, write_prompt_router
from routing.prompt_router import LayerRouter, RouterForm
from server.cache_key import cache_key
from server.engine.config import RequestError
from server.engine.prompt_routers import Decided

V1 = "/admin/v1"
MOA = RouterForm("adapters", SHAPE.num_layers, 3, 1, "mean", "none", "rms", "vote")
MODULES = RouterForm("modules", SHAPE.num_layers, len(TARGETS), 3, "last", "none", "rms", "layer")


@pytest.fixture
async def routed(world: World) -> AsyncIterator[World]:
    yield world
    await world.harness.services.routers.close()


def make_folder(folder: Path, adapters: dict[str, str], form: RouterForm = MOA, **fields: Any) -> Path:
    """A router over these adapters (name to digest), with random weights."""
    layers = tuple(LayerRouter(torch.randn(form.num_experts, SHAPE.inputs["q_proj"])) for _ in range(form.num_layers))
    members = tuple(CardAdapter(*each) for each in adapters.items())
    card = PromptCard("milora" if form.layered else "moa", "f" * 64, "tiny", members, form, False, "")
    write_prompt_router(folder, replace(card, **fields), layers)
    return folder


async def added(world: World) -> dict[str, str]:
    """Adapters `sql` of a, `sea` of b and the public `shared`, by name their digests."""
    owners = {"sql": world.a, "sea": world.b, "shared": world.admin}
    digests = {}
    for seed, (name, owner) in enumerate(owners.items()):
        more = {"public": True} if name == "shared" else {}
        digests[name] = (await world.added(owner, name, seed, **more))["digest"]
    return digests


async def served(world: World, form: RouterForm = MOA, **fields: Any) -> Json:
    """A router `gate` over all three adapters or, of linears, over `shared` alone."""
    digests = await added(world)
    if form.experts == "modules":
        digests = {"shared": digests["shared"]}
    answer = await register(world, make_folder(world.folder / "router", digests, form, **fields))
    assert answer.status_code == 201, answer.text
    found: Json = answer.json()
    return found


async def test_every_tenant_offers_the_adapters_that_it_sees(routed: World) -> None:
    router = await served(routed)
    assert (router["kind"], router["stale"], router["encoder"], router["adapters"]) == ("moa", False, None, 3)
    digests = {each["name"]: each["digest"] for each in router["members"]}
    keys = set()
    for client, names in ((routed.a, {"sql", "shared"}), (routed.b, {"sea", "shared"}), (routed.member, {"shared"})):
        routed.harness.engine.decided = Decided(((2,),), ((0.0, 0.0, 1.0),), 0.5)
        assert (await ask(client)).status_code == 200
        request = routed.harness.engine.requests[-1]
        assert request.mix.entries == tuple(sorted((digests[name], 1.0) for name in names))
        assert set(request.paths) == {digests[name] for name in names}
        use = request.prompt_router
        assert use is not None
        assert use.rows == tuple(digests[name] if name in names else None for name in digests)
        assert (use.layered, use.top_k, request.gates) == (False, 1, None)
        assert (Path(use.path) / "router.safetensors").is_file()
        keys.add(request.cache_key)
    assert len(keys) == 3, "tenants share nothing"


async def test_the_engine_gets_the_key_of_the_base_model(routed: World) -> None:
    await served(routed)
    routed.harness.engine.decided = Decided(((2,),), ((0.0, 0.0, 1.0),), 0.0)
    await ask(routed.a)
    await ask(routed.a, model=routed.harness.services.served_name)
    routed_key, base_key = (request.cache_key for request in routed.harness.engine.requests[-2:])
    assert routed_key == base_key
    assert routed_key != cache_key("f" * 64, BASE, b"")


async def test_answers_and_headers_tell_what_was_chosen(routed: World) -> None:
    await served(routed)
    routed.harness.engine.decided = Decided(((0,),), ((0.75, 0.0, 0.25),), 0.5)
    answer = await ask(routed.a, lora={"explain": True})
    lora = answer.json()["lora"]
    assert [(each["name"], each["weight"], each["share"]) for each in lora["adapters"]] == [("sql", 1.0, 1.0)]
    assert (lora["router"], lora["cached"], "outcome" in lora) == ("gate", False, False)
    assert lora["route_ms"] >= 500
    probabilities = [{"name": "sql", "probability": 0.75}, {"name": "shared", "probability": 0.25}]
    assert lora["layers"] == [{"chosen": ["sql"], "probabilities": probabilities}], "what a sees not has no name"
    header = json.loads(answer.headers["x-loramux-route"])
    assert header == {name: value for name, value in lora.items() if name not in ("layers", "scores")}
    streamed = await ask(routed.a, stream=True)
    assert json.loads(streamed.headers["x-loramux-route"])["adapters"] == header["adapters"]
    last = events(streamed.text)[-1]["lora"]
    assert last["adapters"] == header["adapters"]
    assert "layers" not in last


async def test_what_was_decided_before_says_so(routed: World) -> None:
    await served(routed)
    routed.harness.engine.decided = Decided(((2,),), ((0.25, 0.0, 0.75),), 0.0, cached=True)
    lora = (await ask(routed.a)).json()["lora"]
    assert (lora["cached"], [each["name"] for each in lora["adapters"]]) == (True, ["shared"])


async def test_a_router_may_choose_nobody(routed: World) -> None:
    await served(routed, replace(MOA, num_experts=4), has_null=True)
    routed.harness.engine.decided = Decided(((3,),), ((0.1, 0.0, 0.2, 0.7),), 0.0)
    lora = (await ask(routed.a, lora={"explain": True})).json()["lora"]
    assert (lora["adapters"], lora["outcome"], lora["layers"][0]["chosen"]) == ([], "no_adapter", [None])
    assert lora["layers"][0]["probabilities"][-1] == {"name": None, "probability": 0.7}


async def test_linears_of_one_adapter(routed: World) -> None:
    router = await served(routed, MODULES)
    assert router["kind"] == "milora"
    routed.harness.engine.decided = Decided(((0, 2, 6),), ((0.3, 0.0, 0.3, 0.0, 0.0, 0.0, 0.4),), 0.0)
    lora = (await ask(routed.a, lora={"explain": True, "top_k": 4})).json()["lora"]
    (entry,) = lora["adapters"]
    assert (entry["name"], entry["weight"]) == ("shared", 1.0)
    assert entry["share"] == pytest.approx(3 / 7)
    assert lora["layers"][0]["chosen"] == ["q_proj", "v_proj", "down_proj"]
    use = routed.harness.engine.requests[-1].prompt_router
    assert use is not None
    assert (use.layered, use.top_k, len(use.rows)) == (True, 4, 1)
    assert "warnings" not in lora


async def test_an_adapter_without_the_router_it_was_trained_with(routed: World) -> None:
    await served(routed, MODULES)
    answer = await ask(routed.a, model="shared")
    (warning,) = answer.json()["lora"]["warnings"]
    assert "'shared' was trained together with router 'gate'" in warning
    assert json.loads(answer.headers["x-loramux-route"])["warnings"] == [warning]
    assert "warnings" not in (await ask(routed.a, model="sql")).json()["lora"]
    await routed.admin.delete(f"{V1}/routers/gate")
    assert "warnings" not in (await ask(routed.a, model="shared")).json()["lora"]


async def test_candidates_narrow_the_choice(routed: World) -> None:
    router = await served(routed)
    digests = {each["name"]: each["digest"] for each in router["members"]}
    routed.harness.engine.decided = Decided(((2,),), ((0.0, 0.0, 1.0),), 0.0)
    await ask(routed.a, lora={"candidates": ["shared"]})
    assert routed.harness.engine.requests[-1].mix.digests == (digests["shared"],)
    await routed.added(routed.a, "other", 5)
    lora = (await ask(routed.a, lora={"candidates": ["other"]})).json()["lora"]
    assert (lora["adapters"], lora["outcome"]) == ([], "no_candidates")
    assert routed.harness.engine.requests[-1].prompt_router is None
    answer = await ask(routed.a, lora={"candidates": ["sea"]})
    assert (answer.status_code, error_of(answer)["param"]) == (404, "lora.candidates.0")


@pytest.mark.parametrize(
    ("lora", "param"),
    [
        ({"temperature": 2.0}, "lora.temperature"),
        ({"score_mass": 0.5}, "lora.score_mass"),
        ({"min_score": 0.5}, "lora.min_score"),
        ({"composition": "fusion"}, "lora.composition"),
    ],
)
async def test_options_that_do_not_apply_are_refused(routed: World, lora: Json, param: str) -> None:
    await served(routed)
    answer = await ask(routed.a, lora=lora)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


async def test_a_replaced_adapter_makes_the_router_stale(routed: World) -> None:
    router = await served(routed)
    await routed.added(routed.a, "sql", 9, replace=True)
    shown = (await routed.admin.get(f"{V1}/routers/gate")).json()
    assert (shown["stale"], shown["adapters"]) == (True, 2)
    assert "adapter 'sql' is replaced" in shown["problem"]
    routed.harness.engine.decided = Decided(((2,),), ((0.0, 0.0, 1.0),), 0.0)
    await ask(routed.a)
    rows = routed.harness.engine.requests[-1].prompt_router.rows
    assert rows[0] == router["members"][0]["digest"], "its own earlier revision still counts"
    await routed.admin.delete(f"{V1}/adapters/shared?wait=true")
    shown = (await routed.admin.get(f"{V1}/routers/gate")).json()
    assert [each["state"] for each in shown["members"]] == ["replaced", "current", "missing"]
    assert (await ask(routed.member)).json()["lora"]["outcome"] == "no_candidates"
    assert routed.harness.engine.requests[-1].prompt_router is None


async def test_linears_of_an_adapter_that_the_tenant_may_not_use_are_nobodys_choice(routed: World) -> None:
    digests = await added(routed)
    folder = make_folder(routed.folder / "router", {"sql": digests["sql"]}, MODULES)
    assert (await register(routed, folder)).status_code == 201
    answer = await ask(routed.b)
    assert answer.status_code == 200
    lora = answer.json()["lora"]
    assert (lora["adapters"], lora["outcome"]) == ([], "no_candidates")
    assert "sql" not in answer.text + answer.headers["x-loramux-route"]
    assert routed.harness.engine.requests[-1].prompt_router is None


def _damaged(folder: Path, change: str) -> None:
    card = json.loads((folder / "router.json").read_text())
    tensors = load_file(folder / "router.safetensors")
    if change == "base":
        card["base"]["fingerprint"] = "e" * 64
    elif change == "nan":
        tensors["layers.0.w"][0, 0] = torch.nan
    elif change == "shape":
        tensors["layers.0.w"] = tensors["layers.0.w"][:, :-1].contiguous()
    elif change == "layers":
        card["layers"] = 2
    save_file(tensors, folder / "router.safetensors")
    card["sha256"] = file_sha256(folder / "router.safetensors")
    (folder / "router.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ("base", "router_bad_folder", "another base model"),
        ("nan", "router_bad_folder", "finite"),
        ("shape", "router_bad_folder", "shape"),
        ("layers", "router_bad_folder", "layers"),
        ("missing", "router_wrong_adapters", "adapter 'gone' is not registered"),
        ("changed", "router_wrong_adapters", "adapter 'sql' names other weights"),
    ],
)
async def test_what_cannot_be_served_is_refused_with_the_reason(
    routed: World, change: str, code: str, reason: str
) -> None:
    digests = await added(routed)
    if change == "missing":
        digests = {"gone" if name == "sea" else name: digest for name, digest in digests.items()}
    elif change == "changed":
        digests["sql"] = "a" * 64
    folder = make_folder(routed.folder / "router", digests)
    _damaged(folder, change)
    answer = await register(routed, folder)
    assert (answer.status_code, error_of(answer)["code"]) == (422, code), answer.text
    assert reason in error_of(answer)["message"]
    assert error_of(await ask(routed.a))["code"] == "no_router"


async def test_what_the_engine_refuses_reaches_the_client(routed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await served(routed, MODULES)

    def refuse(*_: Any) -> Any:
        raise RequestError("the prompt has 9000 tokens", param="prompt", code="prompt_too_long")

    monkeypatch.setattr(routed.harness.engine, "submit", refuse)
    answer = await ask(routed.a)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "prompt_too_long")
