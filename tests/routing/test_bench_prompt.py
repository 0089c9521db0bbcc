"""What deciding costs is measured on a tiny model; no number is asserted, only that each is there and positive."""

import json

import pytest

from routing import bench_prompt


def test_one_document_has_prompts_and_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"prompt": 24, "context": 16, "rows": 4, "warm": 1, "steps": 3, "repeats": 1, "adapters": 3, "rank": 4}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    assert bench_prompt.main(["--model", "tiny", "--device", "cpu", "--tenants", "1", "2", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["prompt"].keys() == printed["decode"].keys() == {"base", "lora", "moa", "milora"}
    assert all(seconds > 0 for own in printed["prompt"].values() for seconds in (own["first"], own["again"]))
    assert all(own.keys() == {"1", "2"} and min(own.values()) > 0 for own in printed["decode"].values())
