"""The operations as Triton kernels: the CUDA backend, and on a CPU, under Triton's interpreter, its test.

A linear with LoRA runs the base product on the caller's stream and the low-rank products beside it on another; the
consumer of both adds them. The products with the base weights take cuBLAS, or our own kernel where a table measured on
this GPU says that it is faster.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels import attention, elementwise, rotary_store, sampling
from kernels.attention import PagedMeta
from kernels.gate_rows import Gated
from kernels.gated import gated_delta
from kernels.gated_pages import GatedPages
from kernels.gates import gate_scale
from kernels.gemm import gemm, new_counters
from kernels.gemm_table import GemmTable
from kernels.lora import dense_lora_, lora_delta, mapping_matrix
from kernels.summands import Summands
from kernels.tiles import PAGE_RANK, LoraTiles

SIDE_ROWS = 128
"""Most rows for which LoRA runs beside the base product; from there on the product leaves no room on the GPU."""

DENSE_PAGES = 32
"""Most pages for which the many rows of prompts that have weights of their own for each meet all of them, as two dense
products: 28 pages, two of them a row, 2048 rows of an 8B model cost 12 instead of 27 ms on an H100.
"""

DENSE_ROWS = 1024
"""Rows above which the same holds for rows with gates, whose kernels launch less.

`python -m kernels.bench --ops meteora` measures both ways.
"""


class TritonOps:
    """`kernels.ops.Ops` for one device. `table` overrides the measured choice between cuBLAS and our own product."""

    captures = True

    def __init__(self, device: torch.device, table: GemmTable | None = None) -> None:
        on_gpu = device.type == "cuda"
        self.pdl = on_gpu and torch.cuda.get_device_capability(device) >= (9, 0)
        if table is None:
            table = GemmTable.load(torch.cuda.get_device_name(device)) if on_gpu else GemmTable()
        self.table = table
        self._counters = new_counters(device)
        self._side = torch.cuda.Stream(device) if on_gpu else None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return elementwise.rms_norm(x, weight, eps, pdl=self.pdl)

    def rms_norm_residual(self, x: Summands, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return elementwise.rms_norm_residual(x, residual, weight, eps, pdl=self.pdl)

    def silu_mul(self, x: Summands) -> Tensor:
        return elementwise.silu_mul(x, pdl=self.pdl)

    def rotary_store(
        self,
        qkv: Summands,
        qk_norm: Tensor | None,
        eps: float,
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        meta: PagedMeta,
    ) -> Tensor:
        kv_heads, size = cache[0].shape[2:]
        heads = qkv[0].shape[1] // size - 2 * kv_heads
        return rotary_store.rotary_store(qkv, qk_norm, eps, *rotary, *cache, meta.slots, heads, kv_heads, pdl=self.pdl)

    def pack_linear(self, weight: Tensor) -> Tensor:
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._linear(x, weight, bias, beside=False)

    def lora_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pages: tuple[Tensor, Tensor],
        mapping: LoraTiles | GatedPages,
        slices: tuple[int, ...],
        scale: Tensor | Gated | None = None,
    ) -> Summands:
        """Where rows share pages, pages must be finite: then a row meets pages of others with weight 0."""
        if scale is not None and _many(x, scale) and len(mapping.pages) <= DENSE_PAGES:
            return _dense(self.linear(x, weight, bias), x, pages, mapping, slices, scale), None
        if self._side is None or len(x) > SIDE_ROWS:
            return self.linear(x, weight, bias), _update(x, pages, mapping, slices, scale, pdl=self.pdl)
        main = torch.cuda.current_stream()
        fork = main.record_event()
        # the base product first: launched behind the others, it found their programs in its place (+6 % of a step)
        y = self._linear(x, weight, bias, beside=True)
        self._side.wait_event(fork)
        with torch.cuda.stream(self._side):
            delta = _update(x, pages, mapping, slices, scale, pdl=False)
        main.wait_stream(self._side)
        return y, delta

    def paged_attention(
        self, q: Tensor, cache: tuple[Tensor, Tensor], meta: PagedMeta, scale: float, window: int | None
    ) -> Tensor:
        return attention.paged_attention(q, *cache, meta, scale, window, pdl=self.pdl)

    def greedy(self, logits: Tensor, masks: Tensor | None = None) -> Tensor:
        return sampling.greedy(logits, masks, pdl=self.pdl)

    def input_ids(self, ids: Tensor, sources: Tensor, sampled: Tensor) -> Tensor:
        return sampling.input_ids(ids, sources, sampled)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, beside: bool) -> Tensor:
        n, k = weight.shape
        config = self.table.choose(len(x), n, k, x.dtype, beside=beside)
        if config is None:
            return functional.linear(x, weight, bias)
        return gemm(x, weight, bias, config, counters=self._counters, pdl=self.pdl)


def _many(x: Tensor, scale: Tensor | Gated) -> bool:
    """Whether there are so many rows that dense products are faster."""
    return len(x) > (DENSE_ROWS if isinstance(scale, Gated) else SIDE_ROWS)


def _dense(
    y: Tensor,
    x: Tensor,
    pages: tuple[Tensor, Tensor],
    mapping: LoraTiles | GatedPages,
    slices: tuple[int, ...],
    scale: Tensor | Gated,
) -> Tensor:
    matrix = mapping.weights[: len(x)] if isinstance(mapping, GatedPages) else mapping_matrix(mapping, len(x))
    factors = gate_scale(x, scale) if isinstance(scale, Gated) else scale
    ranks = mapping.shape.ranks if isinstance(mapping, GatedPages) else PAGE_RANK
    return dense_lora_(y, x, *pages, mapping.pages.long().clamp_(min=0), matrix, slices, factors, ranks)


def _update(
    x: Tensor,
    pages: tuple[Tensor, Tensor],
    mapping: LoraTiles | GatedPages,
    slices: tuple[int, ...],
    scale: Tensor | Gated | None,
    *,
    pdl: bool,
) -> Tensor:
    if isinstance(mapping, GatedPages):
        assert isinstance(scale, Gated), "a mapping for gates needs gates"
        return gated_delta(x, *pages, mapping, slices, scale, pdl=pdl)
    assert not isinstance(scale, Gated), "gates need a mapping for gates"
    return lora_delta(x, *pages, mapping, slices, scale, pdl=pdl)
