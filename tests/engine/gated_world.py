"""What tests of token-level routers through the whole engine share: MeteoRA in plain torch, and the comparison."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters_store.types import GROUP_OF, TARGETS, LoraPair, Mix
from routing.card_adapters import CardAdapter
from routing.gate_folder import GateCard, write_gates
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.gates import GateUse
from server.engine.sequence import Request, SamplingParams
from server.model.config import ModelConfig
from tests.engine.tiny_engine import GREEDY, SMALL, Registered, tokens_of

FACTORY = "routing.token_router:TokenGateFactory"
TOLERANCE = 1e-3
"""Every gate of a later layer magnifies what rounding did to its input: differences were 4e-4 at most, mostly 1e-5."""
Gates = Mapping[tuple[int, str], Tensor]
Pairs = Mapping[tuple[int, str], LoraPair]


@dataclass(frozen=True)
class Routed:
    """A router's folder over registered adapters, and its gates."""

    folder: Path
    names: tuple[str, ...]
    digests: tuple[str, ...]
    gates: Gates
    null: bool

    def use(self, top_k: int = 2, temperature: float = 1.0, only: tuple[str, ...] | None = None) -> GateUse:
        rows = (
            digest if only is None or name in only else None
            for name, digest in zip(self.names, self.digests, strict=True)
        )
        return GateUse(self.folder.name, str(self.folder), tuple(rows), top_k, temperature, self.null)


def make_router(folder: Path, model: Path, known: Registered, names: tuple[str, ...], seed: int, null: bool) -> Routed:
    shape = ModelConfig.from_folder(model).linear_shape
    generator = torch.Generator().manual_seed(seed)
    rows = len(names) + null
    gates = {
        (layer, target): torch.randn(rows, shape.inputs[target], generator=generator) * 0.4
        for layer in range(shape.num_layers)
        for target in TARGETS
    }
    digests = tuple(known.weights[name].digest for name in names)
    adapters = tuple(
        CardAdapter(f"{i}-{name}", digest) for i, (name, digest) in enumerate(zip(names, digests, strict=True))
    )
    fingerprint = ModelConfig.from_folder(model).fingerprint()
    write_gates(folder, GateCard(fingerprint, "tiny", adapters, TARGETS, 2, 1.0, null, ""), gates)
    return Routed(folder, names, digests, gates, null)


def gated_engine(model: Path, **settings: Any) -> Engine:
    return Engine.from_config(EngineConfig(str(model), gates=FACTORY, **{**SMALL, **settings}))


def weights_of(x: Tensor, gate: Tensor, use: GateUse) -> list[dict[int, float]]:
    """By token the chosen rows of the gate and their weights."""
    found = []
    for token in x:
        logits = {row: float(gate[row] @ token) for row, may in enumerate(use.allowed) if may}
        chosen = sorted(logits, key=lambda row: -logits[row])[: use.top_k]
        powers = torch.tensor([logits[row] / use.temperature for row in chosen]).softmax(dim=0).tolist()
        found.append(dict(zip(chosen, powers, strict=True)))
    return found


class Plain:
    """MeteoRA over a `transformers` model, token by token and linear by linear."""

    def __init__(self, folder: Path, known: Registered, router: Routed) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.router = router
        self.pairs: list[Pairs] = [known.weights[name].pairs for name in router.names]
        self.shares: list[Tensor] = []

    @contextmanager
    def routed(self, use: GateUse) -> Iterator[None]:
        self.shares = []
        with ExitStack() as stack:
            for layer, block in enumerate(self.model.model.layers):
                for target in TARGETS:
                    linear = getattr(block.mlp if hasattr(block.mlp, target) else block.self_attn, target)
                    hook = partial(self._add, (layer, target), use)
                    stack.callback(linear.register_forward_hook(hook).remove)
            yield

    def _add(self, key: tuple[int, str], use: GateUse, _: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        x, rows = inputs[0][0], []
        shares = torch.zeros(len(x), len(use.allowed))
        for token, chosen in enumerate(weights_of(x, self.router.gates[key], use)):
            delta = torch.zeros(y.shape[-1])
            for row, weight in chosen.items():
                shares[token, row] = weight
                pair = self.pairs[row].get(key) if row < len(self.pairs) else None
                if pair is not None:
                    delta += weight * pair.scale * (pair.b.float() @ (pair.a.float() @ x[token]))
            rows.append(delta)
        usable = [pairs for row, pairs in zip(use.rows, self.pairs, strict=True) if row is not None]
        if any(GROUP_OF[target] is GROUP_OF[key[1]] for pairs in usable for _, target in pairs):
            self.shares.append(shares)
        return y + torch.stack(rows)

    def greedy(self, prompt: tuple[int, ...], use: GateUse, count: int) -> tuple[tuple[int, ...], list[float], Tensor]:
        """Tokens, their log-probabilities, and shares [count, n] of the rows that they were sampled from."""
        tokens, scores, shares = list(prompt), [], []
        with torch.inference_mode(), self.routed(use):
            for _ in range(count):
                self.shares = []
                logits = self.model(torch.tensor([tokens])).logits[0, -1].log_softmax(dim=0)
                tokens.append(int(logits.argmax()))
                scores.append(float(logits.max()))
                shares.append(torch.stack(self.shares).mean(dim=0)[-1])
        return tuple(tokens[len(prompt) :]), scores, torch.stack(shares)


def request(
    name: str, prompt: tuple[int, ...], known: Registered, use: GateUse | None, params: SamplingParams = GREEDY
) -> Request:
    rows = sorted({row for row in use.rows if row is not None}) if use is not None else []
    return Request(name, prompt, params, Mix(tuple((row, 1.0) for row in rows)), known.paths, gates=use)


SCORED = replace(GREEDY, logprobs=0, max_tokens=6)


def assert_equals_plain(outputs: list[Any], plain: Plain, prompt: tuple[int, ...], use: GateUse) -> None:
    tokens, scores, shares = plain.greedy(prompt, use, SCORED.max_tokens)
    assert tokens_of(outputs) == tokens
    assert [output.logprobs[0].logprob for output in outputs] == pytest.approx(scores, abs=TOLERANCE)
    assert torch.tensor([output.shares for output in outputs]) == pytest.approx(shares, abs=TOLERANCE)


@pytest.fixture
def router(tiny_model: Path, registered: Registered, tmp_path: Path) -> Routed:
    return make_router(tmp_path / "router", tiny_model, registered, tuple(sorted(registered.weights)), 3, True)


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return gated_engine(tiny_model)


@pytest.fixture
def plain(tiny_model: Path, registered: Registered, router: Routed) -> Plain:
    return Plain(tiny_model, registered, router)
