"""Tiny random models of every family, and a driver that runs sequences through a paged cache with scrambled blocks."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from adapters_store.types import GROUPS, PAGE_RANK, LinearShape, LoraPair
from kernels.gather import build_attention
from kernels.mapping import RowSpan, build_mapping
from server.model.decoder import Decoder, ForwardBatch
from server.model.lora import LayerRouter

CPU = torch.device("cpu")
BLOCK_SIZE = 4

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**{**SIZES, "tie_word_embeddings": True}),
    "llama-biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-all-heads": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 6}),
    "llama-head-dim": lambda: LlamaConfig(**SIZES, head_dim=16),
    "llama-rope-llama3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-rope-linear": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    ),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=12, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-window": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "qwen3-window-biases": lambda: Qwen3Config(
        **{**SIZES, "tie_word_embeddings": True},
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
}


@dataclass(frozen=True)
class Saved:
    """A model folder and the `transformers` model that was saved there."""

    folder: Path
    model: Any

    def logits(self, ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0]

    def bf16(self) -> "Saved":
        return Saved(self.folder, copy.deepcopy(self.model).bfloat16())


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """`saved(variant)`: every parameter is random, biases and norms included."""
    made: dict[str, Saved] = {}

    def get(variant: str) -> Saved:
        if variant not in made:
            folder = tmp_path_factory.mktemp("models") / variant
            torch.manual_seed(sorted(VARIANTS).index(variant))
            model = AutoModelForCausalLM.from_config(VARIANTS[variant](), attn_implementation="eager").eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
                elif "norm" in name:
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
            model.save_pretrained(folder)
            made[variant] = Saved(folder, model)
        return made[variant]

    return get


@dataclass
class Row:
    """One sequence of a driver: its tokens so far, its blocks, and its (page, weight) pairs by group name."""

    blocks: list[int]
    computed: int = 0
    pages: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)


class Driver:
    """Runs sequences through a decoder with a paged cache, as an engine would; gives the logits of every new token."""

    def __init__(self, decoder: Decoder, num_blocks: int = 96, num_pages: int = 40) -> None:
        self.decoder = decoder
        config, dtype = decoder.config, decoder.dtype
        generator = torch.Generator().manual_seed(3)
        self.free = torch.randperm(num_blocks, generator=generator).tolist()
        shape = (num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        # What a step did not write must not matter: uninitialised memory may hold anything.
        self.kv_cache = [
            (torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype))
            for _ in range(config.num_layers)
        ]
        self.pages = empty_pages(config.linear_shape, num_pages, dtype)
        self.rows: list[Row] = []
        self.logit_rows: Tensor | None = None

    def add(self, pages: Mapping[str, list[tuple[int, float]]] | None = None) -> int:
        """A new sequence that uses these pages; its number."""
        self.rows.append(Row([], pages=pages or {}))
        return len(self.rows) - 1

    def step(self, new: Iterable[tuple[int, list[int]]], router: LayerRouter | None = None) -> list[Tensor]:
        """Compute `tokens` of each (sequence, tokens), decodes first; logits [len(tokens), vocab] of each."""
        new = list(new)
        for number, tokens in new:
            row = self.rows[number]
            row.computed += len(tokens)
            while len(row.blocks) * BLOCK_SIZE < row.computed:
                row.blocks.append(self.free.pop())
        lens = [len(tokens) for _, tokens in new]
        rows = [self.rows[number] for number, _ in new]
        computed = [row.computed for row in rows]
        attention = build_attention([row.blocks for row in rows], lens, computed, BLOCK_SIZE, CPU)
        batch = ForwardBatch(
            ids=torch.tensor([token for _, tokens in new for token in tokens]),
            positions=torch.cat([torch.arange(end - n, end) for end, n in zip(computed, lens, strict=True)]),
            attention=attention,
            mappings={group.name: build_mapping(spans(group.name, rows, lens), CPU) for group in GROUPS},
            logit_rows=torch.arange(sum(lens)) if self.logit_rows is None else self.logit_rows,
            router=router,
        )
        with torch.inference_mode():
            logits = self.decoder.forward(batch, self.kv_cache, self.pages)
        return list(logits.split(lens)) if self.logit_rows is None else [logits]


def spans(group: str, rows: list[Row], lens: list[int]) -> list[RowSpan]:
    found, start = [], 0
    for row, length in zip(rows, lens, strict=True):
        pairs = row.pages.get(group, [])
        found.append(RowSpan(start, start + length, tuple(p for p, _ in pairs), tuple(w for _, w in pairs)))
        start += length
    return found


def empty_pages(shape: LinearShape, num_pages: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    pages = {}
    for group in GROUPS:
        a_shape = (PAGE_RANK * len(group.targets), shape.group_input(group))
        b_shape = (PAGE_RANK, sum(shape.group_outputs(group)))
        a, b = (torch.zeros(shape.num_layers, num_pages, *rest, dtype=dtype) for rest in (a_shape, b_shape))
        pages[group.name] = (a, b)
    return pages


class PageWriter:
    """Writes adapters into the pages of a driver; the pages of different adapters are far apart and out of order."""

    def __init__(self, driver: Driver, order: list[int]) -> None:
        self.driver = driver
        self.shape = driver.decoder.config.linear_shape
        self.free = {group.name: list(order) for group in GROUPS}

    def write(
        self, pairs: Mapping[tuple[int, str], LoraPair], weight: float = 1.0
    ) -> dict[str, list[tuple[int, float]]]:
        """(page, weight * scale) by group; all pairs of an adapter share one scale."""
        used: dict[str, list[tuple[int, float]]] = {}
        for group in GROUPS:
            own = {key: pair for key, pair in pairs.items() if key[1] in group.targets}
            if not own:
                continue
            ranks = max(pair.rank for pair in own.values())
            pages = [self.free[group.name].pop(0) for _ in range(-(-ranks // PAGE_RANK))]
            scale = next(iter(own.values())).scale
            used[group.name] = [(page, weight * scale) for page in pages]
            for (layer, target), pair in own.items():
                self._fill(layer, group.name, group.targets.index(target), pages, pair)
        return used

    def _fill(self, layer: int, group: str, index: int, pages: list[int], pair: LoraPair) -> None:
        a_pages, b_pages = (part[layer] for part in self.driver.pages[group])
        sizes = next(self.shape.group_outputs(g) for g in GROUPS if g.name == group)
        columns = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
        for number, page in enumerate(pages):
            a, b = (part.split(PAGE_RANK)[number:][:1] for part in (pair.a, pair.b.T))
            for ranks_a, ranks_b in zip(a, b, strict=True):
                a_pages[page, index * PAGE_RANK : index * PAGE_RANK + len(ranks_a)] = ranks_a
                b_pages[page, : len(ranks_b), columns] = ranks_b


def merge_uses(*uses: Mapping[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """The pages of a mix, from those of its adapters."""
    return {group.name: [pair for use in uses for pair in use.get(group.name, [])] for group in GROUPS}
