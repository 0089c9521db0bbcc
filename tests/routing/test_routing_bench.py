"""The benchmark measures what it says."""

import json

import pytest

from routing.bench import main


def test_a_small_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--adapters", "20,30", "--prototypes", "2", "--others", "5", "--width", "8", "--requests", "3"])
    *table, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert [(row["adapters"], row["own"]) for row in document["rows"]] == [
        (20, 10),
        (20, 20),
        (30, 10),
        (30, 15),
        (30, 30),
    ]
    assert len(table) == 1 + len(document["rows"])
    assert all(row["others"] == 5 and row["p50_ms"] > 0 for row in document["rows"])
