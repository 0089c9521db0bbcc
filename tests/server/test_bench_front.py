"""The front end's benchmarks, on as little as they can measure."""

from pathlib import Path

import pytest
from byte_tokenizer import byte_level_tokenizer

from server import bench_first_token
from server.bench_front import FORMS, main


@pytest.mark.slow
def test_both_endpoints_are_measured(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    options = ["--streams", "4", "--rate", "400", "--seconds", "1", "--requests", "10"]
    document = main(["--model", str(tmp_path), "--rounds", "1", *options])
    paths = ["/v1/chat/completions", "/v1/completions"]
    assert [row["path"] for row in document["rows"]] == [path for path in paths for _ in FORMS]
    assert [row["form"] for row in document["rows"]] == [*FORMS] * 2
    for row in document["rows"]:
        assert row["token_us"] > 0
        assert row["request_us"] > 0
        assert row["tokens_per_second"] > 0


@pytest.mark.slow
def test_first_tokens_are_measured_alone_and_beside_streams(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    options = ["--streams", "0", "2", "--rate", "100", "--requests", "5"]
    document = bench_first_token.main(["--model", str(tmp_path), *options])
    assert [(row["path"], row["streams"]) for row in document["rows"]] == [
        (path, streams) for path in ("/v1/chat/completions", "/v1/completions") for streams in (0, 2)
    ]
    for row in document["rows"]:
        assert 0 < row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
