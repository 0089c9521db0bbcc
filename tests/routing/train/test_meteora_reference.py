"""A token-level router's training against a plain loop, written from the formulas, with no setting at its default."""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from meteora_world import toy_task, write_adapter
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_store.linear_names import Module, module_path
from adapters_store.types import AdapterWeights
from routing.gate_folder import load_gates
from routing.train.batches import encode
from routing.train.meteora import train_meteora
from routing.train.meteora_recipe import MeteoraRecipe
from routing.train.mixed_batches import Mixture, Sample
from routing.train.rewording import Versions, vocabulary
from routing.train.router_recipe import RouterRun

RECIPE = MeteoraRecipe(
    top_k=2,
    temperature=3.0,
    null=True,
    white=True,
    joint=True,
    adapter_rate=0.02,
    beta=0.7,
    smoothing=0.2,
    gate_positions="answer",
    prompts_count=True,
    reworded=0.5,
    packed=0.6,
    learning_rate=0.05,
    steps=4,
    batch_size=3,
    max_length=60,
    warmup_steps=2,
    weight_decay=0.3,
    gradient_clip=0.1,
    seed=5,
)
TASKS = [toy_task("ab", "ab"), toy_task("plain", "pq"), toy_task("xyz", "xyz")]
LABELS = (0, 2, 1)
MODULES = [(layer, target) for layer in range(2) for target in ("q_proj", "o_proj", "down_proj")]


@pytest.fixture(scope="module")
def written(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[AdapterWeights]]:
    root = tmp_path_factory.mktemp("adapters")
    weights = [
        write_adapter(root / "ab", chat_model, {"q_proj": 2, "down_proj": 5}, seed=1),
        write_adapter(root / "xyz", chat_model, {"down_proj": 3, "o_proj": 8}, seed=2, layers=1),
    ]
    return {name: root / name for name in ("ab", "xyz")}, weights


class PlainModel:
    """The model of `transformers`, with what gates and adapters add as hooks; one sequence at a time."""

    def __init__(self, folder: Path, adapters: list[AdapterWeights]) -> None:
        self.causal = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
        self.logits: dict[Module, Tensor] = {}
        self.gates: dict[Module, Tensor] = {}
        self.bases: dict[Module, Tensor] = {}
        self.factors: dict[tuple[int, Module, str], Tensor] = {}
        self.forced: int | None = None
        self.seen: dict[Module, list[Tensor]] = {module: [] for module in MODULES}
        for row, weights in enumerate(adapters):
            for module, pair in weights.pairs.items():
                for name in ("a", "b"):
                    self.factors[row, module, name] = getattr(pair, name).clone().requires_grad_()
        for module in MODULES:
            linear = self.causal.get_submodule(module_path(*module))
            self.gates[module] = torch.zeros(3, linear.in_features, requires_grad=True)
            linear.register_forward_hook(self._hook(module, adapters))

    def _hook(self, module: Module, adapters: list[AdapterWeights]) -> Callable[..., Tensor]:
        def added(_: object, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = inputs[0]
            if self.forced is None:
                self.logits[module] = x @ (self.gates[module] @ self.bases[module]).T
                values, rows = self.logits[module].topk(2, dim=-1)
                shares = torch.exp(values / 3.0) / torch.exp(values / 3.0).sum(-1, keepdim=True)
            else:
                self.seen[module].append(x[0].detach())
                rows, shares = torch.tensor([self.forced]), torch.ones(1)
            for row, weights in enumerate(adapters):
                if module in weights.pairs:
                    a, b = (self.factors[row, module, name] for name in ("a", "b"))
                    share = torch.where(rows == row, shares, 0.0).sum(-1, keepdim=True)
                    y = y + share * weights.pairs[module].scale * (x @ a.T @ b.T)
            return y

        return added

    def look(self, rows: list[tuple[int, tuple[int, ...]]]) -> None:
        """Bases W in which W x has second moments of 1, or less below the median, over rows under adapters."""
        for forced, ids in rows:
            self.forced = forced
            self.causal(input_ids=torch.tensor([ids]))
        self.forced = None
        for module, parts in self.seen.items():
            x = torch.cat(parts).double()
            values, vectors = torch.linalg.eigh(x.T @ x / len(x))
            scales = torch.maximum(values, values.sort().values[(len(values) - 1) // 2]) ** -0.5
            self.bases[module] = (vectors @ torch.diag(scales) @ vectors.T).float()

    def losses(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """L_LM over all tokens but the first of each row; L_gate where a token of an answer is predicted."""
        of_language, of_gates = [], []
        for sample in samples:
            ids = [token for _, example in sample for token in example.ids]
            scores = self.causal(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            start = 0
            for task, example in sample:
                stop = start + len(example.ids)
                of_language += [-scores[at - 1, ids[at]] for at in range(start + 1, stop)]
                for at in range(stop - example.answer_length - 1, stop - 1):
                    for logits in self.logits.values():
                        shares = logits[0, at].log_softmax(-1)
                        of_gates.append(-0.8 * shares[LABELS[task]] - 0.2 * shares.mean())
                start = stop
        return torch.stack(of_language).mean(), torch.stack(of_gates).mean()


def moved(weight: Tensor, gradient: Tensor, moments: list[Tensor], step: int, rate: float) -> None:
    """AdamW, in place: decay by 0.3 of the rate, moments of 0.9 and 0.999."""
    moments[0] = 0.9 * moments[0] + 0.1 * gradient
    moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
    mean, square = moments[0] / (1 - 0.9 ** (step + 1)), moments[1] / (1 - 0.999 ** (step + 1))
    with torch.no_grad():
        weight *= 1 - 0.3 * rate
        weight -= rate * mean / (square.sqrt() + 1e-8)


def test_gates_end_where_a_plain_loop_ends(
    chat_model: Path, written: tuple[dict[str, Path], list[AdapterWeights]], tmp_path: Path
) -> None:
    kept = {"top_k"}  # two of three rows, the only number between one row and all
    assert {field.name for field in fields(RECIPE) if getattr(RECIPE, field.name) == field.default} == kept
    run = RouterRun(progress=False, evaluation_rows=0, base_name="tiny")
    result = train_meteora(chat_model, TASKS, written[0], tmp_path / "router", RECIPE, run)
    tokenizer: Any = AutoTokenizer.from_pretrained(chat_model)
    rows = [encode(tokenizer, task.train, 60) for task in TASKS]
    words = vocabulary(tokenizer)
    versions = [Versions(tokenizer, task.train, own, words, 0.5, 60, 5) for task, own in zip(TASKS, rows, strict=True)]
    mixture = Mixture(versions, 3, 5, 0.6, 60)
    model = PlainModel(chat_model, written[1])
    model.look([(label, example.ids) for label, own in zip(LABELS, rows, strict=True) for example in own[:16]])
    learned: dict[object, Tensor] = {**model.gates, **model.factors}
    moments = {key: [torch.zeros(()), torch.zeros(())] for key in learned}
    losses, norms, lengths = [], [], []
    for step, rate in enumerate((0.025, 0.05, 0.05, 0.025)):  # warmed up in two, then half a cosine's period
        samples = mixture.samples(step)
        lengths += [len(sample) for sample in samples]
        language, gate = model.losses(samples)
        gradients = torch.autograd.grad(language + 0.7 * gate, list(learned.values()))
        norms.append(math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients)))
        for (key, weight), gradient in zip(learned.items(), gradients, strict=True):
            own_rate = rate if key in model.gates else 0.4 * rate
            moved(weight, gradient * min(1.0, 0.1 / norms[-1]), moments[key], step, own_rate)
        losses.append((language.item(), gate.item()))
    assert min(lengths) == 1
    assert max(lengths) > 1
    assert max(norms) > 0.1
    assert result.losses == tuple(pytest.approx(pair, rel=1e-4) for pair in losses)
    for module, gate in load_gates(result.folder).items():
        expected = model.gates[module].detach() @ model.bases[module]
        torch.testing.assert_close(gate, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    for row, name in enumerate(("ab", "xyz")):
        stored = load_file(tmp_path / "router" / "adapters" / name / "adapter_model.safetensors")
        assert len(stored) == 2 * len(written[1][row].pairs)
        for module in written[1][row].pairs:
            for factor in ("a", "b"):
                found = stored[f"base_model.model.{module_path(*module)}.lora_{factor.upper()}.weight"]
                assert found.dtype == torch.bfloat16
                wanted = model.factors[row, module, factor].detach()
                torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=2e-4)
