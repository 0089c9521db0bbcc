"""/admin/v1/merges: a new adapter of several."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from world import WEIGHTS, World, error_of

from adapters_store.merging import MergeMethod

URL = "/admin/v1/merges"
BOTH = [{"name": "one", "weight": 0.5}, {"name": "two", "weight": -2.0}]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def product(folder: Path) -> torch.Tensor:
    """scale * B A of the only linear."""
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"] * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]


async def test_a_concatenation_is_the_weighted_sum(world: World) -> None:
    one, two = (await world.added(world.a, "one", 0)), (await world.added(world.a, "two", 1))
    body = {"name": "both", "adapters": BOTH, "method": "cat", "tags": ["merged"]}
    response = await world.a.post(URL, json=body)
    assert response.status_code == 201, response.text
    answer = response.json()
    assert (answer["tenant"], answer["public"], answer["rank"], answer["tags"]) == ("a", False, 4, ["merged"])
    assert answer["modules_touched"] == ["layers.0.self_attn.q_proj"]
    assert answer["recipe"] == {
        "method": "cat",
        "adapters": [
            {"name": "one", "digest": one["digest"], "weight": 0.5},
            {"name": "two", "digest": two["digest"], "weight": -2.0},
        ],
        "rank": None,
        "density": None,
        "seed": None,
    }
    assert (await world.a.get("/admin/v1/adapters/both")).json()["recipe"] == answer["recipe"]
    store = world.harness.store
    lease = await store.lease("a", tuple((await store.resolve("a", ["both"])).values()))
    (path,) = lease.paths.values()
    expected = 0.5 * product(world.make(0)) - 2.0 * product(world.make(1))
    torch.testing.assert_close(product(Path(path)), expected)
    store.release(lease)
    assert (await world.use(world.a, "both")).status_code == 200
    assert (await world.use(world.b, "both")).status_code == 404


async def test_every_method(world: World) -> None:
    for number, name in enumerate(("one", "two")):
        await world.added(world.admin, name, number, public=True)
    digests = set()
    for method in MergeMethod:
        body = {"name": f"by-{method}".replace("_", "-"), "adapters": BOTH, "method": method.value}
        body |= {"density": 0.5} if method.prunes else {}
        body |= {"rank": 3} if method is MergeMethod.SVD else {}
        response = await world.b.post(URL, json=body)
        assert response.status_code == 201, response.text
        assert response.json()["rank"] == {"cat": 4, "svd": 3}.get(method.value, 2)
        digests.add(response.json()["digest"])
    assert len(digests) == len(MergeMethod)


async def test_refusals(world: World) -> None:
    for number, name in enumerate(("one", "two")):
        await world.added(world.admin, name, number, public=True)
    good = {"name": "new", "adapters": BOTH, "method": "cat"}
    for change, status, code, param in (
        ({"method": "average"}, 400, "invalid_value", "method"),
        ({"adapters": []}, 400, "invalid_value", "adapters"),
        ({"adapters": [{"weight": 1}]}, 400, "missing_required_parameter", "adapters.0.name"),
        ({"adapters": [{"name": "one", "weight": "1"}]}, 400, "invalid_type", "adapters.0.weight"),
        ({"adapters": [{"name": "one"}] * 300}, 400, "invalid_value", "adapters"),
        ({"adapters": [{"name": "one", "weight": 0}]}, 400, "invalid_merge", "adapters.0.weight"),
        ({"adapters": [{"name": "one"}, {"name": "none"}]}, 404, "adapter_not_found", None),
        ({"density": 0.5}, 400, "invalid_merge", "density"),
        ({"method": "ties"}, 400, "invalid_merge", "density"),
        ({"rank": 2}, 400, "invalid_merge", "rank"),
        ({"rank": 0, "method": "svd"}, 400, "invalid_value", "rank"),
        ({"name": "one"}, 409, "adapter_exists", "name"),
        ({"name": "auto"}, 400, "invalid_name", "name"),
        ({"tenant": "none"}, 404, "tenant_not_found", "tenant"),
        ({"pinned": True}, 400, "unknown_parameter", "pinned"),
    ):
        response = await world.admin.post(URL, json=good | change)
        assert (response.status_code, error_of(response)["code"]) == (status, code), (change, response.text)
        assert error_of(response)["param"] == param, (change, response.text)
    assert [each["name"] for each in (await world.admin.get("/admin/v1/adapters")).json()["data"]] == ["one", "two"]
    replaced = await world.admin.post(URL, json=good | {"name": "one", "replace": True})
    assert (replaced.status_code, len(replaced.json()["revisions"])) == (201, 2)
