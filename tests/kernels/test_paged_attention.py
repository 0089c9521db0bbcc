"""Paged attention in Triton against fp64 attention over each sequence's own keys, with all other memory poisoned."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import attention
from kernels.attention import QUERY_BLOCK, PagedMeta, paged_attention, plan_parts, query_blocks
from tests.kernels.poison import poisoned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
Spans = list[tuple[int, int]]


def int32(values: object) -> Tensor:
    return torch.tensor(np.array(values, dtype=np.int32), device=DEVICE)


class Step:
    """Sequences of (new tokens, all tokens), decodes first, with random queries and a cache that is NaN elsewhere."""

    def __init__(
        self,
        spans: Spans,
        heads: tuple[int, int] = (4, 2),
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
        block_size: int = 16,
        decodes: int | None = None,
        spare: int = 2,
    ) -> None:
        self.spans = spans
        num_decodes = sum(new == 1 for new, _ in spans) if decodes is None else decodes
        rows = np.cumsum([0] + [new for new, _ in spans])
        counts = [-(-length // block_size) for _, length in spans]
        starts = np.cumsum([0, *counts])[:-1]
        blocks = torch.randperm(sum(counts) + spare)[: sum(counts)]
        shape = (2, len(blocks) + spare, block_size, heads[1], dim)
        self.caches = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        self.q = torch.randn(int(rows[-1]), heads[0], dim, device=DEVICE).to(dtype)
        self.own: list[Tensor] = []
        slots: list[int] = []
        for (new, length), start, count in zip(spans, starts, counts, strict=True):
            position = torch.arange(length)
            at = blocks[start : start + count][position // block_size] * block_size + position % block_size
            pair = torch.randn(2, length, heads[1], dim, device=DEVICE).to(dtype)
            self.caches.flatten(1, 2)[:, at.to(DEVICE)] = pair
            self.own.append(pair)
            slots += at[length - new :].tolist() if length else [-1]
        prefills = [(i, int(rows[i]), new, length - new) for i, (new, length) in enumerate(spans) if i >= num_decodes]
        self.meta = PagedMeta(
            slots=int32(slots),
            tables=int32(blocks.tolist() or [0]),
            table_starts=int32(starts),
            decode_lens=int32([length for _, length in spans[:num_decodes]]),
            query_blocks=torch.tensor(query_blocks(prefills), device=DEVICE),
            block_size=block_size,
            longest=max(length for _, length in spans),
        )

    def run(self, window: int | None = None, *, pdl: bool = False) -> Tensor:
        scale = self.q.shape[-1] ** -0.5
        with poisoned():
            return paged_attention(self.q, self.caches[0], self.caches[1], self.meta, scale, window, pdl=pdl)

    def expected(self, window: int | None = None) -> Tensor:
        parts = []
        row = 0
        for (new, length), (k, v) in zip(self.spans, self.own, strict=True):
            q = self.q[row : row + new].double()
            row += new
            if not length:
                parts.append(torch.zeros_like(q))
                continue
            k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            behind = torch.arange(length - new, length)[:, None] - torch.arange(length)
            hidden = (behind < 0) | (behind >= (window or length))
            scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(hidden.to(DEVICE), -torch.inf).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(parts)

    def check(self, window: int | None = None, *, pdl: bool = False) -> None:
        out, expected = self.run(window, pdl=pdl), self.expected(window)
        assert out.dtype == self.q.dtype
        error = (out.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[self.q.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_whole_decoding_rows(dtype: torch.dtype, window: int | None) -> None:
    Step([(1, 1), (1, 70), (1, 16), (1, 33)], dtype=dtype).check(window)


@pytest.mark.parametrize("window", [None, 100])
def test_decoding_rows_in_parts(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(attention, "UNSPLIT", 0)
    monkeypatch.setattr(attention, "MIN_CHUNK", 32)
    Step([(1, 3), (1, 230), (1, 0), (1, 64)], heads=(4, 1)).check(window)


def test_a_row_of_many_parts_is_combined_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MIN_CHUNK", 32)
    monkeypatch.setattr(attention, "PROGRAMS_PER_PROCESSOR", 20)
    step = Step([(1, 18 * 32 + 5)], heads=(1, 1))
    step.q[:] = 2 * step.own[0][0, -1]  # the highest score is the last
    step.check()


def test_padding_rows_become_zero() -> None:
    step = Step([(1, 0), (1, 9), (1, 0)])
    assert step.run()[[0, 2]].abs().max() == 0
    step.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [None, 12])
def test_prefill(dtype: torch.dtype, window: int | None) -> None:
    Step([(19, 19), (5, 50)], dtype=dtype, heads=(2, 1)).check(window)


def test_decoding_rows_and_prompts_in_one_step() -> None:
    Step([(1, 40), (1, 2), (7, 30), (1, 21)], heads=(4, 1), decodes=2, block_size=8).check()


@pytest.mark.parametrize(("heads", "dim"), [((3, 1), 16), ((7, 1), 24), ((2, 2), 64)])
def test_group_and_head_sizes(heads: tuple[int, int], dim: int) -> None:
    Step([(1, 17), (6, 9)], heads=heads, dim=dim).check()


def test_unused_query_blocks_write_nothing() -> None:
    step = Step([(1, 5), (4, 9)], heads=(2, 1))
    unused = int32([[-1, 0, QUERY_BLOCK, 0]])
    step.meta = replace(step.meta, query_blocks=torch.cat([unused, step.meta.query_blocks]))
    step.check()


def test_caches_may_be_views_with_blocks_apart() -> None:
    step = Step([(1, 20), (3, 18)], heads=(2, 1))
    step.caches = step.caches.transpose(0, 1).contiguous().transpose(0, 1)
    assert not step.caches[0].is_contiguous()
    step.check()


def test_layouts_that_the_kernels_do_not_read_are_refused() -> None:
    step = Step([(1, 5)])
    for caches in (step.caches.transpose(2, 3), step.caches[..., :8], step.caches[:, :, :, :1].expand_as(step.caches)):
        with pytest.raises(ValueError, match="must"):
            paged_attention(step.q, caches[0], caches[1], step.meta, 1.0, None)
    with pytest.raises(ValueError, match="blocks of 8 tokens"):
        paged_attention(step.q, *step.caches[:, :, :8].contiguous(), step.meta, 1.0, None)


@given(
    st.lists(st.integers(0, 90), max_size=3),
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), max_size=2),
    st.one_of(st.none(), st.integers(1, 50)),
    st.booleans(),
)
@settings(deadline=None, max_examples=12)
def test_any_lengths(lengths: list[int], prompts: Spans, window: int | None, cut: bool) -> None:
    spans = [(1, length) for length in lengths] + [(new, new + past) for new, past in prompts]
    if not any(length for _, length in spans):
        spans.append((1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "UNSPLIT", 0 if cut else 100)
        patch.setattr(attention, "MIN_CHUNK", 32)
        Step(spans, heads=(2, 2), decodes=len(lengths)).check(window)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 500)), max_size=5))
def test_query_blocks_hold_every_query_once_and_long_ones_first(prompts: Spans) -> None:
    rows = np.cumsum([0] + [new for new, _ in prompts])
    blocks = query_blocks([(i, int(rows[i]), new, past) for i, (new, past) in enumerate(prompts)])
    assert blocks.dtype == np.int32
    assert blocks.shape[1:] == (4,)
    assert blocks[:, 2].max(initial=1) <= QUERY_BLOCK
    found = [(s, row + i, position + i) for s, row, count, position in blocks.tolist() for i in range(count)]
    wanted = [(s, rows[s] + i, past + i) for s, (new, past) in enumerate(prompts) for i in range(new)]
    assert sorted(found) == wanted
    ends = (blocks[:, 2] + blocks[:, 3]).tolist()
    assert ends == sorted(ends, reverse=True)


def test_rows_stay_whole_only_where_that_fills_the_gpu() -> None:
    assert plan_parts(64, 8, attention.UNSPLIT, 132) == 0
    assert plan_parts(64, 8, attention.UNSPLIT + 1, 132) > 0
    assert plan_parts(1, 8, attention.MIN_CHUNK, 132) == 0
    assert plan_parts(1, 8, 400, 132) * 8 >= 132


SHAPES = [((32, 8), 128), ((32, 8), 64), ((28, 4), 128), ((9, 3), 64), ((64, 8), 128), ((4, 4), 80), ((8, 4), 256)]
MIXED: Spans = [(1, 400), (1, 1), (1, 5000), (1, 129), (300, 300), (129, 2000), (1, 64), (2, 65)]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 512])
def test_models_shapes(heads: tuple[int, int], dim: int, dtype: torch.dtype, window: int | None) -> None:
    Step(MIXED, heads, dim, dtype, decodes=4).check(window)


@pytest.mark.gpu
def test_a_cache_of_more_than_2_to_31_elements() -> None:
    step = Step([(1, 700), (90, 190)], (8, 8), 128, torch.bfloat16, spare=140_000)
    assert step.caches[0].numel() > 2**31
    step.check()


@pytest.mark.gpu
def test_fp32_on_a_gpu() -> None:
    Step([(1, 3000), (1, 4), (70, 90)], (32, 8), 128).check()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 64, 65, 128, 257])
def test_batches_of_decoding_rows(rows: int) -> None:
    step = Step([(1, length) for length in torch.randint(1, 900, (rows,)).tolist()], (32, 8), 128, torch.bfloat16)
    step.check()
    step.meta = replace(step.meta, longest=100_000)
    step.check()
    assert all(torch.equal(step.run(), step.run()) for _ in range(3))


@pytest.mark.gpu
def test_kernels_that_start_early() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    step = Step(MIXED, (32, 8), 128, torch.bfloat16, decodes=4)
    assert torch.equal(step.run(pdl=True), step.run())


@pytest.mark.gpu
@pytest.mark.parametrize("longest", [700, 8192])
def test_a_captured_step_is_replayed_with_other_lengths(longest: int) -> None:
    step = Step([(1, longest)] * 64, (32, 8), 128, torch.bfloat16)
    step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(step.q, *step.caches, step.meta, 128**-0.5, None)
    keys = step.own
    for lengths in ([1] * 64, [longest, *[0] * 63], torch.randint(1, longest, (64,)).tolist()):
        step.meta.decode_lens.copy_(int32(lengths))
        step.spans = [(1, length) for length in lengths]
        step.own = [pair[:, :length] for pair, length in zip(keys, lengths, strict=True)]
        out.fill_(torch.nan)
        graph.replay()
        expected = step.expected()
        assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[torch.bfloat16]
