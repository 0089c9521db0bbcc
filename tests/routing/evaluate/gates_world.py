"""Two toy tasks with random adapters and routers of the tiny chat model, and what `peft` answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_store.peft_format import read_adapter
from adapters_store.peft_write import write_peft
from adapters_store.types import TARGETS, AdapterWeights, LinearShape, LoraPair
from routing.card_adapters import CardAdapter
from routing.gate_folder import GateCard, write_gates
from routing.train.data import Task, TaskRow, read_rows, write_task
from routing.train.exact_match import greedy_answers
from server.model.config import ModelConfig

NAMES = ("ab", "xyz")
ROWS = 3


def write_tasks(folder: Path) -> Path:
    for name in NAMES:
        rows = [TaskRow(name, "toy", "Say", f"{name} {i}", name[-1] * 4, 0) for i in range(8)]
        write_task(folder, Task(name, tuple(rows[:4]), tuple(rows[4:5]), tuple(rows[5:])))
    line = {"prompt": "Both\n", "tasks": list(NAMES), "targets": ["bbbb", "zzzz"]}
    (folder / "composite").mkdir()
    (folder / "composite" / "composite_2.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def make_adapter(folder: Path, shape: LinearShape, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        return 0.3 * torch.randn(rows, columns, generator=generator)

    pairs = {
        (layer, target): LoraPair(draw(2, shape.inputs[target]), draw(shape.outputs[target], 2), 2.0)
        for layer in range(shape.num_layers)
        for target in TARGETS
    }
    write_peft(folder, AdapterWeights("", pairs))


def make_router(folder: Path, names: Sequence[str], model: Path, adapters: Path, seed: int = 0) -> Path:
    """Random gates over adapters of these names."""
    config = ModelConfig.from_folder(model)
    shape = config.linear_shape
    generator = torch.Generator().manual_seed(seed)
    gates = {
        (layer, target): torch.randn(len(names), shape.inputs[target], generator=generator)
        for layer in range(shape.num_layers)
        for target in TARGETS
    }
    rows = tuple(CardAdapter(name, read_adapter(adapters / name, shape).digest) for name in names)
    card = GateCard(config.fingerprint(), "tiny", rows, tuple(TARGETS), 1, 1.0, has_null=False, sha256="")
    write_gates(folder, card, gates)
    return folder


def given(out: Path, method: str, part: str = "tasks") -> list[dict[str, Any]]:
    for path in (out / "answers").iterdir():
        head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        if head["method"] == method and path.name.startswith(part):
            return lines
    raise AssertionError(method)


def by_peft(model: Path, adapters: Path, root: Path, task: str, name: str | None) -> list[str]:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    causal: Any = base if name is None else PeftModel.from_pretrained(base, adapters / name)
    rows = read_rows(root / task / "test.jsonl")
    return greedy_answers(causal.eval(), tokenizer, rows, 4 + 8, batch_size=8)
