"""How a GPU's memory is shared out, on a device that only says how much it has."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.config import GIB, EngineConfig
from server.engine.memory import CUDA_SHARE, plan_memory, workspace_bytes
from server.engine.scoring import SCORED_ROWS
from server.model.config import ModelConfig, ModelError

CUDA = torch.device("cuda")


@pytest.fixture
def model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64 * GIB, 80 * GIB))
    return ModelConfig.from_folder(tiny_model)


@pytest.mark.parametrize("settings", [{}, {"kv_memory": 20 * GIB}, {"page_memory": 3 * GIB}, {"max_num_seqs": 256}])
def test_all_together_fit_into_what_is_free(model: ModelConfig, settings: dict[str, int]) -> None:
    plan = plan_memory(EngineConfig("m", **settings), model, CUDA, torch.bfloat16)
    assert plan.kv + plan.pages <= (64 * GIB - plan.workspace) * CUDA_SHARE
    assert plan.kv > plan.pages > 0
    assert plan.kv == settings.get("kv_memory", plan.kv)
    assert plan.pages == settings.get("page_memory", plan.pages)


@pytest.mark.parametrize("settings", [{"kv_memory": 63 * GIB}, {"kv_memory": 40 * GIB, "page_memory": 30 * GIB}])
def test_what_does_not_fit_is_refused_with_the_figures(model: ModelConfig, settings: dict[str, int]) -> None:
    with pytest.raises(ModelError, match=r"bytes of KV memory and .* of page memory do not fit: .* are free"):
        plan_memory(EngineConfig("m", **settings), model, CUDA, torch.bfloat16)


def test_the_workspace_grows_with_rows_and_sequences(model: ModelConfig) -> None:
    least = workspace_bytes(model, torch.bfloat16, 1, 1)
    assert workspace_bytes(model, torch.bfloat16, 1, 512) > least
    most = workspace_bytes(model, torch.bfloat16, SCORED_ROWS + 63, 1)
    assert most - least >= 63 * model.vocab_size * 42


def test_the_workspace_holds_the_logits_of_scored_prompts(model: ModelConfig) -> None:
    wide = replace(model, vocab_size=model.vocab_size + 1000)
    grown = workspace_bytes(wide, torch.bfloat16, 1, 1) - workspace_bytes(model, torch.bfloat16, 1, 1)
    assert grown >= SCORED_ROWS * 1000 * (2 + 4 + 4)


def test_gates_take_their_part_of_what_is_free(model: ModelConfig) -> None:
    plain = plan_memory(EngineConfig("m"), model, CUDA, torch.bfloat16)
    for gates, slots in ((40, 3), (0, 0)):
        config = EngineConfig("m", gates="any:factory", gate_slots=slots, gates_per_slot=max(1, gates))
        plan = plan_memory(config, model, CUDA, torch.bfloat16)
        shape = model.linear_shape
        taken = slots * 64 * shape.num_layers * sum(shape.inputs.values()) * 2
        assert plan.gates == taken
        assert plan.kv + plan.pages == pytest.approx(plain.kv + plain.pages - taken * CUDA_SHARE, abs=2)
    assert plain.gates == 0


def test_a_cpu_needs_no_workspace(model: ModelConfig) -> None:
    plan = plan_memory(EngineConfig("m", kv_memory=5), model, torch.device("cpu"), torch.float32)
    assert (plan.kv, plan.workspace) == (5, 0)
