"""The console's files: served to anybody, with headers that let nothing else run."""

import re
from collections.abc import Callable

import httpx
import pytest
from fakes import Harness

from server.console.routes import STATIC


async def test_the_page_and_its_files_need_no_key(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(admin_key="secret")
    async with harness.client() as client:
        page = await client.get("/console")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        named = re.findall(r'(?:src|href)="(console/[^"]+)"', page.text)
        assert set(named) == {"console/style.css", "console/app.js"}
        for file in STATIC.iterdir():
            found = await client.get(f"/console/{file.name}")
            assert found.status_code == 200
            assert found.content == file.read_bytes()
            policy = found.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert found.headers["x-content-type-options"] == "nosniff"
        assert (await client.get("/admin/v1/state")).status_code == 401


def test_every_import_is_a_file_of_the_console() -> None:
    for file in STATIC.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', file.read_text()):
            assert (STATIC / name).is_file(), (file.name, name)


@pytest.mark.parametrize("path", ["nothing.js", "../routes.py", "..%2froutes.py", "%2e%2e/routes.py", ""])
async def test_nothing_else_is_served(path: str, client: httpx.AsyncClient) -> None:
    assert (await client.get(f"/console/{path}")).status_code == 404
