"""The command line of the load tests, and whole runs against a real server."""

import json
import os
from pathlib import Path

import pytest

from loadtests.run import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "WORKLOAD"),
        (["slora"], "--model"),
        (["replay", "nowhere.jsonl", "--model", "m"], "nowhere.jsonl"),
        (["compare", "nowhere", "elsewhere"], "nowhere/report.json"),
        (["compare", "nowhere", "nowhere"], "two folders"),
        (["flood", "--model", "m", "--tenant-key", "acme"], "expected TENANT=KEY"),
        (["flood", "--model", "m", "--targets", "q_proj,head"], "expected some of q_proj,k_proj"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_flood_with_churn_is_measured_replayed_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(os.environ.get("LORAMUX_DATA_DIR") or Path.home() / ".local" / "share" / "loramux")
    served = ["--model", str(root / "models" / "smollm2-135m"), "--serve=--max-model-len=512"]
    first = ["flood", "--seconds", "3", "--others", "2", "--requests", "8", "--churn", "4"]
    found = main([*first, *served, "--out", str(tmp_path / "first")])
    assert found["statuses"] == {"ok": found["requests"]}
    assert set(found["tenants"]) == {"flood", "tenant-1", "tenant-2"}
    assert found["cold"]["requests"] == 3
    assert found["churn"]["failed"] == {}
    assert found["churn"]["registered"] == found["churn"]["deleted"] > 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    again = main(["replay", str(tmp_path / "first" / "trace.jsonl"), *served, "--out", str(tmp_path / "second")])
    assert again["output_tokens"] == found["output_tokens"]
    ratios = main(["compare", str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(tmp_path / "both")])
    assert ratios["tokens_per_second"] == found["tokens_per_second"] / again["tokens_per_second"]
    assert "<svg" in (tmp_path / "both" / "report.html").read_text()
