"""The benchmark of bursts, on as little as it can measure."""

from pathlib import Path

import pytest
from byte_tokenizer import byte_level_tokenizer
from tiny_encoder import make_encoder

from server.bench_burst import PHASES, main


@pytest.mark.slow
def test_every_part_of_the_way_is_measured(tmp_path: Path) -> None:
    model, encoder = tmp_path / "model", make_encoder(tmp_path / "encoder")
    byte_level_tokenizer().save_pretrained(model)
    options = ["--requests", "3", "--bursts", "3", "--adapters", "4", "--pause", "0", "--pass-ms", "1"]
    document = main(["--model", str(model), "--encoder", str(encoder), *options])
    for forward in ("table", "encoder"):
        named, auto = document[forward]["named"], document[forward]["auto"]
        assert set(PHASES) <= set(auto)
        assert named["passes"] == 0
        assert auto["passes"] >= 1
        assert auto["its pass"] >= 1 if forward == "table" else auto["its pass"] > 0
        assert 0 < auto["first_submitted_ms"] <= auto["mean_submitted_ms"] <= auto["last_submitted_ms"]
