"""What all routers inside the model have in common in training: settings of the loop, and how it is carried out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from routing.gate_folder import MAX_TOP_K
from routing.train.adapter import TrainError
from routing.train.fitting import warm_linear

AUTO, BFLOAT16, FLOAT32 = "auto", "bfloat16", "float32"
PRECISIONS = (AUTO, BFLOAT16, FLOAT32)

Rule = tuple[bool, str]
"""Whether a field holds, and what it was expected to be."""


@dataclass(frozen=True, slots=True)
class RouterRecipe:
    """`top_k` experts act; `steps` of `batch_size` rows, of at most `max_length` tokens each, and AdamW's settings.

    `null`: a last row or expert stands for no adapter; it learns from tasks that have none.
    """

    top_k: int = 1
    null: bool = False
    steps: int = 300
    batch_size: int = 32
    max_length: int = 512
    warmup_steps: int = 10
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    seed: int = 0

    def share(self, step: int) -> float:
        """The part of the peak learning rates at `step`, from 0: linear up over the warm-up, linear down to zero."""
        return warm_linear(step, self.steps, self.warmup_steps)

    def check(self, experts: int) -> None:
        """Raise TrainError for the first rule that is broken, with so many experts to choose from."""
        for name, (holds, wanted) in self.rules(experts).items():
            if not holds:
                raise TrainError(f"{name} {getattr(self, name)}: expected {wanted}")

    def rules(self, experts: int) -> Mapping[str, Rule]:
        """By field."""
        most = min(MAX_TOP_K, experts)
        counts = (("steps", 1), ("batch_size", 1), ("max_length", 1), ("warmup_steps", 0))
        return {
            "top_k": (1 <= self.top_k <= most, f"1 to {most} of {experts} experts"),
            "weight_decay": at_least_zero(self.weight_decay),
            "gradient_clip": (self.gradient_clip > 0, "a number above 0"),
            **{name: whole(getattr(self, name), least) for name, least in counts},
        }


@dataclass(frozen=True, slots=True)
class RouterRun:
    """How a recipe is carried out; none of it changes the router beyond rounding.

    After training it is judged on the first `evaluation_rows` validation rows of each task; 0 leaves it out.
    `precision` is that of the model's products: "bfloat16", under autocast, twice as fast as "float32" on a CPU that
    has it in hardware (SmolLM2-135M, one core with AVX512-BF16); "auto" takes it on CUDA. What is trained is fp32.
    """

    device: str = "cpu"
    checkpoint_every: int = 50
    evaluation_rows: int = 20
    evaluation_batch: int = 20
    base_name: str = "smollm2-135m"
    name: str | None = None
    progress: bool = True
    precision: str = AUTO

    def check(self) -> None:
        """Raises TrainError for a precision that there is not."""
        if self.precision not in PRECISIONS:
            raise TrainError(f"precision {self.precision}: expected {' or '.join(PRECISIONS)}")

    def autocast(self) -> torch.autocast:
        """Around the model's passes."""
        kind = torch.device(self.device).type
        lower = self.precision == BFLOAT16 or (self.precision == AUTO and kind == "cuda")
        return torch.autocast(kind, torch.bfloat16, enabled=lower)


def at_least_zero(value: float) -> Rule:
    """Of a finite number."""
    return 0 <= value < math.inf, "a number of at least 0"


def whole(value: int, least: int) -> Rule:
    return value >= least, f"a whole number of at least {least}"
