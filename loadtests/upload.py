"""Registrations over HTTP."""

from contextlib import ExitStack
from pathlib import Path

import httpx

PARTS = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}


def upload(client: httpx.Client, name: str, folder: Path, **fields: str) -> None:
    """Register the adapter in `folder`; `fields` are the form's."""
    with ExitStack() as opened:
        files = {field: opened.enter_context((folder / file).open("rb")) for field, file in PARTS.items()}
        client.post("/admin/v1/adapters", data={"name": name, **fields}, files=files).raise_for_status()
