"""Tables of stored results, and the gate against becoming slower."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from server.engine.results import BEGIN, END, compare, figures, main, render, tables

ENGINE: dict[str, Any] = {
    "bench": "engine",
    "model": "8b",
    "device": "NVIDIA H200",
    "seed": 0,
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "transformers": None},
    "commit": "0123456789abcdef+changes",
    "ratio": "no ratio: peers were measured on an H100",
    "scenarios": {
        "throughput": {
            "concurrency": 64,
            "rows": [
                {
                    "traffic": "0",
                    "requests": 256,
                    "prompt_tokens": 69317,
                    "output_tokens": 65411,
                    "tokens_per_second": 8000.4,
                    "spread": 0.012,
                    "loss": 0.0,
                    "ratio": None,
                    "steps": 1234,
                },
                {"traffic": "64", "tokens_per_second": 6000.0, "spread": 0.0, "loss": 0.25, "ratio": 2.3567},
            ],
        },
        "decode": {
            "context": 400,
            "steps": 64,
            "rows": [{"rows": 64, "traffic": "0", "ms": 5.4321, "host_ms": None, "gpu_busy": 0.987}],
        },
        "memory": {
            "rows": [{"kind": "kv", "planned": 2_000_000_000, "reported": 2_000_000_000}],
            "planned": 18_000_000_000,
            "served": {"device": 18_180_000_000},
            "error": 0.01,
        },
    },
}
KERNELS: dict[str, Any] = {
    "bench": "kernels",
    "model": "8b",
    "device": "NVIDIA H200",
    "seed": 0,
    "versions": {"torch": "2.11.0"},
    "commit": None,
    "copy_gb_per_second": 4012.0,
    "rows": [
        {"op": "gemm", "case": "qkv", "rows": 64, "backend": "triton", "us_p50": 15.04, "error": 1.7e-3},
        {"op": "gemm", "case": "qkv", "rows": 64, "backend": "cublas", "us_p50": None, "error": 0.5},
    ],
}


def changed(document: dict[str, Any], scenario: str, row: int, **values: float) -> dict[str, Any]:
    new = copy.deepcopy(document)
    rows = new["rows"] if scenario == "kernels" else new["scenarios"][scenario]["rows"]
    rows[row].update(values)
    return new


def test_tables_show_rows_and_leave_out_what_nobody_measured() -> None:
    throughput, decode, memory = tables(ENGINE)
    assert "(256 requests, 69,317 prompt and 65,411 output tokens, 64 at a time)" in throughput
    assert "| 0 | 8,000 | 1.2 % | 0.0 % |  | 1,234 |" in throughput
    assert "| 64 | 6,000 | 0.0 % | 25.0 % | 2.36 |  |" in throughput
    assert "| rows | adapters | ms a step | GPU busy |" in decode
    assert "| 64 | 0 | 5.432 | 98.7 % |" in decode
    assert "18.000 GB planned with the weights, 18.180 GB taken, 1.0 % off" in memory
    (kernels,) = tables(KERNELS)
    assert "| gemm | qkv | 64 | triton | 15.0 | 1.7e-03 |" in kernels


def test_render_replaces_only_what_is_between_the_markers() -> None:
    page = f"# Results\n\n{BEGIN}\nold\n{END}\n\nMore.\n"
    text = render(page, [ENGINE, KERNELS])
    assert text.startswith("# Results\n\n")
    assert text.endswith(f"{END}\n\nMore.\n")
    assert "old" not in text
    assert "### Engine, 8b shape, NVIDIA H200" in text
    assert "Commit 01234567+changes, seed 0, torch 2.11.0, triton 3.6.0. No ratio: peers were" in text
    assert "Commit unknown" in text
    assert "4,012 GB/s" in text
    assert render(text, [ENGINE, KERNELS]) == text


def test_heading_says_which_linears_the_adapters_are_on() -> None:
    arguments = {"rank": 8, "targets": ["q_proj", "v_proj"]}
    rendered = render(f"{BEGIN}{END}", [{**ENGINE, "arguments": arguments}, {**ENGINE, "arguments": {"rank": 16}}])
    assert rendered.count("Adapters of rank 8 on q_proj, v_proj.") == 1
    assert "rank 16" not in rendered


def test_tables_with_adapters_of_their_own_say_so_themselves() -> None:
    scenario = {"rank": 8, "host": 10000, "pages": {"qkv": 128}, "rows": [{"traffic": "0", "adapters": 0}]}
    many = {**ENGINE, "arguments": {"rank": 16, "targets": ["q_proj"]}, "scenarios": {"many_adapters": scenario}}
    rendered = render(f"{BEGIN}{END}", [many])
    assert "(10,000 adapters of rank 8 on q_proj and v_proj in host memory, 128 pages on the device)" in rendered
    assert "rank 16" not in rendered


@pytest.mark.parametrize("page", ["", BEGIN, f"{END} {BEGIN}"])
def test_render_needs_its_markers(page: str) -> None:
    with pytest.raises(ValueError, match="expected the markers"):
        render(page, [ENGINE])


def test_gate_watches_speeds_and_skips_what_was_not_measured() -> None:
    assert figures(ENGINE) == {
        "throughput: traffic 0: tokens_per_second": (8000.4, True),
        "throughput: traffic 64: tokens_per_second": (6000.0, True),
        "decode: rows 64 traffic 0: ms": (5.4321, False),
    }
    assert figures(KERNELS) == {"kernels: op gemm case qkv rows 64 backend triton: us_p50": (15.04, False)}


@pytest.mark.parametrize(
    ("scenario", "row", "values", "worse"),
    [
        ("throughput", 1, {"tokens_per_second": 6000 / 1.049}, 0),
        ("throughput", 1, {"tokens_per_second": 6000 / 1.051}, 1),
        ("throughput", 1, {"tokens_per_second": 9000.0}, 0),
        ("decode", 0, {"ms": 5.4321 * 1.049}, 0),
        ("decode", 0, {"ms": 5.4321 * 1.051}, 1),
        ("decode", 0, {"ms": 3.0}, 0),
    ],
)
def test_gate_at_five_percent(scenario: str, row: int, values: dict[str, float], worse: int) -> None:
    lines = compare(ENGINE, changed(ENGINE, scenario, row, **values))
    assert len(lines) == worse
    assert all(scenario in line and "% worse" in line for line in lines)


def test_gate_compares_only_the_same_thing() -> None:
    with pytest.raises(ValueError, match=r"device is 'NVIDIA H100'"):
        compare(ENGINE, {**ENGINE, "device": "NVIDIA H100"})
    with pytest.raises(ValueError, match="bench is 'kernels'"):
        compare(ENGINE, KERNELS)
    with pytest.raises(ValueError, match="share no figure"):
        compare(ENGINE, {**ENGINE, "scenarios": {}})


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, stored, slower = (tmp_path / name for name in ("results.md", "a.json", "b.json"))
    page.write_text(f"before\n{BEGIN}{END}\nafter\n")
    stored.write_text(json.dumps(ENGINE))
    slower.write_text(json.dumps(changed(ENGINE, "decode", 0, ms=6.0)))
    assert main([str(stored), "--page", str(page)]) == 0
    assert "| 64 | 0 | 5.432 | 98.7 % |" in page.read_text()
    assert main(["--compare", str(stored), str(stored)]) == 0
    assert main(["--compare", str(stored), str(slower)]) == 1
    assert "decode: rows 64 traffic 0: ms: 6, was 5.432: 10.5 % worse" in capsys.readouterr().out
    page.write_text("no markers")
    assert main([str(stored), "--page", str(page)]) == 2
    assert page.read_text() == "no markers"


def test_stored_results_name_no_folder_of_the_machine_that_measured() -> None:
    stored = sorted((Path(__file__).parents[2] / "docs" / "results").rglob("*.json"))
    assert stored
    for file in stored:
        assert not re.search(r'"(?:/|~|[A-Z]:\\)', file.read_text(encoding="utf-8")), file
