"""What deciding costs is measured on a tiny model; no number is asserted, only that each is there and positive."""

import json
from pathlib import Path

import pytest

from routing import bench_prompt
from server.engine.sequence import FinishReason


def test_one_document_has_prompts_and_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"prompt": 24, "context": 16, "rows": 4, "warm": 1, "steps": 3, "repeats": 1, "adapters": 3, "rank": 4}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    assert bench_prompt.main(["--model", "tiny", "--device", "cpu", "--tenants", "1", "2", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    kinds = {"base", "lora", "moa", "milora", "moe-lora"}
    assert printed["prompt"].keys() == printed["decode"].keys() == printed["weights"].keys() == kinds
    assert all(seconds > 0 for own in printed["prompt"].values() for seconds in (own["first"], own["again"]))
    assert all(own.keys() == {"1", "2"} and min(own.values()) > 0 for own in printed["decode"].values())
    weights = printed["weights"]
    assert 0 == weights["base"] < weights["lora"] < weights["milora"] < weights["moa"]
    assert weights["moe-lora"] > 8 * weights["lora"], "experts of rank 4 take pages as large as adapters of that rank"


def test_rows_of_moe_lora_choose_among_experts_of_their_own(tmp_path: Path) -> None:
    options = bench_prompt.Options(model="tiny", device="cpu", adapters=2, rank=4, tenants=(2,), rows=2, prompt=8)
    bench = bench_prompt.Bench(options, tmp_path)
    requests = [bench._request("moe-lora", 8, number, tenant=number, max_tokens=3) for number in range(2)]
    for request in requests:
        bench.engine.add_request(request)
    outputs = [output for _ in range(60) for output in bench.engine.step()]
    assert [output.finish_reason for output in outputs if output.finish_reason] == [FinishReason.LENGTH] * 2
    shares = {output.request_id: output.shares for output in outputs if output.shares}
    for request in requests:
        assert request.gates is not None
        assert len(set(request.gates.rows)) == len(request.mix.entries) == 8
        assert len(shares[request.id]) == 8
        assert sum(shares[request.id]) == pytest.approx(1, abs=1e-3)
    assert not set(requests[0].paths) & set(requests[1].paths)
    bench.engine.close()
