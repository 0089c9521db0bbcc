"""The vocabulary of adapters: target groups, one adapter's weights, and the weighted set (mix) of one request."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch

PAGE_RANK = 16
"""Rank rows of one rank page: the smallest tile that a tensor-core product takes."""


@dataclass(frozen=True)
class TargetGroup:
    """The linears of one layer that share an input, and therefore one LoRA launch.

    `targets` are PEFT's module names in the order in which their outputs are concatenated.
    """

    name: str
    targets: tuple[str, ...]


QKV = TargetGroup("qkv", ("q_proj", "k_proj", "v_proj"))
O = TargetGroup("o", ("o_proj",))  # noqa: E741 - the linear's own name
GATE_UP = TargetGroup("gate_up", ("gate_proj", "up_proj"))
DOWN = TargetGroup("down", ("down_proj",))
GROUPS = (QKV, O, GATE_UP, DOWN)
GROUP_OF = {target: group for group in GROUPS for target in group.targets}
TARGETS = tuple(GROUP_OF)


class AdapterError(ValueError):
    """An adapter that cannot be served, in one sentence for its owner; `status` is the HTTP status that fits `code`.

    `param` is the field of the request that is to blame, where it is one field.
    """

    def __init__(self, code: str, message: str, status: int = 422, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        self.param = param


@dataclass(frozen=True)
class AdapterLimits:
    """Largest adapter: `max_bytes` of its weights' file, `max_rank` of one linear (vLLM's largest, too).

    A rank page spans all layers: of an adapter on one linear of an 8B model, rank 512 takes 2.7 GB of packed weights.
    """

    max_bytes: int = 2 << 30
    max_rank: int = 512


@dataclass(frozen=True)
class LinearShape:
    """Sizes of the seven linears of one layer of the served model: `inputs[target]`, `outputs[target]` features."""

    num_layers: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]

    def group_input(self, group: TargetGroup) -> int:
        return self.inputs[group.targets[0]]

    def group_outputs(self, group: TargetGroup) -> tuple[int, ...]:
        return tuple(self.outputs[target] for target in group.targets)

    @property
    def fingerprint(self) -> str:
        """sha256 over the sizes: adapters of one shape fit any model of the same shape."""
        sizes = [self.num_layers, sorted(self.inputs.items()), sorted(self.outputs.items())]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


@dataclass(frozen=True)
class LoraPair:
    """One LoRA on one linear: y += scale * B (A x).

    a: (rank, in_features), b: (out_features, rank), same dtype; scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter in host memory: `pairs[(layer, target)]`. Linears that the adapter does not touch are absent."""

    digest: str
    pairs: Mapping[tuple[int, str], LoraPair]

    @cached_property
    def group_ranks(self) -> dict[str, int]:
        """Largest rank per target group; groups that the adapter does not touch are absent."""
        ranks: dict[str, int] = {}
        for (_, target), pair in self.pairs.items():
            name = GROUP_OF[target].name
            ranks[name] = max(ranks.get(name, 0), pair.rank)
        return ranks

    @cached_property
    def num_bytes(self) -> int:
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())


class Composition(StrEnum):
    """How the adapters of a mix combine: sum of outputs, product of averaged factors, or one of them."""

    MIXTURE = "mixture"
    FUSION = "fusion"
    SELECTION = "selection"


@dataclass(frozen=True)
class Mix:
    """The weighted set of adapters of one request: `entries` are (digest, weight), sorted by digest.

    Empty is the base model. A selection is resolved to its single entry before it becomes a mix, see `Mix.of`.
    """

    entries: tuple[tuple[str, float], ...] = ()
    composition: Composition = Composition.MIXTURE

    @classmethod
    def of(cls, entries: list[tuple[str, float]], composition: Composition = Composition.MIXTURE) -> "Mix":
        """Canonical form: one entry a digest (weights of repeated digests add up), sorted; zero weights stay out.

        `selection` keeps the entry of highest weight, the first on a tie, with weight 1. `fusion` normalises the
        weights to sum 1, and raises ValueError if they sum to 0. A fusion of one adapter is a mixture of it, one of
        nothing the base model.
        """
        if composition is Composition.SELECTION and entries:
            chosen = max(entries, key=lambda entry: entry[1])[0]
            return cls(((chosen, 1.0),))
        weights: dict[str, float] = {}
        for digest, weight in entries:
            weights[digest] = weights.get(digest, 0.0) + weight
        if composition is Composition.FUSION and entries:
            total = sum(weights.values())
            if not total:
                raise ValueError("the weights of a fusion must not sum to 0")
            weights = {digest: weight / total for digest, weight in weights.items()}
        kept = tuple(sorted((digest, weight) for digest, weight in weights.items() if weight))
        return cls(kept, composition if len(kept) > 1 else Composition.MIXTURE)

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(digest for digest, _ in self.entries)

    @cached_property
    def digest(self) -> str:
        """sha256 over the composition and the exact weights; identifies a materialised fusion."""
        text = self.composition + "".join(f"|{digest}*{weight.hex()}" for digest, weight in self.entries)
        return hashlib.sha256(text.encode()).hexdigest()


BASE = Mix()
"""The base model: no adapter."""
