"""Prompt-level routing from hidden states: which experts of each layer a prompt uses, decided once before its answer.

Each layer has a router that reads the hidden states of the whole prompt right before that layer: pooled to one vector,
through an activation, times a matrix of a row for each expert. Experts are the seven linears of one adapter (MiLoRA,
arXiv 2410.18035, section 3) or the adapters of a set (Mixture-of-LoRAs, arXiv 2403.03432, section 3). All arithmetic is
fp32, whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MODULES, ADAPTERS = "modules", "adapters"
EXPERTS = (MODULES, ADAPTERS)
ATTENTION, MEAN, LAST, MAX = "attention", "mean", "last", "max"
POOLINGS = (ATTENTION, MEAN, LAST, MAX)
RATIONAL, NONE, RMS = "rational", "none", "rms"
ACTIVATIONS = (RATIONAL, NONE)
NORMS = (RMS, NONE)
BY_LAYER, VOTE, LAST_LAYER = "layer", "vote", "last"
DECISIONS = (BY_LAYER, VOTE, LAST_LAYER)

GELU_A = (2.80387e-05, 0.5, 0.398502, 0.162301, 0.0640523, 0.0183169, 0.00210049)
GELU_B = (0.0, 0.324603, 0.0, 0.0366337, 0.0)
"""Least squares on [-3, 3], where it is GeLU within 1.2e-4; beyond, it stays within 2 of it up to |x| = 10."""

EPSILON = 1e-6
"""Below the root mean square of hidden states, as in the models' own norms."""


@dataclass(frozen=True, slots=True)
class RouterForm:
    """What a router computes, bar its weights.

    `experts`: "modules", the seven linears of one adapter in the order of `adapters_store.types.TARGETS`, or
    "adapters" of a set, which may be followed by a row for no adapter. `num_experts` are the rows of a layer's matrix,
    N; of these each layer uses `top_k`. `norm` "rms" divides every hidden state by its root mean square before pooling.
    `decision`: "layer", every layer by its own router; or one choice for all layers, by "vote" or of the "last" router,
    where only the routers of the first `depth` layers count (None: all).
    """

    experts: str
    num_layers: int
    num_experts: int
    top_k: int
    pooling: str
    activation: str
    norm: str
    decision: str
    depth: int | None = None

    @property
    def layered(self) -> bool:
        """Whether a router reads what the layers before it made with their own experts already in use.

        Otherwise all read hidden states of the base model, and the choice is known before any adapter acts.
        """
        return self.decision == BY_LAYER

    @property
    def num_counted(self) -> int:
        """The routers that are read: those of so many layers from the first on."""
        return self.num_layers if self.depth is None else self.depth


@dataclass(frozen=True, eq=False, slots=True)
class LayerRouter:
    """One layer's weights, fp32: `w` (N, d), `w_sa` (d) of the attention pooler, `a` (7) and `b` (5) of the rational.

    What the router's form has no use for is None.
    """

    w: Tensor
    w_sa: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None

    def logits(self, pooled: Tensor) -> Tensor:
        """(..., N) fp32 for pooled hidden states (..., d) fp32."""
        if self.a is not None and self.b is not None:
            pooled = rational(pooled, self.a, self.b)
        return torch.nn.functional.linear(pooled, self.w)


@dataclass(frozen=True, eq=False, slots=True)
class PromptRouter:
    """A router's form and the weights of all its layers."""

    form: RouterForm
    layers: tuple[LayerRouter, ...]

    def to(self, device: torch.device) -> PromptRouter:
        """The same on another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        layers = (LayerRouter(own.w.to(device), moved(own.w_sa), moved(own.a), moved(own.b)) for own in self.layers)
        return PromptRouter(self.form, tuple(layers))

    def pool(self, layer: int) -> PromptPool:
        """An empty pool for the hidden states right before this layer."""
        return PromptPool(self.form.pooling, self.form.norm, self.layers[layer].w_sa)


class PromptPool:
    """Pools one prompt's hidden states of one layer as they come, chunk by chunk; no operation waits for the device.

    Attention is MiLoRA's self-attention pooler: a = softmax over tokens of H w_sa, pooled = a^T H; here as an online
    softmax, which rescales what was summed whenever a chunk brings a higher score.
    """

    def __init__(self, pooling: str, norm: str, w_sa: Tensor | None = None) -> None:
        self._pooling = pooling
        self._norm = norm
        self._w_sa = w_sa
        self._sum: Tensor | None = None
        self._total: Tensor | float = 0.0
        self._peak: Tensor | None = None

    def update(self, hidden: Tensor) -> None:
        """The next tokens' hidden states (T, d), T at least 1, in any float dtype."""
        h = normed(hidden.float(), self._norm)
        if self._pooling == ATTENTION:
            self._attend(h)
        elif self._pooling == MEAN:
            self._sum = h.sum(dim=0) if self._sum is None else self._sum + h.sum(dim=0)
            self._total += len(h)
        elif self._pooling == LAST:
            self._sum = h[-1].clone()
        else:
            highest = h.amax(dim=0)
            self._sum = highest if self._sum is None else torch.maximum(self._sum, highest)

    def finish(self) -> Tensor:
        """The pooled vector (d) fp32. Raises ValueError if no token came."""
        if self._sum is None:
            raise ValueError("a prompt without tokens has no hidden states to pool")
        return self._sum / self._total if self._pooling in (ATTENTION, MEAN) else self._sum

    def _attend(self, h: Tensor) -> None:
        assert self._w_sa is not None
        scores = h @ self._w_sa
        peak = scores.amax() if self._peak is None else torch.maximum(self._peak, scores.amax())
        shares = torch.exp(scores - peak)
        total, pooled = shares.sum(), shares @ h
        if self._peak is not None and self._sum is not None:
            kept = torch.exp(self._peak - peak)
            total, pooled = total + kept * self._total, pooled + kept * self._sum
        self._peak, self._total, self._sum = peak, total, pooled


def pool_rows(hidden: Tensor, mask: Tensor, pooling: str, norm: str, w_sa: Tensor | None = None) -> Tensor:
    """Pools whole prompts at once: hidden (B, T, d) in any float dtype, mask (B, T) bool, to (B, d) fp32.

    Each row has at least one token in its mask; the others, padding or an answer, do not count whatever they hold, as
    long as it is finite.
    """
    h = normed(hidden.float(), norm)
    if pooling == ATTENTION:
        assert w_sa is not None
        shares = (h @ w_sa).masked_fill(~mask, -torch.inf).softmax(dim=1)
        return torch.einsum("bt,btd->bd", shares, h)
    if pooling == MEAN:
        counted = mask.to(h.dtype)
        return torch.einsum("bt,btd->bd", counted, h) / counted.sum(dim=1, keepdim=True)
    if pooling == LAST:
        places = torch.arange(mask.shape[1], device=mask.device)
        last = places.expand_as(mask).masked_fill(~mask, -1).amax(dim=1)
        return h[torch.arange(len(h), device=h.device), last]
    return h.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)


def normed(hidden: Tensor, norm: str) -> Tensor:
    """(..., d) over its root mean square, or as it is."""
    return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=EPSILON) if norm == RMS else hidden


def rational(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Ra(x) = sum_j a_j x^j / (1 + |sum_i b_i x^i|), elementwise, j from 0, i from 1 (MiLoRA)."""
    above, below = a[-1], b[-1]
    for coefficient in reversed(a[:-1].unbind()):
        above = above * x + coefficient
    for coefficient in reversed(b[:-1].unbind()):
        below = below * x + coefficient
    return above / (1 + (below * x).abs())


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """What routers decided for prompts: `chosen` (..., L, N) bool says which experts act in each of the L layers.

    `probabilities` (..., C, N) fp32 are those of the C routers that counted, 0 for experts that were not allowed;
    `preferred` (..., C, N) bool is what each of these would have taken.
    """

    probabilities: Tensor
    preferred: Tensor
    chosen: Tensor

    @property
    def agreement(self) -> Tensor:
        """(...) fp32: the share of the routers' picks that the choice follows; 1 where layers decide for themselves."""
        followed = self.preferred & self.chosen[..., : self.preferred.shape[-2], :]
        return followed.sum(dim=(-2, -1)) / self.preferred.sum(dim=(-2, -1))


def choose(logits: Tensor, form: RouterForm, allowed: Tensor | None = None) -> Choice:
    """The decision from the logits (..., C, N) fp32 of at least the routers that count.

    Ties go to the expert that comes first. Fewer experts are chosen where fewer are allowed.

    Args:
        allowed: (N) or (..., 1, N) bool, true for one at least; the others take no probability, no vote, and are never
            chosen.

    Raises:
        ValueError: there are fewer routers than the form counts.
    """
    if logits.shape[-2] < form.num_counted:
        raise ValueError(f"logits of {logits.shape[-2]} routers, expected {form.num_counted}")
    logits = logits[..., : form.num_counted, :]
    probabilities, preferred = top_experts(logits, form.top_k, allowed)
    if form.decision == BY_LAYER:
        return Choice(probabilities, preferred, preferred)
    if form.decision == VOTE:  # equal votes are decided by the mean probability, which is less than a vote
        score = preferred.sum(dim=-2) + probabilities.mean(dim=-2) / 2
        if allowed is not None:
            score = score.masked_fill(~(allowed if allowed.dim() == 1 else allowed.squeeze(-2)), -torch.inf)
        one = _highest(score, form.top_k)
    else:
        one = preferred[..., -1, :]
    return Choice(probabilities, preferred, one.unsqueeze(-2).expand(*one.shape[:-1], form.num_layers, -1))


def top_experts(logits: Tensor, top_k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax of logits (..., N) over the allowed experts, and which of them are the `top_k` most likely, bool."""
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.softmax(dim=-1), _highest(logits, top_k)


def expert_weights(chosen: Tensor, experts: str) -> Tensor:
    """fp32 weights of chosen (..., N) bool: 1 each for modules, an even share for adapters.

    MiLoRA with all modules is plain LoRA, so a chosen one counts in full; k adapters at full weight would be k times
    what each was trained to add.
    """
    weights = chosen.float()
    return weights if experts == MODULES else weights / weights.sum(dim=-1, keepdim=True)


def _highest(scores: Tensor, top_k: int) -> Tensor:
    """(..., N) bool: the `top_k` highest finite scores, of equal ones the first. `topk` breaks ties as it likes."""
    index = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True) & (scores > -torch.inf)
