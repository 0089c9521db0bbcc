"""Fixtures shared by all tests: tiny random models and adapters, and the real model where it has been pulled."""

import gc
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported: Triton decides by it at import

from hypothesis import HealthCheck, settings
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.byte_tokenizer import byte_level_tokenizer

SLOW_SECONDS = 600.0
"""A slow test's, where it has no limit of its own. Beside four other processes on two cores 180 were too few."""
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MakeAdapter = Callable[..., Path]

# An example that took long, or was long in the making, says that the machine is busy, and nothing about what is tested.
# And the examples are the same every time: `pytest --hypothesis-profile explore` looks for others.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", PATIENT, derandomize=False)
settings.register_profile("patient", PATIENT, derandomize=True)
settings.load_profile("patient")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow ones have more time, and what needs a GPU is left out where there is none."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
    if HAS_GPU:
        return
    left_out = [item for item in items if "gpu" in item.keywords and item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays until the end: the garbage collector does not look at it, then or later.

    It took a third of the time of collecting, and then 0.4 seconds for half a million objects each time, a fifth of all
    that the tests of the server took.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers, whose greedy texts are neither constant nor near ties."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer beside it, in a folder `tiny` that nobody may change."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_model, folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """`make_adapter(name, seed=..., **LoraConfig options)` saves a random adapter of the tiny model with peft."""
    root = tmp_path_factory.mktemp("adapters")

    def make(name: str, *, seed: int = 0, strength: float = 0.3, **options: object) -> Path:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": SEVEN, "task_type": "CAUSAL_LM", **options})
        model = get_peft_model(base, config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=strength)
        model.save_pretrained(root / name)
        return root / name

    return make


@pytest.fixture(scope="session")
def adapters(make_adapter: MakeAdapter) -> dict[str, Path]:
    """Four adapters that differ in rank, scaling and targets."""
    return {
        "all4": make_adapter("all4", seed=10),
        "wide24": make_adapter("wide24", seed=11, r=24, lora_alpha=16, strength=0.12),
        "rslora8": make_adapter("rslora8", seed=12, r=8, lora_alpha=8, use_rslora=True, strength=0.2),
        "qv16": make_adapter("qv16", seed=13, r=16, target_modules=["q_proj", "v_proj"], strength=0.2),
    }


def pulled(name: str) -> Path:
    """The folder that `loramux pull` made of a model; tests never download one themselves."""
    root = os.environ.get("LORAMUX_DATA_DIR") or Path.home() / ".local" / "share" / "loramux"
    folder = Path(root) / "models" / name
    if not folder.is_dir():
        pytest.fail(f"{folder} is missing: run `loramux pull {name}` first, as `make test` does")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return pulled("smollm2-135m")


@pytest.fixture(scope="session")
def minilm() -> Path:
    return pulled("all-minilm-l6-v2")
