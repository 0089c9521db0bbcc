"""The benchmark of keys asks for keys that it knows, and for one that nobody has."""

import json

import pytest

from server import bench_keys
from server.tenants import Caller, Keys


async def test_it_measures_one_key_that_is_right_and_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = []
    real = Keys.caller

    async def noting(self: Keys, key: str | None) -> Caller | None:
        caller = await real(self, key)
        found.append(caller.tenant.id if caller is not None else None)
        return caller

    monkeypatch.setattr(Keys, "caller", noting)
    row = await bench_keys.measure(3, 2)
    assert found == ["measured"] * 3 + [None] * 2
    assert row["keys"] == 3
    assert min(row.values()) > 0


def test_the_last_line_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_keys, "KEYS", (1, 2))
    monkeypatch.setattr(bench_keys, "CALLS", 3)
    rows = bench_keys.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"bench": "keys", "rows": rows}
