"""Two tenants of one running server, whose registry another process, this one, writes and reads."""

import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served

from adapters_store.registry import KeyRow, Quotas, Registry, TenantRow
from server.key_ring import make_key

PROMPT = "Hello world, how is the quick brown fox? " * 6
"""Several blocks of the prefix cache."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def served(served_model: Path, data_dir: Path) -> Iterator[Served]:
    served = Served(served_model, data_dir, "--admin-key", "boss", key="boss")
    yield served
    if served.process.poll() is None:
        served.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def registry(served: Served, data_dir: Path) -> Iterator[Registry]:  # noqa: ARG001  the server makes the schema
    registry = Registry.open(f"sqlite:///{data_dir}/registry/tiny.sqlite", time.time)
    yield registry
    registry.close()


@pytest.mark.slow
def test_tenants_of_one_server(served: Served, registry: Registry) -> None:
    keys: dict[str, tuple[KeyRow, str]] = {}
    for tenant in ("acme", "umbrella"):
        registry.accounts.add(TenantRow(tenant, quotas=Quotas(concurrency=1)))
        keys[tenant] = make_key(tenant, "", secrets.token_bytes)
        registry.accounts.add_key(keys[tenant][0])

    def ask(tenant: str) -> httpx.Response:
        body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        headers = {"Authorization": f"Bearer {keys[tenant][1]}"}
        return httpx.post(f"{served.base_url}/completions", json=body, headers=headers, timeout=120)

    # Another process's keys are known soon, and what one tenant computed stays unknown to the other.
    served.until(lambda: ask("acme").status_code == 200)
    usage = {"acme": [ask("acme").json()["usage"]]}
    theirs = {"headers": bearer(keys["umbrella"][1]), "timeout": 120}
    served.until(lambda: httpx.get(f"{served.base_url}/models", **theirs).is_success)
    usage["umbrella"] = [ask("umbrella").json()["usage"] for _ in range(2)]
    cached = {tenant: [each["prompt_tokens_details"]["cached_tokens"] for each in usage[tenant]] for tenant in usage}
    assert cached["acme"][0] > 0
    assert cached["umbrella"] == [0, cached["acme"][0]]

    # A key that another process revokes is soon refused; the other one goes on.
    registry.accounts.revoke_key("acme", keys["acme"][0].id)
    served.until(lambda: ask("acme").status_code == 401)
    assert ask("umbrella").status_code == 200

    # Stopped between two flushes, the server has written down everything.
    answers = 1 + len(usage["umbrella"])
    assert served.stop() == 0
    prompt, made = (usage["umbrella"][0][f"{each}_tokens"] for each in ("prompt", "completion"))
    assert used(registry, "umbrella") == {"": [answers, answers * prompt, answers * made]}
    ((adapter, (requests, *tokens)),) = used(registry, "acme").items()
    assert (adapter, tokens) == ("", [requests * prompt, requests * made])


def used(registry: Registry, tenant: str) -> dict[str, list[int]]:
    """By adapter: requests, tokens of prompts and of answers, of one day, or of two if one ended meanwhile."""
    sums: dict[str, list[int]] = {}
    for line in registry.ledger.read(tenant).items:
        counts = (line.requests, line.prompt_tokens, line.generation_tokens)
        sums[line.adapter] = [a + b for a, b in zip(sums.get(line.adapter, (0, 0, 0)), counts, strict=True)]
    return sums


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
