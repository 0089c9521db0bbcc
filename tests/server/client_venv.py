"""The virtual environment of clients whose dependencies exclude ours, which `make test-clients` makes."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

PYTHON = Path(sys.prefix) / "clients" / "bin" / "python"

needs_clients = pytest.mark.skipif(
    not PYTHON.is_file(), reason="its clients need an environment of their own: make test-clients"
)


async def run(script: str, *arguments: str) -> Any:
    """The JSON in the last line that a script beside this file printed."""
    path = str(Path(__file__).with_name(script))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    process = await asyncio.create_subprocess_exec(
        str(PYTHON),
        "-P",
        path,
        *arguments,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, (out.decode()[-3000:], err.decode()[-3000:])
    return json.loads(out.splitlines()[-1])
