"""Output tokens/s of other engines on the workload of `bench_scenarios.throughput`, measured on one H100 80GB.

Llama-3-8B shape in bf16 with random weights, 256 requests (69,317 prompt and 65,411 output tokens), all at once, at
most 64 at a time, rank-16 adapters on all seven linears, greedy, prefix cache off; best of two, which differ by up to
6 %.
"""

from collections.abc import Mapping
from types import MappingProxyType

GPU = "H100"
MODEL = "8b"
TOTALS = (69_317, 65_411)
"""Tokens of all prompts and of all outputs."""

TOKENS_PER_SECOND: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "vLLM 0.24.0": {"off": 5053, "0": 4701, "1": 2830, "8": 2560, "64": 1590},
        "SGLang 0.5.16": {"off": 5126, "0": 3241, "1": 2891, "8": 2793, "64": 2546},
    }
)
"""By the label of `workload.Traffic`: `off` is an engine started without LoRA, `0` base traffic with LoRA on."""

ENGINE_OFF = "off"
NO_RATIO = "no ratio: peers were measured on an H100"


def best(label: str) -> float | None:
    """The fastest peer for a kind of traffic.

    Base traffic is compared with the peers' best base figure, LoRA off: nothing of ours needs LoRA to be off.
    """
    label = ENGINE_OFF if label == "0" else label
    return max((figures[label] for figures in TOKENS_PER_SECOND.values() if label in figures), default=None)


def ratio(tokens_per_second: float, label: str, model: str, device: str) -> float | None:
    """Ours over the best peer's; None on another GPU or model than theirs, and for traffic that no peer serves."""
    peer = best(label)
    return tokens_per_second / peer if peer is not None and model == MODEL and GPU in device else None
