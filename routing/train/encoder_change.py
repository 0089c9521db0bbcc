"""What a trained retriever changes in its encoder: a head, LoRA, or every weight; trained here, stored as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from routing.encoder_model import EncoderModel, transformer


class EncoderChange:
    """The trainable part of an encoder. `weights` are optimised; `tensors()` is what a router's folder stores."""

    def __init__(
        self, encoder: EncoderModel, mode: str, rank: int, alpha: int, seed: int, start: Tensor | None = None
    ) -> None:
        """`start` (width, width) is where a head begins: the identity if None."""
        self.mode = mode
        self.model: Any = encoder.model
        for weight in self.model.parameters():
            weight.requires_grad_(False)
        if mode == "head":
            # The difference from the start is trained, so that weight decay pulls towards the start.
            self.start = (torch.eye(encoder.width) if start is None else start).to(self.model.device)
            self.delta = nn.Parameter(torch.zeros(encoder.width, encoder.width, device=self.model.device))
            self.weights: dict[str, nn.Parameter] = {"head": self.delta}
            return
        inner = transformer(self.model)
        if mode == "lora":
            _inject_lora(inner, rank, alpha, seed)
        trained = {
            n: w for n, w in inner.named_parameters() if (".lora_" in n if mode == "lora" else "pooler" not in n)
        }
        for weight in trained.values():
            weight.requires_grad_(True)
        self.weights = trained
        self.scale = alpha / rank

    def embed(self, texts: Sequence[str], max_tokens: int) -> Tensor:
        """Embeddings with gradients, (n, width); every text already has its prefix and is cut to `max_tokens`."""
        features = self.model.preprocess(list(texts))
        cut = {name: value[:, :max_tokens].to(self.model.device) for name, value in _tensors(features).items()}
        others = {name: value for name, value in features.items() if not isinstance(value, Tensor)}
        embedded: Tensor = self.model({**others, **cut})["sentence_embedding"]
        return embedded

    def project(self, embedded: Tensor) -> Tensor:
        """The head over embeddings of the base, (n, width); only for the mode `head`."""
        return embedded @ (self.start + self.delta).T

    def tensors(self) -> dict[str, Tensor]:
        """The change in the form that `EncoderModel.load` merges; LoRA's scaling is in B."""
        if self.mode == "head":
            return {"head": (self.start + self.delta).detach().cpu()}
        if self.mode == "full":
            return {name: weight.detach().cpu() for name, weight in self.weights.items()}
        found = {}
        for name, weight in self.weights.items():
            module, factor = name.removesuffix(".weight").removesuffix(".default").rsplit(".", 1)
            found[f"{module}.{factor}"] = weight.detach().cpu() * (self.scale if factor == "lora_B" else 1.0)
        return found


def _inject_lora(inner: nn.Module, rank: int, alpha: int, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    linears = [n for n, module in inner.named_modules() if isinstance(module, nn.Linear) and "pooler" not in n]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=linears), inner)


def _tensors(features: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in features.items() if isinstance(value, Tensor)}
