"""Everything that decides a prompt-level router's training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from routing.prompt_router import (
    ACTIVATIONS,
    ADAPTERS,
    BY_LAYER,
    DECISIONS,
    EXPERTS,
    MODULES,
    NORMS,
    POOLINGS,
    RATIONAL,
    RMS,
    VOTE,
    RouterForm,
)
from routing.train.router_recipe import RouterRecipe, Rule, at_least_zero, whole

DEV, TRAIN, FIXED = "dev", "train", "fixed"
COEFFICIENTS = (DEV, TRAIN, FIXED)


@dataclass(frozen=True, slots=True)
class PromptRecipe(RouterRecipe):
    """What both kinds of prompt-level routers have in common.

    `norm` "rms": hidden states are divided by their root mean square before they are pooled. The papers do not say so,
    but in SmolLM2-135M the first token's are 150 times as long as all others' from layer 12 on, and would be all that
    a mean shows. `smoothing`: share of a task label that is spread over all experts. `router_rate` is the peak of the
    routers' learning rate.
    """

    pooling: str = "mean"
    activation: str = "none"
    norm: str = RMS
    smoothing: float = 0.0
    router_rate: float = 2e-3

    def rules(self, experts: int) -> Mapping[str, Rule]:
        return {
            **RouterRecipe.rules(self, experts),
            "pooling": (self.pooling in POOLINGS, " or ".join(POOLINGS)),
            "activation": (self.activation in ACTIVATIONS, " or ".join(ACTIVATIONS)),
            "norm": (self.norm in NORMS, " or ".join(NORMS)),
            "smoothing": (0 <= self.smoothing < 1, "a number from 0 to below 1"),
            "router_rate": at_least_zero(self.router_rate),
        }


@dataclass(frozen=True, slots=True)
class MoaRecipe(PromptRecipe):
    """Everything that decides a MoA router, bar the model, the adapters and the rows.

    With frozen adapters the loss is eta L_cls, the routers' mean cross-entropy against the task; AdamW hardly notices
    an eta then. `joint`: the adapters are trained on, too, at `adapter_rate`; each row goes through its own task's
    adapter, and the loss is L_LM + `eta` L_cls. `decision` and `depth` say how the routers' votes become one choice
    (`routing.prompt_router`).
    """

    decision: str = VOTE
    depth: int | None = None
    joint: bool = False
    eta: float = 1.0
    adapter_rate: float = 2e-4

    def form(self, num_layers: int, num_experts: int) -> RouterForm:
        """The router that is trained."""
        return RouterForm(
            ADAPTERS,
            num_layers,
            num_experts,
            self.top_k,
            self.pooling,
            self.activation,
            self.norm,
            self.decision,
            self.depth,
        )

    def rules(self, experts: int) -> Mapping[str, Rule]:
        return {
            **PromptRecipe.rules(self, experts),
            "decision": (self.decision in DECISIONS, " or ".join(DECISIONS)),
            "depth": (
                self.depth is None or (self.depth >= 1 and self.decision != BY_LAYER),
                "a whole number of at least 1, and none where every layer decides for itself",
            ),
            "eta": (0 < self.eta < math.inf, "a number above 0"),
            "adapter_rate": at_least_zero(self.adapter_rate),
        }


@dataclass(frozen=True, slots=True)
class MiloraRecipe(PromptRecipe):
    """Everything that decides a MiLoRA router, bar the model, the rows, and the adapters if there are any.

    `experts` "modules": a LoRA of `rank` and `alpha` on all seven linears of every layer is trained from scratch, at
    `adapter_rate`, together with the routers that choose `top_k` of the seven. "adapters": those of the tasks, frozen.
    The loss is L_LM + `balance` sum over layers of N sum_i f_i p_i, with f_i the share of the batch's prompts for which
    expert i is the most likely, and p_i its mean probability; over adapters also + `eta` times the routers' mean
    cross-entropy against the task, which the paper does not have. The rational activation's coefficients learn at
    `coefficients_rate`: on rows set apart ("dev", the paper's bi-level optimisation: a tenth of each task's training
    rows, in every `coefficients_every`-th step), with everything else ("train"), or not at all ("fixed": GeLU).
    """

    experts: str = MODULES
    top_k: int = 3
    pooling: str = "attention"
    activation: str = RATIONAL
    rank: int = 8
    alpha: int = 16
    balance: float = 1e-2
    eta: float = 1.0
    coefficients: str = DEV
    coefficients_rate: float = 1e-6
    coefficients_every: int = 1
    adapter_rate: float = 2e-3

    @property
    def dev_rows(self) -> bool:
        """Whether training rows are set apart for the coefficients."""
        return self.activation == RATIONAL and self.coefficients == DEV

    def form(self, num_layers: int, num_experts: int) -> RouterForm:
        """The router that is trained."""
        return RouterForm(
            self.experts, num_layers, num_experts, self.top_k, self.pooling, self.activation, self.norm, BY_LAYER
        )

    def rules(self, experts: int) -> Mapping[str, Rule]:
        modules = self.experts == MODULES
        return {
            **PromptRecipe.rules(self, experts),
            "experts": (self.experts in EXPERTS, " or ".join(EXPERTS)),
            "null": (not (modules and self.null), "none over modules"),
            "coefficients": (self.coefficients in COEFFICIENTS, " or ".join(COEFFICIENTS)),
            **{
                name: at_least_zero(getattr(self, name))
                for name in ("balance", "eta", "coefficients_rate", "adapter_rate")
            },
            **{name: whole(getattr(self, name), 1) for name in ("rank", "alpha", "coefficients_every")},
        }
