"""The commands that administer a running server, against the application behind a real socket."""

import asyncio
import json
import os
import pty
import subprocess
import sys
import tarfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import Loramux, commands, line_of
from fakes import MODEL, Harness, make_store, wait_for, write_adapter

from adapters_store.store import AdapterStore

ADMIN = "admin-key"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    """One of each test's own: what they register is nobody else's business."""
    store = make_store(tmp_path / "store", ["sql"])
    yield store
    wait_for(store.close())


@pytest.fixture
async def harness(make_harness: Callable[..., Harness]) -> AsyncIterator[Harness]:
    harness = make_harness(admin_key=ADMIN)
    yield harness
    await harness.services.catalog.close()
    harness.check_all_given_back()
    await harness.services.usage.close()
    harness.services.accounts.close()


@pytest.fixture
def loramux(live: str) -> Loramux:
    return commands(live, ADMIN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "new", 100)
    return tmp_path / "new"


async def get(url: str) -> Any:
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60) as client:
        return (await client.get(url)).json()


def rows(text: str) -> dict[str, list[str]]:
    """A table's cells below its header, by the first one."""
    return {line.split()[0]: line.split() for line in text.splitlines()[1:]}


async def test_an_adapter_from_its_folder_to_its_end(loramux: Loramux, folder: Path, tmp_path: Path, live: str) -> None:
    (folder / "README.md").write_text("# Title\n\nSpeaks Dutch.\n")
    done = await loramux("adapters", "add", "dutch", str(folder), "--tag", "v1", "--tag", "nl", "--public")
    assert done.stderr == ""
    first = done.stdout.splitlines()
    assert first[0] == "registered dutch"
    digest = first[1].split()[1]
    assert len(digest) == 64
    assert ["rank", "2", "(alpha", "4)"] in [line.split() for line in first]
    assert ["targets", "q_proj"] in [line.split() for line in first]
    models = (await get(f"{live}/v1/models"))["data"]
    assert "dutch" in {model["id"] for model in models}

    listed = rows((await loramux("adapters", "list", "--tag", "nl")).stdout)
    assert listed.keys() == {"dutch"}
    assert listed["dutch"][1:3] == ["default", "public"]
    assert listed["dutch"][-1] == digest[:12]
    shown = (await loramux("adapters", "show", "dutch")).stdout
    assert "Speaks Dutch." in shown
    assert digest in shown
    assert "nl, v1" in shown

    assert (await loramux("adapters", "pin", "dutch")).stdout == "dutch: pinned\n"
    assert json.loads((await loramux("adapters", "show", "dutch", "--json")).stdout)["pinned"] is True
    assert "pinned" in (await loramux("adapters", "list")).stdout
    assert (await loramux("adapters", "pin", "dutch", "--off")).stdout == "dutch: not pinned\n"
    assert (await loramux("adapters", "prefetch", "dutch")).stdout.startswith("dutch: on ")

    write_adapter(tmp_path / "better", 101)
    line = line_of(await loramux("adapters", "add", "dutch", str(tmp_path / "better"), code=1))
    assert "dutch" in line
    assert "(adapter_exists)" in line
    done = await loramux("adapters", "add", "dutch", str(tmp_path / "better"), "--replace")
    assert ["revisions", "2"] in [line.split() for line in done.stdout.splitlines()]
    assert digest not in done.stdout
    assert (await loramux("adapters", "rollback", "dutch", digest[:8])).stdout == f"dutch: now {digest}\n"
    now = json.loads((await loramux("adapters", "show", "dutch", "--json")).stdout)
    assert now["digest"] == digest
    assert len(now["revisions"]) == 2

    assert (await loramux("adapters", "rm", "dutch", "--wait")).stdout == "dutch: deleted\n"
    line = line_of(await loramux("adapters", "show", "dutch", code=1))
    assert line == "loramux: adapter 'dutch' does not exist (adapter_not_found)"


async def test_an_archive_and_samples(loramux: Loramux, folder: Path, tmp_path: Path, harness: Harness) -> None:
    archive = tmp_path / "new.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname="new")
    lines = tmp_path / "samples.txt"
    lines.write_text("first one\n\nsecond ü\n")
    await loramux("adapters", "add", "a", str(archive), "--samples", str(lines), "--description", "From an archive.")
    listed = tmp_path / "samples.json"
    listed.write_text(json.dumps(["of\ntwo lines"]))
    await loramux("adapters", "add", "b", str(archive), "--samples", str(listed))
    samples = harness.store.registry.samples("default", ["a", "b"])
    assert samples == {"a": ("first one", "second ü"), "b": ("of\ntwo lines",)}
    assert "From an archive." in (await loramux("adapters", "show", "a")).stdout


async def test_samples_beside_an_adapter_go_with_it(
    loramux: Loramux, folder: Path, tmp_path: Path, harness: Harness
) -> None:
    (folder / "samples.json").write_text(json.dumps(["from the folder"]))
    other = tmp_path / "other.txt"
    other.write_text("from elsewhere\n")
    await loramux("adapters", "add", "a", str(folder))
    await loramux("adapters", "add", "b", str(folder), "--samples", str(other))
    samples = harness.store.registry.samples("default", ["a", "b"])
    assert samples == {"a": ("from the folder",), "b": ("from elsewhere",)}
    for text, part in (("{", "JSON if it is called .json"), ('{"a": 1}', "expected a JSON list of strings")):
        (folder / "samples.json").write_text(text)
        line = line_of(await loramux("adapters", "add", "c", str(folder), code=2))
        assert line.startswith(f"loramux: {folder}/samples.json: expected")
        assert part in line


async def test_a_merge(loramux: Loramux, folder: Path) -> None:
    write_adapter(folder.parent / "other", 99)
    await loramux("adapters", "add", "one", str(folder))
    await loramux("adapters", "add", "two", str(folder.parent / "other"))
    done = await loramux("adapters", "merge", "both", "one=0.5", "two=-0.25")
    assert done.stdout.startswith("registered both\n")
    assert "rank     4" in done.stdout
    shown = (await loramux("adapters", "show", "both")).stdout
    assert "one=0.5 two=-0.25 by cat" in shown
    await loramux("adapters", "merge", "ties", "one=1", "two=1", "--method", "ties", "--density", "0.5")
    assert "density" in line_of(await loramux("adapters", "merge", "x", "one=1", "--method", "ties", code=1))


async def test_tenants_and_their_keys(loramux: Loramux, folder: Path) -> None:
    limits = ["--requests-per-second", "0.5", "--tokens-per-minute", "100000", "--max-bytes", "1GiB"]
    done = await loramux("tenants", "add", "acme", "--weight", "2", *limits)
    assert done.stdout.splitlines()[:4] == [
        "tenant               acme",
        "weight               2",
        "requests per second  0.5",
        "tokens per minute    100,000",
    ]
    await loramux("tenants", "set", "acme", "--tokens-per-minute", "unlimited", "--requests-per-second", "1000")
    quotas = json.loads((await loramux("tenants", "show", "acme", "--json")).stdout)["quotas"]
    assert quotas == {
        "requests_per_second": 1000.0,
        "tokens_per_minute": None,
        "concurrency": None,
        "adapters": None,
        "bytes": 1 << 30,
    }
    assert rows((await loramux("tenants", "list")).stdout).keys() == {"acme", "default"}

    done = await loramux("keys", "add", "acme", "--label", "ci")
    key = done.stdout.strip()
    assert key.startswith("lm-")
    assert "not shown again" in done.stderr
    (key_id,) = rows((await loramux("keys", "list", "acme")).stdout)
    assert key_id in key
    assert key not in (await loramux("keys", "list", "acme", "--json")).stdout

    await loramux("adapters", "add", "mine", str(folder), key=key)
    assert rows((await loramux("adapters", "list", key=key)).stdout).keys() == {"mine"}
    assert rows((await loramux("adapters", "list", "--tenant", "acme")).stdout).keys() == {"mine"}
    assert "mine" not in (await loramux("adapters", "list")).stdout
    assert "(tenant_in_use)" in line_of(await loramux("tenants", "rm", "acme", code=1))
    await loramux("adapters", "rm", "mine", "--tenant", "acme")

    line = line_of(await loramux("tenants", "list", key=key, code=1))
    assert "(forbidden)" in line
    assert "the admin key with --key or LORAMUX_ADMIN_KEY" in line
    assert (await loramux("keys", "revoke", "acme", key_id)).stdout == f"{key_id}: revoked\n"
    assert "revoked" in (await loramux("keys", "list", "acme")).stdout
    for wrong in (key, None):
        line = line_of(await loramux("adapters", "list", key=wrong, code=1))
        assert "(invalid_api_key)" in line
        assert "--key or LORAMUX_ADMIN_KEY" in line
    assert (await loramux("tenants", "rm", "acme")).stdout == "acme: deleted\n"


async def test_usage_and_state(loramux: Loramux, live: str) -> None:
    assert (await loramux("usage")).stdout == "no use yet\n"
    async with httpx.AsyncClient(base_url=live, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60) as client:
        for model in (MODEL, "sql"):
            answer = await client.post("/v1/completions", json={"model": model, "prompt": "Hi", "max_tokens": 3})
            assert answer.status_code == 200
    lines = (await loramux("usage", "--since", "2020-01-01")).stdout.splitlines()
    assert len(lines) == 4
    assert any("(base model)" in line for line in lines)
    assert any(" sql " in line for line in lines)
    assert lines[-1].split()[:2] == ["total", "2"]
    assert lines[-1].split()[-1] == "6"
    assert "no use yet" in (await loramux("usage", "--until", "2020-01-01")).stdout
    assert "since" in line_of(await loramux("usage", "--since", "soon", code=1))

    state = (await loramux("state")).stdout
    assert "serving" in state
    assert "0 running, 0 waiting" in state
    assert " alive " in state
    assert json.loads((await loramux("state", "--json")).stdout)["engines"][0]["alive"] is True


async def test_json_is_the_servers(loramux: Loramux, live: str) -> None:
    done = await loramux("adapters", "list", "--json")
    assert json.loads(done.stdout) == await get(f"{live}/admin/v1/adapters")


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["adapters", "show", "nobody"], 1, "(adapter_not_found)"),
        (["adapters", "show", "a/b"], 2, "is no name"),
        (["adapters", "rollback", "sql", "ffff"], 1, "(revision_not_found)"),
        (["adapters", "add", "x", "ftp://nowhere"], 1, "source"),
        (["adapters", "add", "auto", "."], 1, "has no adapter_config.json and no adapter_model.safetensors"),
        (["adapters", "add", "x", "/nowhere/at/all"], 2, "does not exist"),
        (["adapters", "add", "x", "hf://a/b", "--samples", "/nowhere"], 2, "--samples /nowhere: No such file"),
        (["adapters", "merge", "x", "sql"], 2, "expected an adapter and its weight, such as sql=0.5"),
        (["tenants", "add", "x", "--weight", "nan"], 2, "expected a number from 0.001 to 1000"),
        (["tenants", "set", "x", "--weight", "0"], 2, "expected a number from 0.001 to 1000"),
        (["tenants", "set", "x", "--weight", "1e4"], 2, "expected a number from 0.001 to 1000"),
        (["adapters", "merge", "x", "sql=nan"], 2, "expected an adapter and its weight"),
        (["adapters", "merge", "x", "sql=1", "--method", "glue"], 1, "method"),
        (["adapters", "merge", "x", "nobody=1"], 1, "nobody"),
        (["tenants", "show", "nobody"], 1, "(tenant_not_found)"),
        (["tenants", "set", "default"], 2, "nothing to change"),
        (["tenants", "add", "default"], 1, "(tenant_exists)"),
        (["keys", "revoke", "default", "aaaaaaaaaaaa"], 1, "(key_not_found)"),
    ],
)
async def test_failures_are_one_line(loramux: Loramux, arguments: list[str], code: int, part: str) -> None:
    assert part in line_of(await loramux(*arguments, code=code))


async def test_a_broken_adapter_is_refused_by_its_code(loramux: Loramux, folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      short")
    line = line_of(await loramux("adapters", "add", "broken", str(folder), code=1))
    assert line.endswith(")")
    assert "(adapter_" in line or "(not_safetensors)" in line


async def test_a_large_upload_with_a_wrong_key(loramux: Loramux, folder: Path) -> None:
    """The server refuses long before it has all of it."""
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100 << 20)
    assert "(invalid_api_key)" in line_of(await loramux("adapters", "add", "x", str(folder), key="wrong", code=1))


async def in_process(arguments: list[str], url: str, **options: object) -> "subprocess.CompletedProcess[bytes]":
    environment = dict(os.environ) | {"LORAMUX_URL": url, "LORAMUX_ADMIN_KEY": ADMIN, "TERM": "xterm", "COLUMNS": "40"}
    command = [sys.executable, "-m", "server.cli", *arguments]
    return await asyncio.to_thread(
        subprocess.run,
        command,
        env=environment,
        timeout=120,
        check=False,
        **options,  # type: ignore[call-overload]
    )


async def test_a_pipe_gets_plain_text_and_whole_names(loramux: Loramux, folder: Path, live: str) -> None:
    name = "a-name-that-is-longer-than-any-narrow-terminal-is-wide"
    await loramux("adapters", "add", name, str(folder))
    done = await in_process(["adapters", "list"], live, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    assert rows(done.stdout.decode())[name][1:3] == ["default", "private"]


async def test_only_a_terminal_gets_a_progress_bar(folder: Path, live: str) -> None:
    done = await in_process(["adapters", "add", "quiet", str(folder)], live, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    leader, follower = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(leader, 1 << 16):
                seen.append(chunk)
        except OSError:  # the other side is closed
            return

    reading = threading.Thread(target=read)
    reading.start()
    try:
        done = await in_process(["adapters", "add", "seen", str(folder)], live, stdout=subprocess.PIPE, stderr=follower)
    finally:
        os.close(follower)
        await asyncio.to_thread(reading.join)
        os.close(leader)
    assert done.returncode == 0
    assert done.stdout.startswith(b"registered seen\n")
    shown = b"".join(seen)
    assert b"uploading" in shown or b"the server checks it" in shown
    assert b"bytes" in shown or b"kB" in shown
