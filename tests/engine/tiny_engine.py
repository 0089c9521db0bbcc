"""What tests of the whole engine share: a tiny one, what it is asked, and the texts that transformers gives."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from adapters_store.peft_format import read_adapter
from adapters_store.types import Composition, Mix
from server.engine.engine import Engine
from server.engine.sequence import FinishReason, Output, Request, SamplingParams
from server.model.config import ModelConfig
from tests.conftest import HAS_GPU

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SMALL = {"kv_memory": 1 << 22, "page_memory": 1 << 22, "device": "cuda" if HAS_GPU else "cpu", "cuda_graphs": "lazy"}
PROMPTS = [tuple((7 * row + 3 * column * column + 5) % 500 + 2 for column in range(4 + 9 * row)) for row in range(6)]


class Registered:
    """Adapters on disk by name, as requests name them."""

    def __init__(self, model: Path, folders: dict[str, Path]) -> None:
        shape = ModelConfig.from_folder(model).linear_shape
        self.weights = {name: read_adapter(folder, shape).weights for name, folder in folders.items()}
        self.paths = {self.weights[name].digest: str(folder) for name, folder in folders.items()}

    def mix(self, weights: dict[str, float], composition: Composition = Composition.MIXTURE) -> Mix:
        return Mix.of([(self.weights[name].digest, weight) for name, weight in weights.items()], composition)

    def load(self, engine: Engine) -> None:
        """Bring all of them to the device, so that requests begin in the step after they came."""
        for digest, path in self.paths.items():
            engine.adapters.prefetch(digest, path, lambda _: None)
        while engine.adapters.busy:
            engine.step()


def drain(engine: Engine) -> dict[str, list[Output]]:
    """Step until nothing is left; integrity holds after every step and every request ends exactly once."""
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            before = outputs.setdefault(output.request_id, [])
            assert not (before and before[-1].finish_reason), "an output after the ending"
            before.append(output)
        engine.check_integrity()
    return outputs


def outputs_of(engine: Engine, requests: Iterable[Request]) -> dict[str, list[Output]]:
    for request in requests:
        engine.add_request(request)
    return drain(engine)


def texts(outputs: dict[str, list[Output]]) -> dict[str, tuple[int, ...]]:
    return {name: tokens_of(own) for name, own in outputs.items()}


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, tuple[int, ...]]:
    return texts(outputs_of(engine, requests))


def tokens_of(outputs: list[Output]) -> tuple[int, ...]:
    assert outputs[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    return tuple(token for output in outputs for token in output.tokens)


def reference(model: torch.nn.Module, prompt: tuple[int, ...], count: int = 12) -> tuple[int, ...]:
    """Greedy continuation by plain full forwards."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def base_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def merged_model(folder: Path, deltas: list[tuple[float, dict[tuple[int, str], torch.Tensor]]]) -> torch.nn.Module:
    """The model with the weighted sum of dense updates added to its linears."""
    model = base_model(folder)
    for weight, delta in deltas:
        for (layer, target), update in delta.items():
            block = model.model.layers[layer]
            part = block.mlp if target in ("gate_proj", "up_proj", "down_proj") else block.self_attn
            getattr(part, target).weight.data += weight * update
    return model


def dense(registered: Registered, name: str) -> dict[tuple[int, str], torch.Tensor]:
    return {key: pair.scale * (pair.b @ pair.a) for key, pair in registered.weights[name].pairs.items()}
