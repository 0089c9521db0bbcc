"""Token-level routers: registered, used by tenants that see some of their adapters, stale, and refused."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import SHAPE, events
from safetensors.torch import save
from world import Json, World, error_of

from adapters_store.registry import RegistryUnavailable
from adapters_store.types import TARGETS
from routing.card_adapters import CardAdapter
from routing.gate_folder import GateCard, write_gates
from server.router_folders import RouterFolders

V1 = "/admin/v1"
CARD = GateCard("f" * 64, "tiny", (), ("q_proj",), 2, 1.0, False, "")


@pytest.fixture
async def gated(world: World) -> AsyncIterator[World]:
    yield world
    await world.harness.services.routers.close()


def make_folder(folder: Path, adapters: dict[str, str], card: GateCard = CARD, **fields: Any) -> Path:
    """A router over these adapters (name to digest), with random gates."""
    card = replace(card, adapters=tuple(CardAdapter(*each) for each in adapters.items()), **fields)
    gates = {(0, target): torch.randn(card.rows, SHAPE.inputs[target]) for target in card.targets}
    write_gates(folder, card, gates)
    return folder


def router_files(folder: Path) -> dict[str, tuple[str, bytes]]:
    found = {"config": "router.json", "weights": "router.safetensors"}
    return {field: (name, (folder / name).read_bytes()) for field, name in found.items()}


async def register(world: World, folder: Path, name: str = "gate", **fields: str) -> Any:
    return await world.admin.post(f"{V1}/routers", data={"name": name, **fields}, files=router_files(folder))


async def served(world: World, **fields: Any) -> Json:
    """Adapters `sql` of a, `sea` of b and the public `shared`, and a router over them."""
    owners = {"sql": world.a, "sea": world.b, "shared": world.admin}
    digests = {}
    for seed, (name, owner) in enumerate(owners.items()):
        more = {"public": True} if name == "shared" else {}
        digests[name] = (await world.added(owner, name, seed, **more))["digest"]
    answer = await register(world, make_folder(world.folder / "router", digests, **fields))
    assert answer.status_code == 201, answer.text
    assert {each["name"]: each["digest"] for each in answer.json()["members"]} == digests
    found: Json = answer.json()
    return found


async def ask(client: Any, model: str = "auto:gate", **fields: Any) -> Any:
    body = {"model": model, "prompt": "Hi", "max_tokens": 2} | fields
    return await client.post("/v1/completions", json=body)


async def test_every_tenant_uses_the_adapters_that_it_sees(gated: World) -> None:
    router = await served(gated)
    assert (router["kind"], router["stale"], router["encoder"], router["adapters"]) == ("meteora", False, None, 3)
    digests = {each["name"]: each["digest"] for each in router["members"]}
    for client, names in ((gated.a, {"sql", "shared"}), (gated.b, {"sea", "shared"}), (gated.member, {"shared"})):
        answer = await ask(client)
        assert answer.status_code == 200, answer.text
        lora = answer.json()["lora"]
        assert (lora["router"], {each["name"] for each in lora["adapters"]}) == ("gate", names)
        request = gated.harness.engine.requests[-1]
        assert request.mix.entries == tuple(sorted((digests[name], 1.0) for name in names))
        assert request.gates is not None
        assert request.gates.rows == tuple(digests[name] if name in names else None for name in digests)
        assert (request.gates.top_k, request.gates.temperature, request.gates.null) == (2, 1.0, False)
        assert (Path(request.gates.path) / "router.safetensors").is_file()


async def test_answers_show_how_much_each_adapter_did(gated: World) -> None:
    await served(gated, has_null=True)
    answer = await ask(gated.a, max_tokens=4, lora={"explain": True, "top_k": 1, "temperature": 9.0})
    lora = answer.json()["lora"]
    assert {each["name"]: each["share"] for each in lora["adapters"]} == {"sql": 0.375, "shared": 0.1875}
    assert [each["adapter"] for each in lora["tokens"][0]] == ["sql", "shared", None, "sql"]
    assert [each["share"] for each in lora["tokens"][0]] == [0.75, 0.75, 1.0, 0.75]
    assert "".join(each["text"] for each in lora["tokens"][0]) == answer.json()["choices"][0]["text"]
    header = json.loads(answer.headers["x-loramux-route"])
    assert {"share" in each for each in header["adapters"]} == {False}
    use = gated.harness.engine.requests[-1].gates
    assert use is not None
    assert (use.top_k, use.temperature) == (1, 9.0)
    streamed = events((await ask(gated.a, max_tokens=4, stream=True)).text)
    assert [each["share"] for each in streamed[-1]["lora"]["adapters"]] == [0.375, 0.1875]
    assert "tokens" not in streamed[-1]["lora"]


async def test_candidates_narrow_the_choice(gated: World) -> None:
    await served(gated)
    answer = await ask(gated.a, lora={"candidates": ["shared"]})
    assert [each["name"] for each in answer.json()["lora"]["adapters"]] == ["shared"]
    for candidate in ("sea", "absent"):
        answer = await ask(gated.a, lora={"candidates": [candidate]})
        assert (answer.status_code, error_of(answer)["param"]) == (404, "lora.candidates.0")
    await gated.added(gated.a, "other", 5)
    lora = (await ask(gated.a, lora={"candidates": ["other"]})).json()["lora"]
    assert (lora["adapters"], lora["outcome"]) == ([], "no_candidates")
    assert gated.harness.engine.requests[-1].gates is None


async def test_a_candidate_may_name_the_weights(gated: World) -> None:
    router = await served(gated)
    old = router["members"][0]["digest"]
    new = (await gated.added(gated.a, "sql", 7, replace=True))["digest"]
    for digest, found in ((old, [old]), (new, [])):
        lora = (await ask(gated.a, lora={"candidates": [f"sql@{digest}"]})).json()["lora"]
        assert [each["digest"] for each in lora["adapters"]] == found


async def test_routers_with_equal_gates_over_other_adapters_are_told_apart(gated: World) -> None:
    members = {each["name"]: each["digest"] for each in (await served(gated))["members"]}
    turned = make_folder(gated.folder / "turned", dict(reversed(members.items())))
    data = (gated.folder / "router" / "router.safetensors").read_bytes()
    (turned / "router.safetensors").write_bytes(data)
    card = json.loads((turned / "router.json").read_text()) | {"sha256": sha256(data).hexdigest()}
    (turned / "router.json").write_text(json.dumps(card))
    assert (await register(gated, turned, "turned")).status_code == 201
    for name in ("gate", "turned"):
        assert (await ask(gated.a, f"auto:{name}")).status_code == 200
    uses = [request.gates for request in gated.harness.engine.requests[-2:]]
    assert uses[0].digest != uses[1].digest
    assert uses[0].rows == uses[1].rows[::-1]


async def test_a_replaced_router_is_there_all_the_time(gated: World, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {each["name"]: each["digest"] for each in (await served(gated))["members"]}
    service = gated.harness.services.routers
    serve, seen = service._gated.serve, []

    async def watched(*arguments: Any) -> None:
        seen.append((await ask(gated.a)).status_code)
        await serve(*arguments)

    monkeypatch.setattr(service._gated, "serve", watched)
    folder = make_folder(gated.folder / "newer", members, training={"steps": 9}, temperature=5.0)
    answer = await register(gated, folder, replace="true")
    assert (answer.status_code, answer.json()["training"]) == (201, {"steps": 9})
    assert seen == [200]
    assert (await ask(gated.a)).status_code == 200
    assert gated.harness.engine.requests[-1].gates.temperature == 5.0


async def test_another_base_model_after_a_restart(gated: World) -> None:
    await served(gated)
    service = gated.harness.services.routers
    await service.close()
    service._gated._fingerprint = "0" * 64
    await service.refresh()
    shown = (await gated.admin.get(f"{V1}/routers/gate")).json()
    assert shown["stale"] is True
    assert "another base model" in shown["problem"]
    assert (await ask(gated.a)).status_code == 400


async def test_a_registry_that_fails_undoes_no_registration(gated: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await served(gated)

    def fail(_: object) -> None:
        raise RegistryUnavailable("the database is away")

    with monkeypatch.context() as broken:
        broken.setattr(gated.harness.store.registry.routers, "meanings", fail)
        await gated.added(gated.a, "sql", 7, replace=True)
    await gated.harness.services.routers.refresh()
    assert (await gated.admin.get(f"{V1}/routers/gate")).json()["members"][0]["state"] == "replaced"


async def test_what_failed_once_is_tried_again(gated: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await served(gated)
    service = gated.harness.services.routers
    await service.close()
    with monkeypatch.context() as broken:
        broken.setattr(RouterFolders, "make", lambda *_: (_ for _ in ()).throw(OSError("the disk is away")))
        await service.refresh()
        assert (await gated.admin.get(f"{V1}/routers/gate")).json()["problem"] == "the disk is away"
    await service.refresh()
    assert (await ask(gated.a)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"), [("min_score", 0.1), ("score_mass", 0.5), ("composition", "fusion"), ("top_k", 0)]
)
async def test_options_that_mean_nothing_are_refused(gated: World, field: str, value: object) -> None:
    await served(gated)
    answer = await ask(gated.a, lora={field: value})
    assert (answer.status_code, error_of(answer)["param"]) == (400, f"lora.{field}")


async def test_a_replaced_adapter_makes_its_router_stale(gated: World) -> None:
    router = await served(gated)
    old = {each["name"]: each["digest"] for each in router["members"]}
    await gated.added(gated.a, "sql", 7, replace=True)
    shown = (await gated.admin.get(f"{V1}/routers/gate")).json()
    assert shown["stale"] is True
    assert "adapter 'sql' is replaced" in shown["problem"]
    assert [each["state"] for each in shown["members"]] == ["replaced", "current", "current"]
    # What the gates were trained for is still there as a revision of the tenant's own name.
    adapters = (await ask(gated.a)).json()["lora"]["adapters"]
    assert {each["name"]: each["digest"] for each in adapters} == {name: old[name] for name in ("sql", "shared")}
    await gated.admin.delete(f"{V1}/adapters/shared?wait=true")
    shown = (await gated.admin.get(f"{V1}/routers/gate")).json()
    assert [each["state"] for each in shown["members"]] == ["replaced", "current", "missing"]
    assert shown["adapters"] == 1
    assert [each["name"] for each in (await ask(gated.a)).json()["lora"]["adapters"]] == ["sql"]
    assert (await ask(gated.member)).json()["lora"]["outcome"] == "no_candidates"


async def test_the_dry_run_names_the_candidates(gated: World) -> None:
    await served(gated)
    shown = (await gated.a.post(f"{V1}/route", json={"prompt": "Hi", "router": "gate"})).json()
    assert (shown["router"], [each["name"] for each in shown["adapters"]]) == ("gate", ["sql", "shared"])
    assert "scores" not in shown


async def test_it_can_be_a_default_and_is_gone_when_deleted(gated: World) -> None:
    await served(gated)
    assert (await gated.admin.post(f"{V1}/routers/gate/default?tenant=a")).status_code == 200
    assert (await ask(gated.a, "auto")).json()["lora"]["router"] == "gate"
    assert (await register(gated, gated.folder / "router")).status_code == 409
    assert (await register(gated, gated.folder / "router", replace="true")).status_code == 201
    assert (await gated.admin.delete(f"{V1}/routers/gate")).status_code == 200
    assert (await ask(gated.a)).status_code in (400, 404)
    assert (await gated.admin.get(f"{V1}/routers")).json()["data"] == []


async def test_it_is_served_from_the_registry(gated: World) -> None:
    await served(gated)
    await gated.harness.services.routers.close()
    assert (await ask(gated.a)).status_code == 400
    await gated.harness.services.routers.refresh()
    assert [row["name"] for row in (await gated.admin.get(f"{V1}/routers")).json()["data"]] == ["gate"]
    assert (await ask(gated.a)).json()["lora"]["router"] == "gate"


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"base_fingerprint": "0" * 64}, "router_bad_folder", "another base model"),
        ({"targets": TARGETS[1:]}, "router_wrong_adapters", "touches q_proj"),
        ({"digest": "1" * 64}, "router_wrong_adapters", "names other weights"),
        ({"other": "2" * 64}, "router_wrong_adapters", "'other' is not registered"),
    ],
)
async def test_what_does_not_fit_is_refused(gated: World, change: dict[str, Any], code: str, words: str) -> None:
    digests = {"sql": (await gated.added(gated.a, "sql", 0))["digest"]}
    digests["sql"] = change.pop("digest", digests["sql"])
    digests |= {"other": change.pop("other")} if "other" in change else {}
    fields = {"top_k": 1} | change
    answer = await register(gated, make_folder(gated.folder / "router", digests, **fields))
    assert (answer.status_code, error_of(answer)["code"]) == (422, code)
    assert words in error_of(answer)["message"]
    assert (await gated.admin.get(f"{V1}/routers")).json()["data"] == []


@pytest.mark.parametrize("damage", ["nan", "shape", "bytes", "card"])
async def test_damaged_folders_are_refused(gated: World, damage: str) -> None:
    digest = (await gated.added(gated.a, "sql", 0))["digest"]
    folder = make_folder(gated.folder / "router", {"sql": digest}, top_k=1)
    files = router_files(folder)
    if damage in ("nan", "shape"):
        gate = torch.full((1, 8), torch.nan) if damage == "nan" else torch.zeros(1, 9)
        data = save({"model.layers.0.self_attn.q_proj.gate": gate})
        card = json.loads(files["config"][1]) | {"sha256": sha256(data).hexdigest()}
        files = {"config": ("router.json", json.dumps(card).encode()), "weights": ("router.safetensors", data)}
    elif damage == "bytes":
        files["weights"] = ("router.safetensors", files["weights"][1][:-1] + b"!")
    else:
        files["config"] = ("router.json", b'{"kind": "meteora"}')
    answer = await gated.admin.post(f"{V1}/routers", data={"name": "gate"}, files=files)
    assert (answer.status_code, error_of(answer)["code"]) == (422, "router_bad_folder")


async def test_an_unknown_kind_is_refused(gated: World) -> None:
    files = {"config": ("router.json", b'{"kind": "oracle"}'), "weights": ("router.safetensors", b"")}
    answer = await gated.admin.post(f"{V1}/routers", data={"name": "gate"}, files=files)
    assert (answer.status_code, error_of(answer)["code"]) == (422, "router_bad_folder")
    assert "field kind: expected one of retriever, meteora" in error_of(answer)["message"]


async def test_a_default_router_that_is_not_there_is_told_of_at_the_start(
    gated: World, caplog: pytest.LogCaptureFixture
) -> None:
    await served(gated)
    routers = gated.harness.services.routers
    for default, told in (("gate", 0), ("retriever", 0), ("gaet", 1)):
        caplog.clear()
        routers._routers.default = default
        await routers.start()
        assert caplog.text.count(f"there is no router {default!r}") == told
