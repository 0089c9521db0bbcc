"""Everything that decides a prompt-level router's training, and how it is carried out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from routing.prompt_folder import MAX_TOP_K
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
from routing.train.adapter import TrainError
from routing.train.fitting import warm_linear

DEV, TRAIN, FIXED = "dev", "train", "fixed"
COEFFICIENTS = (DEV, TRAIN, FIXED)

Rule = tuple[bool, str]
"""Whether a field holds, and what it was expected to be."""


@dataclass(frozen=True, slots=True)
class PromptRecipe:
    """What both kinds of prompt-level routers have in common.

    `norm` "rms": hidden states are divided by their root mean square before they are pooled. The papers do not say so,
    but in SmolLM2-135M the first token's are 150 times as long as all others' from layer 12 on, and would be all that
    a mean shows. `null`: a last expert stands for no adapter; it learns from tasks that have none. `smoothing`: share
    of a task label that is spread over all experts. `router_rate` is the peak of the routers' learning rate:
    linear warm-up over `warmup_steps`, then linear decay to zero at `steps`. A row has at most `max_length` tokens.
    """

    top_k: int = 1
    pooling: str = "mean"
    activation: str = "none"
    norm: str = RMS
    null: bool = False
    smoothing: float = 0.0
    router_rate: float = 2e-3
    steps: int = 300
    batch_size: int = 32
    max_length: int = 512
    warmup_steps: int = 10
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    seed: int = 0

    def share(self, step: int) -> float:
        """The part of the peak learning rates at `step`, from 0."""
        return warm_linear(step, self.steps, self.warmup_steps)

    def check(self, num_experts: int) -> None:
        """Raise TrainError for the first field that cannot be, with so many experts."""
        rules = self.rules(num_experts)
        for name in (field.name for field in fields(self)):
            holds, wanted = rules.get(name, (True, ""))
            if not holds:
                raise TrainError(f"{name} {getattr(self, name)}: expected {wanted}")

    def rules(self, num_experts: int) -> Mapping[str, Rule]:
        """By field."""
        most = min(MAX_TOP_K, num_experts)
        return {
            "top_k": (1 <= self.top_k <= most, f"1 to {most} of {num_experts} experts"),
            "pooling": (self.pooling in POOLINGS, " or ".join(POOLINGS)),
            "activation": (self.activation in ACTIVATIONS, " or ".join(ACTIVATIONS)),
            "norm": (self.norm in NORMS, " or ".join(NORMS)),
            "smoothing": (0 <= self.smoothing < 1, "a number from 0 to below 1"),
            "gradient_clip": (self.gradient_clip > 0, "a number above 0"),
            **{name: at_least_zero(getattr(self, name)) for name in ("router_rate", "weight_decay")},
            **{
                name: (getattr(self, name) >= least, f"a whole number of at least {least}")
                for name, least in (("steps", 1), ("batch_size", 1), ("max_length", 1), ("warmup_steps", 0))
            },
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

    def rules(self, num_experts: int) -> Mapping[str, Rule]:
        return {
            **PromptRecipe.rules(self, num_experts),
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

    def rules(self, num_experts: int) -> Mapping[str, Rule]:
        modules = self.experts == MODULES
        return {
            **PromptRecipe.rules(self, num_experts),
            "experts": (self.experts in EXPERTS, " or ".join(EXPERTS)),
            "null": (not (modules and self.null), "none over modules"),
            "coefficients": (self.coefficients in COEFFICIENTS, " or ".join(COEFFICIENTS)),
            **{
                name: at_least_zero(getattr(self, name))
                for name in ("balance", "eta", "coefficients_rate", "adapter_rate")
            },
            **{
                name: (getattr(self, name) >= 1, "a whole number of at least 1")
                for name in ("rank", "alpha", "coefficients_every")
            },
        }


@dataclass(frozen=True, slots=True)
class PromptRun:
    """How a recipe is carried out; none of it changes the routers beyond rounding.

    After training the routers are judged on the first `evaluation_rows` validation rows of each task; 0 leaves it out.
    """

    device: str = "cpu"
    checkpoint_every: int = 50
    evaluation_rows: int = 20
    evaluation_batch: int = 20
    base_name: str = "smollm2-135m"
    name: str | None = None
    progress: bool = True


def at_least_zero(value: float) -> Rule:
    """Of a finite number."""
    return 0 <= value < math.inf, "a number of at least 0"
