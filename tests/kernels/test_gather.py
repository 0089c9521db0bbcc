"""The layout of a step, and attention over a paged cache against attention over plain tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kernels import reference
from kernels.gather import GROUP_COST, build_attention

CPU = torch.device("cpu")


def test_new_tokens_go_behind_the_old_ones() -> None:
    meta = build_attention([[5, 2], [7, 1, 3], [4]], [1, 3, 2], [6, 10, 2], 4, CPU)
    assert meta.slots.tolist() == [2 * 4 + 1, 1 * 4 + 3, 3 * 4, 3 * 4 + 1, 16, 17]
    assert meta.block_tables.tolist() == [[5, 2, 0], [7, 1, 3], [4, 0, 0]]
    assert meta.num_decodes == 1


def test_a_table_may_be_longer_than_needed_but_not_shorter() -> None:
    assert build_attention([[1, 2, 3]], [1], [4], 4, CPU).block_tables.tolist() == [[1]]
    with pytest.raises(ValueError, match="table of 1 blocks"):
        build_attention([[1]], [1], [5], 4, CPU)
    with pytest.raises(ValueError, match="3 new of 2 tokens"):
        build_attention([[1]], [3], [2], 4, CPU)


def test_layers_share_one_plan() -> None:
    meta = build_attention([[1], [2], [3]], [1, 1, 2], [3, 4, 4], 4, CPU)
    cache = torch.zeros(4, 4, 2, 8)
    assert meta.decode_plans(cache, None) is meta.decode_plans(cache, None)
    assert meta.prefill_plan(cache, 2, 3) is meta.prefill_plan(cache, 2, 3)
    assert meta.prefill_plan(cache, 2, 3) is not meta.prefill_plan(cache, 2, None)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12))
@settings(deadline=None)
def test_decoding_rows_are_grouped_by_length_when_padding_is_dear(lens: list[int]) -> None:
    size = 64
    tables = [list(range(-(-length // size))) for length in lens]
    plans = build_attention(tables, [1] * len(lens), lens, size, CPU).decode_plans(torch.zeros(1, size, 1, 2), None)
    rows = [list(range(len(lens))) if plan.rows is None else plan.rows.tolist() for plan in plans]
    assert sorted(row for group in rows for row in group) == list(range(len(lens)))
    for plan, group in zip(plans, rows, strict=True):
        longest = max(lens[row] for row in group)
        assert plan.keys.shape == (len(group), 1, longest, 2)
        for row in group:
            shorter = [other for other in group if lens[other] <= lens[row]]
            assert len(shorter) * (longest - lens[row]) <= GROUP_COST


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int], int | None]:
    """(query lengths, kv lengths) with decodes first, and a window."""
    decodes = draw(st.lists(st.one_of(st.integers(1, 30), st.just(400)), max_size=5))
    prefills = draw(
        st.lists(st.tuples(st.sampled_from([1, 2, 6, 19]), st.integers(0, 20)), min_size=not decodes, max_size=3)
    )
    query_lens = [1] * len(decodes) + [new for new, _ in prefills]
    kv_lens = decodes + [new + past for new, past in prefills]
    return query_lens, kv_lens, draw(st.sampled_from([None, 1, 3, 8, 100]))


def plain(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of the last len(q) positions of one sequence; k, v [kv, heads, D] with as many heads as q."""
    position = torch.arange(len(k) - len(q), len(k))[:, None]
    key = torch.arange(len(k))
    visible = key <= position
    if window is not None:
        visible &= key > position - window
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (2, 2), (4, 1)])
@given(layout=layouts())
@settings(deadline=None, max_examples=60)
def test_paged_attention_equals_plain_attention(
    heads: int, kv_heads: int, layout: tuple[list[int], list[int], int | None]
) -> None:
    query_lens, kv_lens, window = layout
    size, block_size = 8, 4
    needed = [-(-length // block_size) for length in kv_lens]
    generator = torch.Generator().manual_seed(sum(kv_lens))
    ids = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    tables = [[ids.pop() for _ in range(count)] for count in needed]
    # Memory that belongs to no token of a sequence holds NaN, which must not get anywhere.
    cache = torch.full((sum(needed) + 3, block_size, kv_heads, size), float("nan"))
    k_cache, v_cache = cache, cache.clone()
    q = torch.randn(sum(query_lens), heads, size, generator=generator)
    keys = [torch.randn(length, kv_heads, size, generator=generator) for length in kv_lens]
    values = [torch.randn(length, kv_heads, size, generator=generator) for length in kv_lens]
    for table, k, v, new in zip(tables, keys, values, query_lens, strict=True):
        old = len(k) - new
        before = build_attention([table], [old], [old], block_size, CPU) if old else None
        if before:
            reference.store_kv(k[:old], v[:old], k_cache, v_cache, before)
    meta = build_attention(tables, query_lens, kv_lens, block_size, CPU)
    new_keys, new_values = (
        torch.cat([part[len(part) - new :] for part, new in zip(parts, query_lens, strict=True)])
        for parts in (keys, values)
    )
    reference.store_kv(new_keys, new_values, k_cache, v_cache, meta)
    out = reference.paged_attention(q, (k_cache, v_cache), meta, 0.5, window)
    expected = [
        plain(query, k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1), window)
        for query, k, v in zip(q.split(query_lens), keys, values, strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_bf16_attention_is_close_to_fp32() -> None:
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 8, 4, 2, 16, dtype=torch.bfloat16).unbind()
    q = torch.randn(5, 4, 16, dtype=torch.bfloat16)
    layout = [[3, 1], [0], [5, 2]], [1, 1, 3], [7, 2, 6], 4, CPU
    out = reference.paged_attention(q, (k_cache, v_cache), build_attention(*layout), 0.25, None)
    assert out.dtype == torch.bfloat16
    caches = k_cache.float(), v_cache.float()
    exact = reference.paged_attention(q.float(), caches, build_attention(*layout), 0.25, None)
    assert functional.cosine_similarity(out.float(), exact, dim=-1).min() > 0.999
