"""Everything that decides a token-level router's training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from routing.train.router_recipe import RouterRecipe, Rule, at_least_zero

BETA = 5.0
"""Weight of the gates' loss beside the language model's. MeteoRA's own experiments take 50.

SmolLM2-135M with the demo's seven adapters, after 40 steps of 8 rows, one seed, 42 validation rows: L_LM is 0.05 with 5
and 0.21 with 50, while the gates are equally often right (44.6% and 43.8% of all positions). With eleven adapters, 300
steps of 32 rows, 1,650 test rows, top 2, answers are 50.2, 66.5, 66.7, 66.2 and 65.8% right with 0, 1, 5, 20 and 50.
"""

LEARNING_RATE = 5e-3
"""The peak that was measured longest: 160 steps of 8 rows, a quarter of them packed, seed 0.

SmolLM2-135M with the demo's seven adapters: the gates' highest logit is the task's at 62.3% of all positions, and at
90.7% of those where the prompts differ.
"""

ALL, ANSWER = "all", "answer"
POSITIONS = (ALL, ANSWER)


@dataclass(frozen=True, slots=True)
class MeteoraRecipe(RouterRecipe):
    """Everything that decides the router, bar the model, the adapters and the rows.

    The loss is L_LM + `beta` L_gate. L_LM counts answers, with `prompts_count` prompts too. L_gate counts the positions
    `gate_positions`: "all", or those that predict a token of an "answer"; its labels are smoothed by `smoothing`.
    `white`: the gates learn in a basis in which their inputs are white (`gate_basis`). `joint`: the adapters learn,
    too, as in the published code (the paper says that only gates do). `reworded` is the share of rows whose instruction
    has other words (`rewording`), `packed` that of samples that are rows of two or three tasks in one sequence.
    `learning_rate` is the gates' peak, `adapter_rate` that of the adapters: linear warm-up over `warmup_steps`, then a
    cosine to zero at `steps`. A row has at most `max_length` tokens, and so has a pack.
    """

    top_k: int = 2
    temperature: float = 1.0
    white: bool = False
    joint: bool = False
    adapter_rate: float = 2e-4
    beta: float = BETA
    smoothing: float = 0.0
    gate_positions: str = ALL
    prompts_count: bool = False
    reworded: float = 0.0
    packed: float = 0.0
    learning_rate: float = LEARNING_RATE
    steps: int = 600
    batch_size: int = 16
    warmup_steps: int = 20

    def share(self, step: int) -> float:
        """The part of the peak learning rates at `step`, from 0: linear up, then a cosine down to zero."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * done))

    def rules(self, experts: int) -> Mapping[str, Rule]:
        """`experts` counts the row for no adapter, too."""
        return {
            **RouterRecipe.rules(self, experts),
            "temperature": (0 < self.temperature < math.inf, "a number above 0"),
            "beta": (
                0 <= self.beta < math.inf and (self.beta > 0 or self.top_k > 1),
                "a number of at least 0, and above it with top_k 1, where nothing but L_gate trains the gates",
            ),
            "smoothing": (0 <= self.smoothing < 1, "a number from 0 to below 1"),
            "gate_positions": (self.gate_positions in POSITIONS, " or ".join(POSITIONS)),
            **{name: (0 <= getattr(self, name) <= 1, "a share from 0 to 1") for name in ("reworded", "packed")},
            **{name: at_least_zero(getattr(self, name)) for name in ("adapter_rate", "learning_rate")},
        }
