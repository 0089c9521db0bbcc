"""Rows to sample, and what transformers and chance say of them."""

from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine import sampler
from server.engine.sampler import _draw
from server.engine.sequence import Request, SamplingParams, Sequence, TokenLogprobs

NO_EOS: frozenset[int] = frozenset()

CHI_SQUARE = {7: 29.88, 15: 44.26, 63: 111.6}
"""By degrees of freedom: values that chance exceeds once in 10,000. Seeds are fixed, so nothing here is random."""


def sequence(prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **params: Any) -> Sequence:
    found = Sequence.of(Request("r", prompt, SamplingParams(**params)))
    found.tokens += output
    return found


def sample(
    logits: torch.Tensor, sequences: list[Sequence], eos: frozenset[int]
) -> tuple[list[int | None], list[TokenLogprobs | None]]:
    return sampler.sample(logits, sequences, eos).to_host().read()


def draw(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    return _draw(logits, [one.request.params for one in sequences], [one.num_sampled for one in sequences])


def seeded(count: int, **params: Any) -> list[Sequence]:
    return [sequence(seed=seed, **params) for seed in range(count)]


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def reference(logits: torch.Tensor, **params: Any) -> torch.Tensor:
    """transformers' scores, in float64, in the order in which `generate` applies its warpers."""
    warpers = LogitsProcessorList()
    if "temperature" in params:
        warpers.append(TemperatureLogitsWarper(params["temperature"]))
    if params.get("top_k"):
        warpers.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(MinPLogitsWarper(params["min_p"]))
    scores = warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits.double())
    assert isinstance(scores, torch.Tensor)
    return scores
