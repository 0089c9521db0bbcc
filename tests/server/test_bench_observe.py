"""The benchmark of what watching costs, on as little as it can measure."""

from pathlib import Path

import pytest
from byte_tokenizer import byte_level_tokenizer

from server.bench_observe import FORMS, main


@pytest.mark.slow
def test_all_forms_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"):  # it sets them
        monkeypatch.setenv(name, "")
    byte_level_tokenizer().save_pretrained(tmp_path)
    document = main(["--model", str(tmp_path), "--rounds", "2", "--requests", "5"])
    assert [row["form"] for row in document["rows"]] == [form.name for form in FORMS]
    for row in document["rows"]:
        assert row["request_us"] > 0
