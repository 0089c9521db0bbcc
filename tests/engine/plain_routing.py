"""MiLoRA and MoA over a `transformers` model, written from the papers: token by token, linear by linear, in fp64 where
a router computes. Nothing here is the serving code's.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters_store.types import TARGETS
from routing.card_adapters import CardAdapter
from routing.prompt_folder import PromptCard, write_prompt_router
from routing.prompt_router import LayerRouter, RouterForm
from server.engine.prompt_routers import PromptUse
from server.engine.sequence import Request, SamplingParams
from server.model.config import ModelConfig
from tests.engine.tiny_engine import Registered

Weights = Mapping[tuple[int, str], list[float]]
"""By layer and target the factor of each of the router's adapters."""
MILORA: dict[str, Any] = {
    "kind": "milora",
    "experts": "modules",
    "decision": "layer",
    "pooling": "attention",
    "activation": "rational",
    "norm": "rms",
    "top_k": 3,
}
ADAPTERS = MILORA | {"experts": "adapters", "top_k": 2}


@dataclass(frozen=True)
class Made:
    """A router's folder over registered adapters, its tensors, and how it decides."""

    folder: Path
    names: tuple[str, ...]
    digests: tuple[str, ...]
    form: RouterForm
    null: bool
    layers: tuple[LayerRouter, ...]

    def use(self, top_k: int | None = None, only: tuple[str, ...] | None = None) -> PromptUse:
        rows = tuple(
            digest if only is None or name in only else None
            for name, digest in zip(self.names, self.digests, strict=True)
        )
        return PromptUse(self.folder.name, str(self.folder), rows, self.form.layered, top_k or self.form.top_k)


def make_prompt_router(
    folder: Path, model: Path, known: Registered, names: tuple[str, ...], seed: int = 3, **options: Any
) -> Made:
    """Random weights. `kind`, `null`, and the fields of `RouterForm`; the default is MoA's vote over means."""
    kind, null = options.pop("kind", "moa"), options.pop("null", False)
    config = ModelConfig.from_folder(model)
    width, count = config.hidden_size, config.num_layers
    experts = options.get("experts", "adapters")
    size = len(TARGETS) if experts == "modules" else len(names) + null
    fields = {
        "experts": experts,
        "num_layers": count,
        "num_experts": size,
        "top_k": 1,
        "pooling": "mean",
        "activation": "none",
        "norm": "none",
        "decision": "vote",
        **options,
    }
    form = RouterForm(**fields)
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rational = form.activation == "rational"
    layers = tuple(
        LayerRouter(
            drawn(size, width),
            drawn(width) * 0.5 if form.pooling == "attention" else None,
            drawn(7) * 0.2 if rational else None,
            drawn(5) * 0.2 if rational else None,
        )
        for _ in range(count)
    )
    digests = tuple(known.weights[name].digest for name in names)
    adapters = tuple(CardAdapter(name, digest) for name, digest in zip(names, digests, strict=True))
    card = PromptCard(kind, config.fingerprint(), "tiny", adapters, form, null, "")
    write_prompt_router(folder, card, layers)
    return Made(folder, names, digests, form, null, layers)


def routed(
    name: str, prompt: tuple[int, ...], known: Registered, use: PromptUse, params: SamplingParams, key: bytes = b""
) -> Request:
    mix = known.mix({name: 1.0 for name, weights in known.weights.items() if weights.digest in use.rows})
    return Request(name, prompt, params, mix, known.paths, cache_key=key, prompt_router=use)


@dataclass
class Plain:
    """One router over one model. `decide` first, then `greedy` with what it gave."""

    path: Path
    known: Registered
    made: Made
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        self.pairs = [self.known.weights[name].pairs for name in self.made.names]

    def decide(self, prompt: tuple[int, ...], use: PromptUse) -> tuple[Weights, list[list[float]]]:
        """The factors, and the probabilities by layer that was read."""
        form, found = self.made.form, list[list[float]]()
        weights: dict[tuple[int, str], list[float]] = {}
        with torch.inference_mode():
            if not form.layered:
                states = self.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
                found += [self._probabilities(layer, states[layer][0], use) for layer in range(form.num_counted)]
                chosen = self._one_for_all(found, use)
                return {(layer, t): chosen for layer in range(form.num_layers) for t in TARGETS}, found

            def before(layer: int, _: Any, inputs: tuple[Tensor, ...]) -> None:
                probabilities = self._probabilities(layer, inputs[0][0], use)
                found.append(probabilities)
                picked = best(probabilities, use.top_k)
                for place, target in enumerate(TARGETS):
                    if form.experts == "modules":
                        weights[layer, target] = [float(place in picked)]
                    else:
                        weights[layer, target] = self._shares(picked)

            with ExitStack() as stack, self._adding(weights):
                for layer, block in enumerate(self.model.model.layers):
                    stack.callback(block.register_forward_pre_hook(partial(before, layer)).remove)
                self.model(torch.tensor([prompt]))
        return weights, found

    def greedy(self, prompt: tuple[int, ...], weights: Weights, count: int) -> tuple[tuple[int, ...], list[float]]:
        """Tokens and their log-probabilities, by a whole forward pass for each."""
        tokens, scores = list(prompt), []
        with torch.inference_mode(), self._adding(weights):
            for _ in range(count):
                logits = self.model(torch.tensor([tokens])).logits[0, -1].log_softmax(dim=0)
                tokens.append(int(logits.argmax()))
                scores.append(float(logits.max()))
        return tuple(tokens[len(prompt) :]), scores

    def _probabilities(self, layer: int, hidden: Tensor, use: PromptUse) -> list[float]:
        """Softmax over the allowed experts of the layer's router for the prompt's states [T, d]; 0 for the others."""
        form, own = self.made.form, self.made.layers[layer]
        tokens = [token.double() for token in hidden]
        if form.norm == "rms":
            tokens = [token / math.sqrt(float((token**2).mean()) + 1e-6) for token in tokens]
        if form.pooling == "last":
            h = tokens[-1]
        elif form.pooling == "max":
            h = torch.stack(tokens).max(dim=0).values
        else:
            scores = [1.0] * len(tokens)
            if own.w_sa is not None:
                scores = [math.exp(float(token @ own.w_sa.double())) for token in tokens]
            h = torch.stack([s * token for s, token in zip(scores, tokens, strict=True)]).sum(dim=0) / sum(scores)
        if own.a is not None and own.b is not None:
            above = sum(float(a) * h**j for j, a in enumerate(own.a))
            below = sum(float(b) * h**i for i, b in enumerate(own.b, 1))
            h = above / (1 + abs(below))
        logits = (own.w.double() @ h).tolist()
        allowed = [True] * len(logits)
        if form.experts == "adapters":
            allowed[: len(use.rows)] = [row is not None for row in use.rows]
        powers = [math.exp(logit) if may else 0.0 for logit, may in zip(logits, allowed, strict=True)]
        return [power / sum(powers) for power in powers]

    def _one_for_all(self, found: list[list[float]], use: PromptUse) -> list[float]:
        if self.made.form.decision == "last":
            return self._shares(best(found[-1], use.top_k))
        votes = [0.0] * len(found[0])
        for probabilities in found:
            for expert in best(probabilities, use.top_k):
                votes[expert] += 1
        means = [sum(own[e] for own in found) / len(found) for e in range(len(votes))]
        return self._shares(best([v + m / 2 for v, m in zip(votes, means, strict=True)], use.top_k))

    def _shares(self, picked: list[int]) -> list[float]:
        """An even share for each adapter; one for no adapter counts as one of them."""
        return [1 / len(picked) if row in picked else 0.0 for row in range(len(self.made.names))]

    @contextmanager
    def _adding(self, weights: Weights) -> Iterator[None]:
        """y = W x + sum_i w_i s_i B_i A_i x in every linear."""
        with ExitStack() as stack:
            for layer, block in enumerate(self.model.model.layers):
                for target in TARGETS:
                    linear = getattr(block.mlp if hasattr(block.mlp, target) else block.self_attn, target)
                    stack.callback(linear.register_forward_hook(partial(self._add, (layer, target), weights)).remove)
            yield

    def _add(self, key: tuple[int, str], weights: Weights, _: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        for pairs, weight in zip(self.pairs, weights[key], strict=True):
            if weight and key in pairs:
                y = y + weight * pairs[key].scale * (inputs[0] @ pairs[key].a.float().T @ pairs[key].b.float().T)
        return y


def best(values: list[float], count: int) -> list[int]:
    """The places of the highest values above 0, of equal ones the first."""
    order = sorted(range(len(values)), key=lambda place: -values[place])
    return [place for place in order[:count] if values[place] > 0]
