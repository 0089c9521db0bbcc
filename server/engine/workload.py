"""What the benchmarks ask for: random models, random adapters without files, requests and their arrivals.

Everything follows from a seed; nothing reads a clock or a disk.
"""

import hashlib
import json
import re
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from adapters_store.pages import PackedAdapter, pack
from adapters_store.types import AdapterWeights, LinearShape, LoraPair, Mix
from kernels.shapes import ModelShape
from server.engine.gates import GateUse
from server.engine.sequence import Request, SamplingParams

DIGITS = re.compile(r"(\d+)|mix(\d+)(?:of(\d+))?|off|top(\d+)of(\d+)")
ROUTER = "synthetic/router"
MIX_POOL = 64


def write_config(shape: ModelShape, folder: Path, dtype: str = "bfloat16") -> None:
    """The config.json of a Llama of this shape; its weights are for `load_format="random"` to make."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "eos_token_id": 1,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


class SyntheticAdapters:
    """Random adapters of one rank on chosen linears, any number of them, with no files behind them.

    Adapter i has the packed tensors of set i mod `num_sets`, so that thousands take little host memory, page-locked if
    `pinned`; the device holds pages of its own for each. A: std 1/sqrt(in), B: std 0.01, scale 1: every adapter moves
    the hidden state, by little.
    """

    def __init__(
        self,
        shape: LinearShape,
        *,
        rank: int,
        targets: Rows[str],
        dtype: torch.dtype,
        seed: int,
        num_sets: int = 1,
        pinned: bool = False,
    ) -> None:
        self.seed = seed
        self.rank = rank
        generator = torch.Generator().manual_seed(seed)
        sets = (_random_pairs(shape, rank, targets, dtype, generator) for _ in range(num_sets))
        self._sets = [pack(AdapterWeights("", pairs), shape, dtype, pinned=pinned) for pairs in sets]

    def digest(self, index: int) -> str:
        return hashlib.sha256(f"synthetic {self.seed} {index}".encode()).hexdigest()

    def path(self, index: int) -> str:
        return f"synthetic/{index}"

    def read(self, digest: str, path: str) -> PackedAdapter:
        """In place of `folder_reader`. Raises ValueError for a digest that is not that of the path's adapter."""
        index = int(path.rpartition("/")[2])
        if digest != self.digest(index):
            raise ValueError(f"{path} has digest {self.digest(index)[:12]}, expected {digest[:12]}")
        return replace(self._sets[index % len(self._sets)], digest=digest)

    @property
    def num_bytes(self) -> int:
        """Host bytes that the tier counts for one adapter."""
        return self._sets[0].num_bytes

    def mix(self, indices: Rows[int], weights: Rows[float]) -> Mix:
        return Mix.of([(self.digest(i), weight) for i, weight in zip(indices, weights, strict=True)])


def _random_pairs(
    shape: LinearShape, rank: int, targets: Rows[str], dtype: torch.dtype, generator: torch.Generator
) -> dict[tuple[int, str], LoraPair]:
    """Pairs of one random tensor for all layers: windows into it differ by layer and linear."""
    largest = rank * max(max(shape.inputs[t], shape.outputs[t]) for t in targets)
    shifts = 64 * shape.num_layers * len(targets)
    noise = torch.randn(largest + shifts, generator=generator)
    pairs = {}
    for place, (layer, target) in enumerate((n, t) for n in range(shape.num_layers) for t in targets):
        inputs, outputs = shape.inputs[target], shape.outputs[target]
        window = noise[64 * place :]
        a = (window[: rank * inputs].view(rank, inputs) * inputs**-0.5).to(dtype)
        b = (window[: rank * outputs].view(outputs, rank) * 0.01).to(dtype)
        pairs[layer, target] = LoraPair(a, b, 1.0)
    return pairs


@dataclass(frozen=True)
class Traffic:
    """Which adapters requests use: request i takes `per_request` of `adapters` ones; 0 adapters is the base model.

    One a request: adapter i mod `adapters`. More: a random set with weights uniform in [0.2, 1]. `top_k`: every
    request has all of them behind gates, which choose so many for each token.
    """

    label: str
    adapters: int
    per_request: int
    top_k: int = 0

    @classmethod
    def parse(cls, label: str) -> "Traffic":
        """`0`, `8`, `mix3` (of 64), `mix2of28`, `top2of28`, or `off`: the base model, with the smallest possible page
        pool.

        Raises ValueError for anything else.
        """
        match = DIGITS.fullmatch(label)
        if match is None:
            raise ValueError(f"traffic is {label!r}, expected off, a number of adapters, mixK, mixKofN or topKofN")
        count, per_request, pool, top_k, behind = (None if part is None else int(part) for part in match.groups())
        if top_k is not None and behind is not None:
            if not 1 <= top_k <= behind:
                raise ValueError(f"traffic is {label!r}, expected at most {behind} and at least 1 adapters a token")
            return cls(label, behind, behind, top_k)
        if per_request is not None:
            pool = MIX_POOL if pool is None else pool
            if not 1 <= per_request <= pool:
                raise ValueError(f"traffic is {label!r}, expected at most {pool} and at least 1 adapters a request")
            return cls(label, pool, per_request)
        return cls(label, count or 0, 1 if count else 0)

    def mixes(self, count: int, adapters: SyntheticAdapters, seed: int) -> list[Mix]:
        """The mix of each of `count` requests."""
        if not self.adapters:
            return [Mix()] * count
        if self.top_k:
            return [adapters.mix(range(self.adapters), [1.0] * self.adapters)] * count
        if self.per_request == 1:
            return [adapters.mix([i % self.adapters], [1.0]) for i in range(count)]
        rng = np.random.default_rng([seed, 2])
        chosen = [rng.choice(self.adapters, self.per_request, replace=False).tolist() for _ in range(count)]
        return [adapters.mix(indices, rng.uniform(0.2, 1.0, len(indices)).tolist()) for indices in chosen]

    def gates(self, adapters: SyntheticAdapters) -> GateUse | None:
        """What requests want of the router, if there is one."""
        if not self.top_k:
            return None
        rows = tuple(adapters.digest(i) for i in range(self.adapters))
        return GateUse(f"{ROUTER}-{self.adapters}", ROUTER, rows, self.top_k, 1.0)

    def distinct(self, rows: int) -> int:
        """The most adapters that `rows` requests can use at once."""
        return min(self.adapters, rows * self.per_request)


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompt and of the output, by request."""

    prompts: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def uniform(
        cls, count: int, shortest: int, longest: int, seed: int, totals: tuple[int, int] | None = None
    ) -> "Lengths":
        """Independent and uniform in [shortest, longest], both ends included.

        `totals` are sums of prompts and of outputs to hit exactly, by moving random lengths a token at a time: so that
        two engines are compared on the same number of tokens. Raises ValueError where no such lengths exist.
        """
        rng = np.random.default_rng([seed, 0])
        drawn = rng.integers(shortest, longest, (2, count), endpoint=True)
        if totals is not None:
            for lengths, total in zip(drawn, totals, strict=True):
                _move_to(lengths, total, shortest, longest, rng)
        return cls(tuple(drawn[0].tolist()), tuple(drawn[1].tolist()))

    @classmethod
    def constant(cls, count: int, prompt: int, output: int) -> "Lengths":
        return cls((prompt,) * count, (output,) * count)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(p + o for p, o in zip(self.prompts, self.outputs, strict=True))

    def cut(self, count: int, output: int) -> "Lengths":
        """The first `count` requests with at most `output` tokens each: the same load, shorter."""
        return Lengths(self.prompts[:count], tuple(min(length, output) for length in self.outputs[:count]))


def _move_to(lengths: np.ndarray, total: int, shortest: int, longest: int, rng: np.random.Generator) -> None:
    if not shortest * len(lengths) <= total <= longest * len(lengths):
        raise ValueError(f"{len(lengths)} lengths in [{shortest}, {longest}] cannot sum to {total}")
    while missing := total - int(lengths.sum()):
        step = 1 if missing > 0 else -1
        movable = np.flatnonzero(lengths < longest if step > 0 else lengths > shortest)
        chosen = rng.permutation(movable)[: abs(missing)]
        lengths[chosen] += step


@dataclass(frozen=True)
class Workload:
    """Requests, and when each arrives, in seconds from the start."""

    requests: tuple[Request, ...]
    arrivals: tuple[float, ...]

    @cached_property
    def output_tokens(self) -> int:
        return sum(request.params.max_tokens for request in self.requests)

    @cached_property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)


def make_workload(
    name: str,
    lengths: Lengths,
    mixes: Rows[Mix],
    adapters: SyntheticAdapters,
    *,
    vocab_size: int,
    seed: int,
    arrivals: Rows[float] | None = None,
    num_adapters: int = 0,
    gates: GateUse | None = None,
) -> Workload:
    """Greedy requests that ignore the end of text, with random prompts; all at once unless `arrivals` are given.

    `num_adapters`: the first so many adapters may occur in `mixes`.
    """
    rng = np.random.default_rng([seed, 1])
    paths = {adapters.digest(i): adapters.path(i) for i in range(num_adapters)}
    requests = []
    for i, (prompt, output, mix) in enumerate(zip(lengths.prompts, lengths.outputs, mixes, strict=True)):
        tokens = tuple(rng.integers(2, vocab_size, prompt).tolist())
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        own = {digest: paths[digest] for digest in mix.digests}
        key = b"".join(d.encode() for d in mix.digests)
        requests.append(Request(f"{name}-{i}", tokens, params, mix, own, key, gates=gates))
    return Workload(tuple(requests), tuple(arrivals) if arrivals is not None else (0.0,) * len(requests))


def gamma_arrivals(count: int, rate: float, seed: int, variation: float = 1.0) -> list[float]:
    """Arrival times, in seconds, of `count` requests at `rate` a second; gaps are gamma distributed.

    `variation` is their coefficient of variation; 1 is a Poisson process.
    """
    shape = variation**-2
    gaps = np.random.default_rng([seed, 3]).gamma(shape, 1.0 / (shape * rate), count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def popular(count: int, adapters: int, exponent: float, seed: int) -> list[int]:
    """Adapter of each request: adapter i (from 1) has probability proportional to i^-exponent; 0 is uniform."""
    share = np.arange(1, adapters + 1, dtype=np.float64) ** -exponent
    chosen: list[int] = np.random.default_rng([seed, 4]).choice(adapters, count, p=share / share.sum()).tolist()
    return chosen
