"""What is timed: every operation with its inputs, its reference and the bytes that it cannot avoid."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels import reference
from kernels.bench_timing import rotations
from kernels.shapes import Linear, ModelShape

Run = Callable[[int], Tensor]


@dataclass(frozen=True)
class Case:
    """One operation on one set-up. `run(i)` uses copy i of the inputs; `expected()` is what run(0) should give.

    num_bytes: read and written at least once by one call. flops: of its products, 0 where they do not matter.
    captured: False where the host waits in between, so that no CUDA graph can hold it. eager: timed without one, too.
    Results in several tensors are compared side by side.
    """

    op: str
    case: str
    rows: int
    backend: str
    copies: int
    num_bytes: int
    run: Callable[[int], Tensor | Sequence[Tensor]]
    expected: Callable[[], Tensor]
    setup: dict[str, Any] = field(default_factory=dict)
    flops: int = 0
    captured: bool = True
    eager: bool = False


@dataclass(frozen=True)
class Where:
    """Device, dtype, seed, and whether kernels start beside the one before (programmatic dependent launch)."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    pdl: bool = False

    def random(self, *shape: int, std: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype) * std

    def copies(self, touched_bytes: int) -> int:
        """Copies of inputs that a GPU's caches do not hold at once; one on a CPU, where speed is not the point."""
        return rotations(touched_bytes) if self.device.type == "cuda" else 1

    def ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Product:
    """x [rows, k] and copies of a weight [n, k]."""

    x: Tensor
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, linear: Linear, rows: int, where: Where) -> "Product":
        n, k = linear.outputs, linear.inputs
        weight = where.random(n, k, std=k**-0.5)
        copies = max(2, where.copies(weight.nbytes))
        return cls(where.random(rows, k), (weight, *(weight.clone() for _ in range(copies - 1))))

    @property
    def num_bytes(self) -> int:
        n = len(self.weights[0])
        return self.weights[0].nbytes + self.x.nbytes + len(self.x) * n * self.x.element_size()

    def expected(self) -> Tensor:
        return self.x.float() @ self.weights[0].float().T

    def case(self, name: str, backend: str, run: Callable[[Tensor, Tensor], Tensor], **setup: Any) -> Case:
        n, k = self.weights[0].shape
        return Case(
            "gemm",
            name,
            len(self.x),
            backend,
            len(self.weights),
            self.num_bytes,
            lambda i: run(self.x, self.weights[i]),
            self.expected,
            {"n": n, "k": k, **setup},
            2 * len(self.x) * n * k,
        )


def gemm_cases(shape: ModelShape, rows: Sequence[int], where: Where, device_name: str) -> Iterator[Case]:
    """cuBLAS, and our kernel in the configuration of the device's table, or in the first candidate without one."""
    from kernels.gemm import gemm, new_counters
    from kernels.gemm_table import GemmConfig, GemmTable, candidates, row_class

    table, counters = GemmTable.load(device_name), new_counters(where.device)
    for name, linear in {**shape.linears, "head": shape.head}.items():
        product: Product | None = None
        for count in rows:
            product = Product(where.random(count, linear.inputs), product.weights) if product else None
            product = product or Product.of(linear, count, where)
            yield product.case(name, "cublas", functional.linear)
            limit = row_class(count)
            config = table.choose(count, linear.outputs, linear.inputs, where.dtype)
            setup = {"from_table": config is not None, "pdl": where.pdl}
            if config is None and limit is not None:
                config = next(iter(candidates(limit, linear.outputs, linear.inputs)), None)
            if config is None:
                continue

            def run(x: Tensor, weight: Tensor, config: GemmConfig = config) -> Tensor:
                return gemm(x, weight, None, config, counters=counters, pdl=where.pdl)

            yield product.case(name, "triton", run, config=asdict(config), **setup)


def attention_cases(shape: ModelShape, rows: Sequence[int], context: int, where: Where) -> Iterator[Case]:
    """Decoding `rows` sequences of `context` tokens, and prompts of 512 and 2048 tokens (`context` without a GPU)."""
    for count in rows:
        yield from _attention(shape, count, context, 1, where)
    lengths = ((1, 512), (4, 512), (1, 2048)) if where.device.type == "cuda" else ((1, context),)
    for count, length in lengths:
        yield from _attention(shape, count, length, length, where)


def _attention(shape: ModelShape, count: int, length: int, queries: int, where: Where) -> Iterator[Case]:
    """`count` sequences of `length` tokens, of which the last `queries` are new."""
    from kernels.attention import PagedMeta, paged_attention, query_blocks

    heads, kv_heads, dim, block = shape.num_heads, shape.num_kv_heads, shape.head_dim, 16
    blocks = -(-length // block)
    touched = 2 * count * length * kv_heads * dim * where.dtype.itemsize
    copies = where.copies(touched)
    k = where.random(copies * count * blocks, block, kv_heads, dim)
    v = k.flip(0).contiguous()
    q = where.random(count * queries, heads, dim)
    decoding = queries == 1
    work = [] if decoding else [(s, s * queries, queries, length - queries) for s in range(count)]
    shuffled = np.random.default_rng(where.seed).permutation(len(k)).reshape(copies, count, blocks)
    starts = where.ints(range(0, count * blocks, blocks))
    metas = [
        PagedMeta(
            slots=where.ints([-1] * len(q)),
            tables=where.ints(shuffled[copy].reshape(-1).tolist()),
            table_starts=starts,
            decode_lens=where.ints([length] * count if decoding else []),
            query_blocks=torch.from_numpy(query_blocks(work)).to(where.device),
            block_size=block,
            longest=length,
        )
        for copy in range(copies)
    ]

    def dense(copy: int, cache: Tensor) -> Tensor:
        table = torch.from_numpy(shuffled[copy]).to(where.device)
        return cache[table].flatten(1, 2)[:, :length].transpose(1, 2).contiguous()

    def sdpa(keys: Tensor, values: Tensor) -> Tensor:
        own = q.to(keys.dtype).view(count, queries, heads, dim).transpose(1, 2)
        done = functional.scaled_dot_product_attention(own, keys, values, is_causal=not decoding, enable_gqa=True)
        return done.transpose(1, 2).flatten(0, 1)

    def expected() -> Tensor:
        return sdpa(dense(0, k).float(), dense(0, v).float())

    def run(i: int) -> Tensor:
        return paged_attention(q, k, v, metas[i], dim**-0.5, None, pdl=where.pdl)

    op = "decode attention" if decoding else "prefill attention"
    case = f"{length} tokens"
    num_bytes = touched + 2 * q.nbytes
    flops = 4 * heads * dim * (count * length if decoding else count * length * (length + 1) // 2)
    setup = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "pdl": where.pdl}
    yield Case(op, case, len(q), "triton", copies, num_bytes, run, expected, setup, flops)
    few = min(copies, 4)
    gathered = [(dense(copy, k), dense(copy, v)) for copy in range(few)]
    note = {**setup, "pdl": False, "keys": "gathered beforehand"}
    yield Case(op, case, len(q), "torch sdpa", few, num_bytes, lambda i: sdpa(*gathered[i]), expected, note, flops)


def elementwise_cases(shape: ModelShape, rows: Sequence[int], where: Where) -> Iterator[Case]:
    """The kernels between the products, with and without a delta to add, beside plain torch."""
    for count in rows:
        for parts in (1, 2):
            yield from _norm(shape, count, parts, where)
            yield from _silu(shape, count, parts, where)
            yield from _rotary(shape, count, parts, where)
        yield from _greedy(shape, count, where)


def _pair(
    op: str, parts: int, count: int, num_bytes: int, copies: int, where: Where, own: Run, plain: Run, exact: Run
) -> Iterator[Case]:
    """The same case by our kernel and by torch; `exact` is their reference in fp32."""
    name = "with delta" if parts == 2 else "plain"
    for backend, run in (("triton", own), ("torch", plain)):
        yield Case(op, name, count, backend, copies, num_bytes, run, lambda: exact(0), {"pdl": where.pdl})


def _norm(shape: ModelShape, count: int, parts: int, where: Where) -> Iterator[Case]:
    from kernels import elementwise

    num_bytes = (parts + 3) * count * shape.hidden_size * where.dtype.itemsize
    copies = where.copies(num_bytes)
    inputs = where.random(copies, 3, count, shape.hidden_size)
    weight, eps = where.random(shape.hidden_size), 1e-5

    def own(i: int) -> Tensor:
        x = (inputs[i, 0], inputs[i, 2] if parts == 2 else None)
        return elementwise.rms_norm_residual(x, inputs[i, 1], weight, eps, pdl=where.pdl)[0]

    def plain(i: int) -> Tensor:
        return reference.rms_norm(inputs[i, : parts + 1].sum(0), weight, eps)

    def exact(i: int) -> Tensor:
        ordered = inputs[i, [0, 2, 1] if parts == 2 else [0, 1]]
        return reference.rms_norm(ordered.float().sum(0), weight.float(), eps)

    yield from _pair("norm", parts, count, num_bytes, copies, where, own, plain, exact)


def _silu(shape: ModelShape, count: int, parts: int, where: Where) -> Iterator[Case]:
    from kernels import elementwise

    width = shape.linears["gate_up"].outputs
    num_bytes = (2 * parts + 1) * count * width // 2 * where.dtype.itemsize
    copies = where.copies(num_bytes)
    inputs = where.random(copies, 2, count, width)

    def own(i: int) -> Tensor:
        return elementwise.silu_mul((inputs[i, 0], inputs[i, 1] if parts == 2 else None), pdl=where.pdl)

    def plain(i: int) -> Tensor:
        return reference.silu_mul((inputs[i, :parts].sum(0), None))

    def exact(i: int) -> Tensor:
        return reference.silu_mul((inputs[i, :parts].float().sum(0), None))

    yield from _pair("silu", parts, count, num_bytes, copies, where, own, plain, exact)


def _rotary(shape: ModelShape, count: int, parts: int, where: Where) -> Iterator[Case]:
    from kernels.rotary_store import rotary_store

    heads, kv_heads, dim, block = shape.num_heads, shape.num_kv_heads, shape.head_dim, 16
    width = shape.linears["qkv"].outputs
    num_bytes = (parts + 1) * count * width * where.dtype.itemsize
    copies = where.copies(num_bytes)
    inputs = where.random(copies, 2, count, width)
    angles = where.random(count, dim // 2).float()
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(where.dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(where.dtype)
    cache = where.random(2, -(-count // block), block, kv_heads, dim)
    slots = where.ints(range(count))

    def own(i: int) -> Tensor:
        qkv = (inputs[i, 0], inputs[i, 1] if parts == 2 else None)
        return rotary_store(qkv, None, 0.0, cos, sin, cache[0], cache[1], slots, heads, kv_heads, pdl=where.pdl)

    def rotate(i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        whole = inputs[i, :parts].to(dtype).sum(0).view(count, heads + 2 * kv_heads, dim)
        turned = reference.rotary(whole[:, : heads + kv_heads], cos.to(dtype), sin.to(dtype))
        return turned, whole[:, heads + kv_heads :]

    def plain(i: int) -> Tensor:
        qk, v = rotate(i, where.dtype)
        cache[0].flatten(0, 1)[:count] = qk[:, heads:]
        cache[1].flatten(0, 1)[:count] = v
        return qk[:, :heads]

    def exact(i: int) -> Tensor:
        return rotate(i, torch.float32)[0][:, :heads]

    yield from _pair("rotary", parts, count, num_bytes, copies, where, own, plain, exact)


def _greedy(shape: ModelShape, count: int, where: Where) -> Iterator[Case]:
    from kernels.sampling import greedy

    vocabulary = shape.vocab_size
    num_bytes = count * vocabulary * where.dtype.itemsize
    copies = where.copies(num_bytes)
    logits = where.random(copies, count, vocabulary)

    def lowest() -> Tensor:
        ids = torch.arange(vocabulary, device=where.device)
        return torch.where(logits[0] == logits[0].amax(-1, keepdim=True), ids, vocabulary).amin(-1)

    name, setup = f"{vocabulary} tokens", {"pdl": where.pdl}
    own, plain = (lambda i: greedy(logits[i], pdl=where.pdl)), (lambda i: logits[i].argmax(-1))
    yield Case("greedy", name, count, "triton", copies, num_bytes, own, lowest, setup)
    # torch takes any of equal maxima, so that only its own answer is right
    yield Case("greedy", name, count, "torch", copies, num_bytes, plain, lambda: plain(0), setup)
    masks = torch.full((count, -(-vocabulary // 32)), -1, dtype=torch.int32, device=where.device)
    own, plain = (lambda i: greedy(logits[i], masks, pdl=where.pdl)), (lambda i: reference.greedy(logits[i], masks))
    num_bytes, name = num_bytes + masks.nbytes, f"{name}, masked"
    yield Case("greedy", name, count, "triton", copies, num_bytes, own, lowest, setup)
    yield Case("greedy", name, count, "torch", copies, num_bytes, plain, lambda: plain(0), setup)
