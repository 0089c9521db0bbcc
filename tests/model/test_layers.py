"""Rotary tables against those of `transformers`."""

from collections.abc import Callable

import pytest
import torch

from server.model.config import ModelConfig
from server.model.layers import RotaryEmbedding
from tests.model.conftest import CPU, Saved


@pytest.mark.parametrize("variant", ["llama", "llama-rope-linear", "llama-rope-llama3", "qwen3"])
def test_rotary_tables_equal_those_of_transformers(saved: Callable[[str], Saved], variant: str) -> None:
    model = saved(variant)
    rotary = RotaryEmbedding(ModelConfig.from_folder(model.folder), CPU, torch.float32)
    positions = torch.tensor([0, 1, 2, 31, 200, 255])
    cos, sin = rotary(positions, 256)
    [expected_cos], [expected_sin] = model.model.model.rotary_emb(torch.zeros(1), positions[None])
    half = cos.shape[-1] // 2
    torch.testing.assert_close(cos, expected_cos)
    torch.testing.assert_close(sin[:, half:], expected_sin[:, half:])
    assert torch.equal(sin[:, :half], -sin[:, half:])


def test_the_table_grows_and_keeps_its_rows(saved: Callable[[str], Saved]) -> None:
    rotary = RotaryEmbedding(ModelConfig.from_folder(saved("llama").folder), CPU, torch.bfloat16)
    first, _ = rotary(torch.tensor([4]), 5)
    assert rotary.table.shape[1] == 8
    rotary(torch.tensor([9]), 200)
    assert rotary.table.shape[1] == 256
    again, _ = rotary(torch.tensor([4]), 5)
    assert torch.equal(first, again)
    assert first.dtype == torch.bfloat16
