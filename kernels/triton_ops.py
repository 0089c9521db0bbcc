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
from kernels.gemm import gemm, new_counters
from kernels.gemm_table import GemmTable
from kernels.lora import dense_lora_, dense_mapping, lora_delta
from kernels.scale import Scale, scale_of
from kernels.summands import Summands
from kernels.tiles import LoraTiles

SIDE_ROWS = 128
"""Most rows for which LoRA runs beside the base product; from there on the product leaves no room on the GPU."""

DENSE_PAGES = 32
"""Most pages for which the many rows of prompts that a gate gives weights of their own meet all of them, as two dense
products: 28 pages, two of them a row, 2048 rows of an 8B model cost 12 instead of 27 ms on an H100.
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
        self._gates = torch.cuda.Stream(device) if on_gpu else None

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
        mapping: LoraTiles,
        slices: tuple[int, ...],
        scale: Scale = None,
    ) -> Summands:
        """Where rows share pages, pages must be finite: then a row meets pages of others with weight 0."""
        if scale is not None and len(x) > SIDE_ROWS and len(mapping.pages) <= DENSE_PAGES:
            y, (ids, matrix) = self.linear(x, weight, bias), dense_mapping(mapping, len(x))
            return dense_lora_(y, x, *pages, ids, matrix, slices, scale_of(scale)), None
        if self._side is None or len(x) > SIDE_ROWS:
            return self.linear(x, weight, bias), lora_delta(x, *pages, mapping, slices, scale, pdl=self.pdl)
        main = torch.cuda.current_stream()
        fork = main.record_event()
        # the base product first: launched behind the others, it found their programs in its place (+6 % of a step)
        y = self._linear(x, weight, bias, beside=True)
        scale = self._beside(scale, fork)
        self._side.wait_event(fork)
        with torch.cuda.stream(self._side):
            delta = lora_delta(x, *pages, mapping, slices, scale)
        main.wait_stream(self._side)
        return y, delta

    def _beside(self, scale: Scale, fork: torch.cuda.Event) -> Scale:
        """Have the factors made on a stream of their own, while the first low-rank product runs."""
        if scale is None or isinstance(scale, Tensor):
            return scale
        assert self._gates is not None
        gates = self._gates
        gates.wait_event(fork)
        with torch.cuda.stream(gates):
            made = scale()

        def awaited() -> Tensor | None:
            torch.cuda.current_stream().wait_stream(gates)
            return made

        return awaited

    def paged_attention(
        self, q: Tensor, cache: tuple[Tensor, Tensor], meta: PagedMeta, scale: float, window: int | None
    ) -> Tensor:
        return attention.paged_attention(q, *cache, meta, scale, window, pdl=self.pdl)

    def greedy(self, logits: Tensor) -> Tensor:
        return sampling.greedy(logits, pdl=self.pdl)

    def input_ids(self, ids: Tensor, sources: Tensor, sampled: Tensor) -> Tensor:
        return sampling.input_ids(ids, sources, sampled)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, beside: bool) -> Tensor:
        n, k = weight.shape
        config = self.table.choose(len(x), n, k, x.dtype, beside=beside)
        if config is None:
            return functional.linear(x, weight, bias)
        return gemm(x, weight, bias, config, counters=self._counters, pdl=self.pdl)
