"""Everything that decides a token-level router's training, and how it is carried out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from routing.gate_folder import MAX_TOP_K
from routing.train.adapter import TrainError

BETA = 5.0
"""Weight of the gates' loss beside the language model's. MeteoRA's own experiments take 50.

SmolLM2-135M with the demo's seven adapters, after 40 steps of 8 rows, one seed, 42 validation rows: L_LM is 0.05 with 5
and 0.21 with 50, while the gates are equally often right (44.6% and 43.8% of all positions).
"""

LEARNING_RATE = 5e-3
"""The peak that was measured longest: 160 steps of 8 rows, a quarter of them packed, seed 0.

SmolLM2-135M with the demo's seven adapters: the gates' highest logit is the task's at 62.3% of all positions, and at
90.7% of those where the prompts differ.
"""

ALL, ANSWER = "all", "answer"
POSITIONS = (ALL, ANSWER)


@dataclass(frozen=True, slots=True)
class MeteoraRecipe:
    """Everything that decides the router, bar the model, the adapters and the rows.

    The loss is L_LM + `beta` L_gate. L_LM counts answers, with `prompts_count` prompts too. L_gate counts the positions
    `gate_positions`: "all", or those that predict a token of an "answer"; its labels are smoothed by `smoothing`.
    `null`: one more row of the gates stands for no adapter; it learns from tasks that have none. `joint`: the adapters
    learn, too, as in the published code (the paper says that only gates do). `packed` is the share of samples that are
    rows of two or three tasks in one sequence. `learning_rate` is the gates' peak, `adapter_rate` that of the adapters:
    linear warm-up over `warmup_steps`, then a cosine to zero at `steps`. A row has at most `max_length` tokens, and so
    has a pack.
    """

    top_k: int = 2
    temperature: float = 1.0
    null: bool = False
    joint: bool = False
    adapter_rate: float = 2e-4
    beta: float = BETA
    smoothing: float = 0.0
    gate_positions: str = ALL
    prompts_count: bool = False
    packed: float = 0.0
    learning_rate: float = LEARNING_RATE
    steps: int = 600
    batch_size: int = 16
    max_length: int = 512
    warmup_steps: int = 20
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    seed: int = 0

    def share(self, step: int) -> float:
        """The part of the peak learning rate at `step`, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * done))

    def check(self, adapters: int) -> None:
        """Raise TrainError for the first field that cannot be, with so many adapters."""
        rows = adapters + self.null
        most = min(MAX_TOP_K, rows)
        expected: Mapping[str, tuple[bool, str]] = {
            "top_k": (1 <= self.top_k <= most, f"1 to {most} of the gates' {rows} rows"),
            "temperature": (0 < self.temperature < math.inf, "a number above 0"),
            "beta": (
                0 <= self.beta < math.inf and (self.beta > 0 or self.top_k > 1),
                "a number of at least 0, and above it with top_k 1, where nothing but L_gate trains the gates",
            ),
            "adapter_rate": (0 <= self.adapter_rate < math.inf, "a number of at least 0"),
            "smoothing": (0 <= self.smoothing < 1, "a number from 0 to below 1"),
            "gate_positions": (self.gate_positions in POSITIONS, " or ".join(POSITIONS)),
            "packed": (0 <= self.packed <= 1, "a share from 0 to 1"),
            "learning_rate": (0 <= self.learning_rate < math.inf, "a number of at least 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a number of at least 0"),
            "gradient_clip": (self.gradient_clip > 0, "a number above 0"),
            **{
                name: (getattr(self, name) >= least, f"a whole number of at least {least}")
                for name, least in (("steps", 1), ("batch_size", 1), ("max_length", 1), ("warmup_steps", 0))
            },
        }
        for name in (field.name for field in fields(self)):
            holds, wanted = expected.get(name, (True, ""))
            if not holds:
                value: Any = getattr(self, name)
                raise TrainError(f"{name} {value}: expected {wanted}")


@dataclass(frozen=True, slots=True)
class MeteoraRun:
    """How a recipe is carried out; none of it changes the gates beyond rounding.

    After training the gates are judged on the first `evaluation_rows` validation rows of each task; 0 leaves it out.
    """

    device: str = "cpu"
    checkpoint_every: int = 50
    evaluation_rows: int = 20
    evaluation_batch: int = 20
    base_name: str = "smollm2-135m"
    name: str | None = None
    progress: bool = True
