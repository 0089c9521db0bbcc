"""The engine on its Triton backend, under Triton's interpreter where there is no GPU, against the reference backend."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters_store.page_lease import PageLease
from adapters_store.types import BASE, GROUPS
from kernels.ops import Mapping, select_ops
from server.engine.batch import BatchBuilder
from server.engine.graphs import GraphSteps
from server.engine.plan import Chunk
from server.engine.planner import TilePlanner
from server.engine.sequence import Request, SamplingParams, Sequence
from server.engine.staging import StepShape, StepViews, fill
from server.model.decoder import Decoder, ForwardBatch
from tests.conftest import HAS_GPU
from tests.engine.micro_engine import DEVICE, micro, micro_engine, micro_model
from tests.engine.tiny_engine import Registered, outputs_of, texts

__all__ = ["micro", "micro_model"]

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, seed=7)


def micro_requests(micro: Registered) -> list[Request]:
    """Base, one adapter, and a mixture; greedy, drawn, and penalised with log-probabilities."""
    ways = (
        ({}, replace(GREEDY, max_tokens=4)),
        ({"all4": 1.0}, replace(SAMPLED, max_tokens=3)),
        ({"all4": 0.6, "qv20": -0.8}, replace(GREEDY, max_tokens=2, presence_penalty=1.0, logprobs=2)),
    )
    prompts = ((5, 9, 11), (7, 3, 30, 31, 8), tuple(range(2, 20)))
    return [
        Request(str(row), prompt, params, micro.mix(mix), micro.paths, b"%d" % row)
        for row, (prompt, (mix, params)) in enumerate(zip(prompts, ways, strict=True))
    ]


def test_the_triton_backend_equals_the_reference(micro_model: Path, micro: Registered) -> None:
    """A prompt longer than a step's budget is cut, and rows that decode share steps with it."""
    engine = micro_engine(micro_model, "triton")
    assert isinstance(engine.runner.steps, GraphSteps)
    assert engine.runner.lookahead
    micro.load(engine)
    found = outputs_of(engine, micro_requests(micro))
    expected = outputs_of(micro_engine(micro_model, "reference"), micro_requests(micro))
    assert texts(found) == texts(expected)
    assert len(set(texts(found).values())) == 3
    pairs = [[p for output in outputs["2"] for p in output.logprobs] for outputs in (found, expected)]
    assert [p.logprob for p in pairs[0]] == pytest.approx([p.logprob for p in pairs[1]], abs=1e-4)
    assert engine.stats().kv_used_blocks == 0
    if not HAS_GPU:
        assert engine.runner.steps.eager_steps == 4


def test_prompts_are_scored_and_pooled_on_triton(micro_model: Path, micro: Registered) -> None:
    """In chunks, beside rows that decode."""
    prompt = tuple(range(2, 29))
    requests = [
        Request("0", (5, 9, 11), replace(GREEDY, max_tokens=4)),
        Request("1", prompt, replace(GREEDY, max_tokens=1, prompt_logprobs=2), micro.mix({"all4": 0.7}), micro.paths),
        Request("2", prompt, replace(GREEDY, max_tokens=0, pooled=True), micro.mix({"all4": 0.7}), micro.paths),
    ]
    found, expected = [], []
    sums = []
    for backend, scored in (("triton", found), ("reference", expected)):
        engine = micro_engine(micro_model, backend)
        micro.load(engine)
        outputs = outputs_of(engine, requests)
        scored += [s for output in outputs["1"] for s in output.prompt_logprobs]
        pooled = [output.pooled for output in outputs["2"] if output.pooled]
        sums.append(sum(torch.frombuffer(bytearray(part), dtype=torch.float32) for part in pooled))
    torch.testing.assert_close(sums[0], sums[1], atol=1e-3, rtol=1e-3)
    assert len(found) == len(prompt) - 1
    assert [s.logprob for s in found] == pytest.approx([s.logprob for s in expected], abs=1e-4)
    assert [s.rank for s in found] == [s.rank for s in expected]
    assert [[token for token, _ in s.top] for s in found] == [[token for token, _ in s.top] for s in expected]


def test_preemption_and_late_stops_on_triton(micro_model: Path) -> None:
    """KV for two short sequences; the text of one ends before max_tokens."""
    params = replace(GREEDY, max_tokens=5)
    requests = [Request(str(i), tuple(range(3 + i, 6 + i)), params, cache_key=b"%d" % i) for i in range(3)]
    roomy = micro_engine(micro_model, "reference", block_size=4)
    text = texts(outputs_of(roomy, requests))["1"]
    requests[1] = replace(requests[1], params=replace(params, stop_token_ids=frozenset({text[2]})))
    expected = outputs_of(roomy, requests)
    block = roomy.runner.block_bytes(4)
    tight = micro_engine(micro_model, "triton", block_size=4, max_model_len=8, kv_memory=3 * block)
    found = outputs_of(tight, requests)
    assert texts(found) == texts(expected)
    assert len(texts(found)["1"]) == text.index(text[2])
    assert tight.stats().preemptions > 0


# A router inside the model.

PAGES = 3
LARGEST = 12


@dataclass
class BufferGate:
    """A gate whose values lie in device memory: fp32[layers, targets, rows, pages] by group."""

    values: dict[str, Tensor]

    def scale(self, layer: int, group: str, x: Tensor, mapping: Mapping) -> Tensor | None:
        if group == "o":
            return None
        values = self.values[group][layer, :, : len(x)]
        if isinstance(mapping.pages, Tensor):
            return values.index_select(2, mapping.pages.clamp(min=0))
        return values[:, :, list(mapping.pages)].contiguous()


@dataclass
class Gated:
    """One model, random pages, and a step of decoding rows beside a prompt, for any backend."""

    folder: Path
    chunks: list[Chunk]
    gate: BufferGate
    pages: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def random(cls, folder: Path) -> "Gated":
        decoder = Decoder.from_folder(folder, DEVICE, torch.float32)
        shape, layers = decoder.config.linear_shape, decoder.config.num_layers
        pages, values = {}, {}
        for group in GROUPS:
            targets = len(group.targets)
            a = torch.randn(layers, PAGES, 16 * targets, shape.group_input(group), device=DEVICE) / 8
            pages[group.name] = a, torch.randn(layers, PAGES, 16, sum(shape.group_outputs(group)), device=DEVICE) / 4
            values[group.name] = torch.randn(layers, targets, LARGEST, PAGES, device=DEVICE).relu()
        uses = ((0, 2), (), (1,), (2, 1))
        chunks = [cls._chunk(number, own) for number, own in enumerate(uses)]
        return cls(folder, chunks, BufferGate(values), pages)

    @staticmethod
    def _chunk(number: int, pages: tuple[int, ...]) -> Chunk:
        uses = (pages, tuple(0.5 + page for page in pages), (16,) * len(pages))
        pages_by, weights_by, ranks_by = ({group.name: use for group in GROUPS} for use in uses)
        sequence = Sequence.of(Request("r", tuple(range(3 + number, 7 + number)), GREEDY))
        sequence.blocks = [3 - number]
        sequence.lease = PageLease(BASE, pages_by, weights_by, ranks_by, ())
        return Chunk(sequence, 0, 1 if number < 2 else 4, samples=True)

    def cache(self, decoder: Decoder) -> list[tuple[Tensor, Tensor]]:
        shape = (4, 16, decoder.config.num_kv_heads, decoder.config.head_dim)
        return [(torch.zeros(shape, device=DEVICE), torch.zeros(shape, device=DEVICE)) for _ in decoder.layers]

    def reference(self, gate: BufferGate | None) -> Tensor:
        decoder = Decoder.from_folder(self.folder, DEVICE, torch.float32, select_ops(DEVICE, "reference"))
        batch = BatchBuilder(16, DEVICE).build(self.chunks)
        batch.router = gate
        return decoder.forward(batch, self.cache(decoder), self.pages)

    def triton(self) -> tuple[Decoder, ForwardBatch]:
        decoder = Decoder.from_folder(self.folder, DEVICE, torch.float32, select_ops(DEVICE, "triton"))
        rows = sum(chunk.num_tokens for chunk in self.chunks)
        tiles = TilePlanner().plan(self.chunks, 16)
        shape = StepShape(rows, 2, 2, 4, tuple((group, plan.shape) for group, plan in tiles.plans.items()))
        words = torch.zeros(shape.words + 4, dtype=torch.int32)
        fill(words.numpy(), shape, self.chunks, {group: tiles.words(group, own) for group, own in shape.tiles}, 16)
        views = StepViews.of(words.to(DEVICE), shape, 16, 64)
        ids = views.ids.long()
        return decoder, ForwardBatch(ids, views.positions, views.attention, views.mappings, views.logit_rows, self.gate)


@torch.inference_mode()
def test_a_gate_in_device_memory_equals_the_reference(micro_model: Path) -> None:
    gated = Gated.random(micro_model)
    expected = gated.reference(gated.gate)
    assert (gated.reference(None) - expected).abs().max() > 0.1
    decoder, batch = gated.triton()
    torch.testing.assert_close(
        decoder.forward(batch, gated.cache(decoder), gated.pages), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.gpu
@torch.inference_mode()
def test_a_captured_gate_reads_its_buffers_anew(micro_model: Path) -> None:
    gated = Gated.random(micro_model)
    decoder, batch = gated.triton()
    cache = gated.cache(decoder)
    decoder.forward(batch, cache, gated.pages)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        logits = decoder.forward(batch, cache, gated.pages)
    seen = []
    for seed in range(3):
        torch.manual_seed(seed)
        for values in gated.gate.values.values():
            values.normal_().relu_()
        logits.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(logits, gated.reference(gated.gate), atol=1e-4, rtol=1e-4)
        seen.append(logits.clone())
    assert (seen[0] - seen[1]).abs().max() > 0.1
