"""An engine so small that Triton's interpreter takes a fraction of a second for a step."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from server.engine.config import EngineConfig
from server.engine.engine import Engine
from tests.conftest import HAS_GPU, SEVEN
from tests.engine.tiny_engine import Registered

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
MICRO = {"kv_memory": 1 << 17, "page_memory": 1 << 19, "max_num_seqs": 4, "max_batch_tokens": 16}


@pytest.fixture(scope="module")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So small that the interpreter takes a fraction of a second for a step."""
    folder = tmp_path_factory.mktemp("model") / "micro"
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes, **layers, **tokens)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def micro(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    """Two adapters that differ in rank and targets."""
    folders = {}
    for name, rank, targets in (("all4", 4, SEVEN), ("qv20", 20, ["q_proj", "v_proj"])):
        torch.manual_seed(rank)
        base = AutoModelForCausalLM.from_pretrained(micro_model, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
    return Registered(micro_model, folders)


def micro_engine(folder: Path, backend: str, **settings: object) -> Engine:
    options = {**MICRO, "device": DEVICE.type, "backend": backend, "cuda_graphs": "lazy", **settings}
    return Engine.from_config(EngineConfig(str(folder), **options))  # type: ignore[arg-type]
