"""GET /v1/models, POST /tokenize and POST /detokenize."""

import httpx
from byte_tokenizer import TEMPLATE
from fakes import Harness


async def test_list(client: httpx.AsyncClient, harness: Harness) -> None:
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["tiny", "german", "pirate", "sql"]
    base, german = body["data"][:2]
    assert base["parent"] is None
    assert base["max_model_len"] == 256
    assert german["root"] == harness.digests["german"]
    assert german["parent"] == "tiny"
    assert german["created"] == 1000
    assert german["permission"][0]["allow_sampling"] is True


async def test_in_parts(client: httpx.AsyncClient) -> None:
    whole = (await client.get("/v1/models")).json()
    assert whole["next"] is None
    first = (await client.get("/v1/models?limit=2")).json()
    assert [model["id"] for model in first["data"]] == ["tiny", "german", "pirate"]
    second = (await client.get("/v1/models", params={"limit": 2, "cursor": first["next"]})).json()
    assert first["data"] + second["data"] == whole["data"]
    assert second["next"] is None
    assert (await client.get("/v1/models?limit=0")).status_code == 400


async def test_a_revision(client: httpx.AsyncClient, harness: Harness) -> None:
    model = (await client.get(f"/v1/models/sql@{harness.digests['sql'][:8]}")).json()
    assert (model["id"], model["root"]) == ("sql", harness.digests["sql"])
    assert (await client.get("/v1/models/sql@00000000")).status_code == 404


async def test_one(client: httpx.AsyncClient) -> None:
    everything = (await client.get("/v1/models")).json()["data"]
    for model in everything:
        assert (await client.get(f"/v1/models/{model['id']}")).json() == model
    missing = await client.get("/v1/models/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_tokenize_text(client: httpx.AsyncClient, harness: Harness) -> None:
    body = (await client.post("/tokenize", json={"prompt": "Hello wörld"})).json()
    tokens = [0, *harness.engine.encode("Hello wörld")]
    assert body == {"count": len(tokens), "max_model_len": 256, "tokens": tokens}
    plain = await client.post("/tokenize", json={"model": "sql", "prompt": "Hello", "add_special_tokens": False})
    assert plain.json()["tokens"] == harness.engine.encode("Hello")
    spelled = await client.post("/tokenize", json={"prompt": "Hello", "return_token_strs": True})
    assert spelled.json()["token_strs"][0] == "<s>"


async def test_tokenize_messages(client: httpx.AsyncClient, harness: Harness) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = (await client.post("/tokenize", json={"messages": messages})).json()
    assert body["tokens"] == harness.engine.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert "add_generation_prompt" in TEMPLATE
    body = (await client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert body["tokens"] == harness.engine.encode("<|im_start|>user\nHi<|im_end|>\n")


async def test_detokenize(client: httpx.AsyncClient, harness: Harness) -> None:
    text = "Hello 漢字 😀"
    body = (await client.post("/detokenize", json={"tokens": harness.engine.encode(text)})).json()
    assert body == {"prompt": text}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_a_limit_that_is_no_number_of_models(client: httpx.AsyncClient) -> None:
    for limit in ("0", "-1", "many", "1.5", "99999999999999999999"):
        answer = await client.get("/v1/models", params={"limit": limit})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "limit", "invalid_value"), error
