"""The routers that come with the demo belong to the adapters that come with it, and are small."""

import json

import pytest

from adapters_store.peft_format import read_adapter
from deploy.demo import train
from deploy.demo.requests import GATES, ROUTERS
from deploy.demo.run import ADAPTERS
from deploy.demo.tasks import TASKS
from routing.gate_folder import read_gates
from routing.prompt_folder import read_prompt_router
from server.model.config import ModelConfig

SMOLLM2 = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
).linear_shape


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_over_the_demos_adapters(name: str) -> None:
    folder = ADAPTERS.parent / name
    card = read_gates(folder, SMOLLM2) if name == GATES else read_prompt_router(folder, SMOLLM2)
    digests = {task: read_adapter(ADAPTERS / task, SMOLLM2).digest for task in TASKS}
    assert {adapter.name: adapter.digest for adapter in card.adapters} == digests
    assert (card.name, card.base_name) == (name, "smollm2-135m")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    recipe = {"gates": train.GATES, "moa": train.MOA, "milora": train.MILORA}[name]
    for field, value in card.training["recipe"].items():
        assert getattr(recipe, field) == value
    assert card.training["metrics"]["tasks"].keys() == TASKS.keys()


def test_its_command_is_named_like_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ROUTERS)
    assert json.loads((ADAPTERS / "summary.json").read_text())["tasks"].keys() == TASKS.keys()
