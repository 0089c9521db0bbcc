"""The README's own requests, as they stand there: with curl in a shell, and in Python."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import REPLY
from fakes import MODEL, Harness, write_adapter
from word_encoder import WordEncoder
from world import ADMIN_KEY

README = (Path(__file__).parents[3] / "README.md").read_text()
HERE = "http://127.0.0.1:8000"
FENCE = re.compile(r"^```(\w*)\n", re.MULTILINE)


def blocks(language: str) -> list[str]:
    parts = FENCE.split(README)  # text, language, code, "", text, language, ...
    return [code for name, code in zip(parts[1::4], parts[2::4], strict=True) if name == language]


def commands() -> list[str]:
    """Each `curl`, which goes on while a quotation is open or a line ends with a backslash."""
    found: list[str] = []
    for block in blocks(""):
        for line in block.splitlines():
            if line.startswith("curl "):
                found.append(line)
            elif found and (found[-1].endswith("\\") or found[-1].count("'") % 2):
                found[-1] += f"\n{line}"
    return found


@pytest.fixture
async def harness(make_world: Callable[..., Harness], tmp_path: Path) -> AsyncIterator[Harness]:
    harness = make_world(process=WordEncoder(tmp_path))
    await harness.services.routers.start()
    yield harness
    await harness.services.routers.close()


@pytest.fixture
async def adapters(live: str, harness: Harness, tmp_path: Path) -> str:
    """The README's adapters, and the server's URL."""
    for seed, name in enumerate(("json_fields", "pirate", "spell")):
        write_adapter(tmp_path / "given" / name, seed)
    await harness.store.register_folder(tmp_path / "given")
    write_adapter(tmp_path / "sql-adapter", 7)
    return live


async def test_curl(adapters: str, tmp_path: Path) -> None:
    assert len(commands()) >= 3
    for command in commands():
        # The server has keys here; the README's first one has none.
        shown = command.replace(HERE, adapters).replace("curl ", "curl -sS --fail-with-body ", 1)
        if "Authorization" not in shown:
            shown += f" -H 'Authorization: Bearer {ADMIN_KEY}'"
        process = await asyncio.create_subprocess_shell(
            shown,
            cwd=tmp_path,
            env=os.environ | {"LORAMUX_ADMIN_KEY": ADMIN_KEY},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, (shown, said)
        answer = json.loads(said)
        assert "error" not in answer
        if "chat/completions" in command:
            assert answer["choices"][0]["message"]["content"] == REPLY


async def test_python(adapters: str, harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in blocks("python") if "OpenAI(" in block)
    block = block.replace(HERE, adapters).replace("smollm2-135m", MODEL).replace('"none"', repr(ADMIN_KEY))
    scope: dict[str, Any] = {}
    await asyncio.to_thread(exec, block, scope)
    content, lora = capsys.readouterr().out.splitlines()
    assert content == REPLY
    assert len(harness.engine.requests[-1].mix.entries) == 2
    (parsing,) = (block for block in blocks("python") if "parse(" in block)
    harness.engine.say('{"name": "Emma", "age": 48}')
    await asyncio.to_thread(exec, parsing, scope)
    assert capsys.readouterr().out == "name='Emma' age=48\n"
    assert harness.engine.requests[-1].params.constraint is not None
    await asyncio.to_thread(scope["client"].close)
    assert "json_fields" in lora
