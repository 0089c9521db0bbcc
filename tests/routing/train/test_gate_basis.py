"""The basis of a gate: inputs are white in it, and they are those of the model under each task's own adapter."""

from pathlib import Path
from typing import Any

import torch
from meteora_world import toy_task, write_adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from routing.train.batches import encode
from routing.train.gate_basis import white_bases, white_basis
from routing.train.meteora_model import load_gated_model
from routing.train.meteora_recipe import MeteoraRecipe

WIDTH = 12


def test_inputs_are_white_where_they_vary_more_than_the_median() -> None:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.logspace(-1, 1, WIDTH)
    x = torch.randn(500, WIDTH, generator=generator) @ mix.T
    second = x.T @ x / len(x)
    basis = white_basis(second)
    torch.testing.assert_close(basis, basis.T)
    variances = torch.linalg.eigvalsh(second.double())
    expected = (variances / variances.sort().values[(WIDTH - 1) // 2]).clamp_max(1).float()
    z = x @ basis.T
    found = torch.linalg.eigvalsh(z.T @ z / len(z))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_inputs_that_are_all_alike_have_a_basis() -> None:
    for x in (torch.zeros(1, WIDTH), torch.ones(1, WIDTH)):
        assert torch.isfinite(white_basis(x.T @ x)).all()


def test_second_moments_are_those_under_each_tasks_own_adapter(chat_model: Path, tmp_path: Path) -> None:
    tasks = [toy_task("ab", "ab"), toy_task("none", "xyz")]
    targets = {"q_proj": 2, "v_proj": 2, "down_proj": 5}
    weights = write_adapter(tmp_path / "ab", chat_model, targets, seed=1)
    causal, tokenizer = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
    rows = [encode(tokenizer, task.train, 80) for task in tasks]
    modules = [(layer, target) for layer in range(2) for target in targets]
    found = white_bases(causal, tokenizer.pad_token_id, modules, [(weights, rows[0]), (None, rows[1])])
    assert found[1, "q_proj"] is found[1, "v_proj"]
    seen: dict[str, list[torch.Tensor]] = {"q_proj": [], "down_proj": []}
    adapted: Any = PeftModel.from_pretrained(causal, tmp_path / "ab").eval()
    layer = adapted.base_model.model.model.layers[1]
    for name, linear in (("q_proj", layer.self_attn.q_proj), ("down_proj", layer.mlp.down_proj)):
        linear.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0][0].detach()))
    with torch.no_grad():
        for example in rows[0]:
            adapted(input_ids=torch.tensor([example.ids]))
        with adapted.disable_adapter():
            for example in rows[1]:
                adapted(input_ids=torch.tensor([example.ids]))
    for name, parts in seen.items():
        x = torch.cat(parts)
        torch.testing.assert_close(found[1, name], white_basis(x.T @ x / len(x)), atol=1e-2, rtol=1e-2)


def test_gates_learn_in_it_if_the_recipe_says_so(chat_model: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "ab", chat_model, {"q_proj": 2, "k_proj": 2}, seed=1)
    tasks, adapters = [toy_task("ab", "ab"), toy_task("none", "xyz")], {"ab": tmp_path / "ab"}
    for white in (False, True):
        model = load_gated_model(chat_model, tasks, adapters, MeteoraRecipe(null=True, white=white), "cpu")
        assert all((linear.basis is not None) == white for linear in model.linears.values())
