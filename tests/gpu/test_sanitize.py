"""Every kernel once on small, ragged shapes, for `deploy/gpu_sanitize.sh` to run under compute-sanitizer.

The results are compared too, so that a kernel that did nothing would be noticed.
"""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.attention import PagedMeta, paged_attention, query_blocks
from kernels.elementwise import rms_norm, rms_norm_residual, silu_mul
from kernels.gemm import gemm, new_counters
from kernels.gemm_table import GemmConfig
from kernels.lora import lora_delta
from kernels.mapping import RowSpan
from kernels.rotary_store import rotary_store
from kernels.sampling import greedy, input_ids
from kernels.tile_planner import plan_tiles
from kernels.tiles import Kind, TileShape, view_tiles, write_tiles
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.graphs import GraphSteps
from server.engine.planner import StepTiles, no_tiles
from server.engine.sequence import Request, SamplingParams
from tests.engine.tiny_engine import run

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPS = 1e-5
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def int32(values: object) -> Tensor:
    return torch.tensor(np.array(values, dtype=np.int32), device=DEVICE)


def error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


@every_dtype
def test_sanitize_norms_and_activation(dtype: torch.dtype) -> None:
    x, delta, residual, weight = (randn(*shape, dtype=dtype) for shape in ((5, 72), (5, 72), (5, 72), (72,)))
    assert error(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS)) < TOLERANCE[dtype]
    for summands in ((x, None), (x, delta)):
        normed, total = rms_norm_residual(summands, residual, weight, EPS)
        expected = sum(part.double() for part in (*summands, residual) if part is not None)
        assert error(total, expected) < TOLERANCE[dtype]
        assert error(normed, reference.rms_norm(total, weight, EPS)) < TOLERANCE[dtype]
        gate, up = sum(part.double() for part in summands if part is not None).chunk(2, dim=-1)
        assert error(silu_mul(summands), torch.nn.functional.silu(gate) * up) < TOLERANCE[dtype]


@every_dtype
@pytest.mark.parametrize("normed", [False, True])
def test_sanitize_rotary_store(dtype: torch.dtype, normed: bool) -> None:
    """The last slot of the cache is used, and one row is not stored."""
    heads, kv_heads, size = 6, 2, 24
    qkv, delta = (randn(3, (heads + 2 * kv_heads) * size, dtype=dtype) for _ in range(2))
    norm = randn(heads + kv_heads, size, dtype=dtype) if normed else None
    angles = torch.rand(3, size // 2, device=DEVICE)
    cos, sin = torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    caches = torch.full((2, 2, 16, kv_heads, size), torch.nan, dtype=dtype, device=DEVICE)
    q = rotary_store((qkv, delta), norm, EPS, cos, sin, caches[0], caches[1], int32([31, -1, 0]), heads, kv_heads)
    assert q.isfinite().all()
    values = (qkv.double() + delta.double()).view(3, -1, size)[:, heads + kv_heads :]
    assert error(caches[1].flatten(0, 1)[[31, 0]], values[[0, 2]]) < TOLERANCE[dtype]
    assert int(caches[0].flatten(0, 1).isfinite().all(-1).all(-1).sum()) == 2


@every_dtype
def test_sanitize_sampling(dtype: torch.dtype) -> None:
    logits = randn(3, 5003, dtype=dtype)
    logits[1, 5002] = 100
    logits[2, 17] = torch.nan
    assert greedy(logits)[1:].tolist() == [5002, -1]
    assert greedy(logits)[0] == logits[0].argmax()
    masks = torch.full((3, 157), -1, dtype=torch.int32, device=DEVICE)
    masks[1, 5002 // 32] = 0
    assert greedy(logits, masks).tolist() == [logits[0].argmax(), logits[1, :4992].argmax(), -1]
    ids = input_ids(int32([7, 0, 9]), int32([-1, 2, 1]), torch.tensor([4, -1, 6], device=DEVICE))
    assert ids.tolist() == [7, 6, 0]


@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(16, 32, 32, splits=1, warps=4, stages=2),
        GemmConfig(16, 32, 32, splits=3, warps=4, stages=3),
        GemmConfig(16, 64, 32, splits=2, warps=4, stages=3, swapped=True),
        GemmConfig(64, 64, 64, splits=1, warps=4, stages=4),
    ],
    ids=["whole", "split", "swapped", "warp-group"],
)
@pytest.mark.parametrize("tma", [False, None], ids=["pointers", "default"])
def test_sanitize_gemm(config: GemmConfig, tma: bool | None) -> None:
    x, weight, bias = (randn(*shape, dtype=torch.bfloat16) for shape in ((17, 136), (88, 136), (88,)))
    y = gemm(x, weight, bias, config, counters=new_counters(DEVICE), tma=tma)
    assert error(y, x.double() @ weight.double().T + bias.double()) < TOLERANCE[torch.bfloat16]


@every_dtype
@pytest.mark.parametrize("kind", ["rows", "shared"])
@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize("gated", [False, True])
def test_sanitize_lora(dtype: torch.dtype, kind: Kind, block_rows: int, gated: bool) -> None:
    """Pages of partial ranks at both ends of the pool, rows without a page, and room for more of everything."""
    slices, inputs, rows, ranks = (40, 24, 24), 72, 21, (16, 5, 1, 12)
    a, b = randn(4, 48, inputs, dtype=dtype) / 8, randn(4, 16, sum(slices), dtype=dtype) / 4
    for page, rank in enumerate(ranks):
        a[page].unflatten(0, (3, 16))[:, rank:], b[page, rank:] = 0, 0
    spans = [RowSpan(0, 1, (3,), (0.5,), (12,)), RowSpan(1, 2, (0, 3), (1.0, -1.0), (16, 12))]
    spans += [RowSpan(4, rows - 1, (1, 2, 3), (0.3, 0.4, 0.5), (5, 1, 12))]
    plan = plan_tiles(spans, rows, block_rows, kind)
    assert plan is not None
    own = plan.shape
    shape = TileShape(kind, block_rows, own.tiles + 3, own.blocks + (2 if kind == "rows" else 0), own.pages + 1)
    words = np.zeros(shape.words, dtype=np.int32)
    write_tiles(plan, shape, words)
    tiles = view_tiles(torch.from_numpy(words).to(DEVICE), shape)
    x = randn(rows, inputs, dtype=dtype)
    scale = torch.rand(3, rows, len(tiles.pages), device=DEVICE) if gated else None
    delta = lora_delta(x, a, b, tiles, slices, scale)
    expected = torch.zeros(rows, sum(slices), dtype=torch.float64, device=DEVICE)
    for span in spans:
        at = slice(span.start, span.stop)
        for page, weight in zip(span.pages, span.weights, strict=True):
            for s, columns in enumerate(torch.arange(sum(slices)).split(slices)):
                update = x[at].double() @ a[page, 16 * s : 16 * s + 16].double().T @ b[page][:, columns].double()
                factor = 1.0 if scale is None else scale[s, at, plan.pages.tolist().index(page), None].double()
                expected[at, columns[0] : columns[-1] + 1] += weight * factor * update
    assert error(delta, expected) < TOLERANCE[dtype]


@every_dtype
@pytest.mark.parametrize("window", [None, 20])
def test_sanitize_attention(dtype: torch.dtype, window: int | None) -> None:
    """Decoding rows, one of them long enough to be cut, padding, and a chunk of a prompt; blocks at both ends."""
    heads, kv_heads, size, lens = 6, 2, 40, (700, 1, 0, 17)
    tables = [list(range(43, -1, -1)), [44], [], [45, 46], [47, 48, 49]]
    starts = np.cumsum([0, *map(len, tables)])[:-1]
    caches = randn(2, 50, 16, kv_heads, size, dtype=dtype)
    q = randn(4 + 30, heads, size, dtype=dtype)
    blocks = np.concatenate([query_blocks([(4, 4, 30, 9)]), np.full((2, 4), -1, np.int32)])
    meta = PagedMeta(
        slots=int32([-1] * len(q)),
        tables=int32(list(chain.from_iterable(tables))),
        table_starts=int32([*starts, 0, 0]),
        decode_lens=int32(lens),
        query_blocks=int32(blocks),
        block_size=16,
        longest=4096,
    )
    out = paged_attention(q, caches[0], caches[1], meta, size**-0.5, window)
    ends = [*((row, row, length) for row, length in enumerate(lens)), *((4, 4 + i, 10 + i) for i in range(30))]
    for sequence, row, length in ends:
        first = max(0, length - window) if window else 0
        position = torch.arange(first, length, device=DEVICE)
        block = torch.tensor(tables[sequence] or [0], device=DEVICE)[position // 16]
        keys, values = (cache[block, position % 16].repeat_interleave(3, 1).double() for cache in caches)
        scores = torch.einsum("hd,lhd->hl", q[row].double(), keys) * size**-0.5
        expected = torch.einsum("hl,lhd->hd", scores.softmax(-1), values)
        assert error(out[row], expected) < TOLERANCE[dtype] if length else not out[row].any()


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    """Without graphs, which need an allocator of their own; of more sequences than its smallest mixed step has rows."""
    memory = {"kv_memory": 1 << 22, "page_memory": 1 << 22, "max_num_seqs": 160, "max_batch_tokens": 160}
    return Engine.from_config(EngineConfig(str(tiny_model), device=DEVICE.type, cuda_graphs="eager", **memory))  # type: ignore[arg-type]


def test_sanitize_whole_steps(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    requests = [Request(str(i), tuple(range(2 + i, 5 + 14 * i)), params) for i in range(4)]
    assert all(len(tokens) == 4 for tokens in run(engine, requests).values())


def test_sanitize_padding(engine: Engine) -> None:
    """The steps that graphs are captured from, in which every row is padding."""
    steps = engine.runner.steps
    assert isinstance(steps, GraphSteps)
    for shape in steps.capacities.common():
        if shape.rows in (1, 16, 128, 160):
            with torch.inference_mode():
                steps._stage(steps._staging, shape, [], StepTiles({g: no_tiles(tiles) for g, tiles in shape.tiles}))
                steps._run(steps._staging, shape)
    torch.cuda.synchronize()
    assert not any(part.any() for pair in engine.runner.kv_cache for part in pair), "padding is stored nowhere"
