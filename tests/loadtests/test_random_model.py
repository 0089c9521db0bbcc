"""Models made up for load tests, as `transformers` reads them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loadtests.random_model import SHAPES, main, write_model
from server.model.config import ModelConfig
from tests.engine import spoken


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=spoken.tokenizer()).save_pretrained(folder)
    (folder / "config.json").write_text('{"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}')
    return folder


def test_transformers_finds_every_weight_and_the_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    folder = main(["--shape", "tiny", "--tokenizer", str(tokenizer), "--out", str(tmp_path / "model")])
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype is torch.bfloat16
    assert (model.config.eos_token_id, model.config.vocab_size) == (1, 50304)
    assert float(model.lm_head.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
    assert AutoTokenizer.from_pretrained(folder).encode("Hi", add_special_tokens=False)


def test_the_shapes_are_those_of_the_models(tmp_path: Path, tokenizer: Path) -> None:
    again = write_model(tmp_path / "again", SHAPES["tiny"], tokenizer)
    assert ModelConfig.from_folder(again).num_layers == 2
    assert {name: shape["num_hidden_layers"] for name, shape in SHAPES.items()} == {"8b": 32, "1b": 16, "tiny": 2}


@pytest.mark.parametrize("folder", ["nowhere", "tokenizer"])
def test_what_cannot_be_is_told(
    tmp_path: Path, tokenizer: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tokenizer / "config.json").write_text('{"vocab_size": 100000}')
    with pytest.raises(SystemExit):
        main(["--shape", "tiny", "--tokenizer", str(tmp_path / folder), "--out", str(tmp_path / "model")])
    assert ("No such file" if folder == "nowhere" else "has 100000 tokens") in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
