"""schemathesis reads our OpenAPI document and sends what fits it and what does not, to every call there is."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from client_venv import PYTHON, needs_clients
from fakes import Harness, make_store
from transformers import PreTrainedTokenizerFast

from server.config import ServeSettings, Settings, SourceSettings

pytestmark = [pytest.mark.slow, needs_clients]
CONFIG = """
seed = 1

[headers]
Authorization = "Bearer boss"

[generation]
deterministic = true
max-examples = 12

[phases]
stateful.enabled = false

[checks]
enabled = false
not_a_server_error = { enabled = true, expected-statuses = ["2xx", "3xx", "4xx", 503, 504] }
status_code_conformance.enabled = true
content_type_conformance.enabled = true
response_schema_conformance.enabled = true
unsupported_method.enabled = true
allow_header_conformance.enabled = true
ignored_auth.enabled = true

[[operations]]
include-path = "/admin/v1/drain"
enabled = false
"""
"""A drained server answers nothing else. 503 and 504 are answers that are documented; 500 is none."""


@pytest.fixture
async def harness(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> AsyncIterator[Harness]:
    store = make_store(tmp_path / "adapters", ["sql", "german", "pirate"])
    settings = Settings(
        serve=ServeSettings(admin_key="boss", api_key=("mine",)), sources=SourceSettings(hub_endpoint="")
    )
    harness = Harness(store, tokenizer, settings)
    yield harness
    harness.check_all_given_back()
    await store.close()


async def test_every_call_keeps_to_its_document(live: str, harness: Harness, tmp_path: Path) -> None:
    calls = sum(map(len, harness.app.openapi()["paths"].values())) - 1
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = (
        str(PYTHON.with_name("schemathesis")),
        "--config-file",
        "schemathesis.toml",
        "run",
        "--continue-on-failure",
        "--no-shrink",
    )
    process = await asyncio.create_subprocess_exec(
        *command, "--no-color", f"{live}/openapi.json", cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    said = out.decode()
    if process.returncode or f"Tested: {calls}\n" not in said:
        pytest.fail(said[-6000:])
