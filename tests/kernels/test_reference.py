"""The reference operations against their plainest formulation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kernels import reference
from kernels.mapping import RowSpan, build_mapping
from tests.kernels.test_mapping import NUM_PAGES, span_lists

CPU = torch.device("cpu")
SLICES = {1: (24,), 2: (20, 20), 3: (24, 8, 8)}
IN = 20


def pages(num_slices: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_slices)
    a = torch.randn(NUM_PAGES, num_slices * 16, IN, generator=generator) / IN**0.5
    b = torch.randn(NUM_PAGES, 16, sum(SLICES[num_slices]), generator=generator) / 4
    return a, b


def plain_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    spans: list[RowSpan],
    slices: tuple[int, ...],
    scale: Tensor | None = None,
    columns: tuple[int, ...] = (),
) -> Tensor:
    """For every span, page and slice: y += weight * scale * (x A^T) B."""
    y = torch.zeros(len(x), sum(slices), dtype=x.dtype)
    for span in spans:
        rows = slice(span.start, span.stop)
        for page, weight in zip(span.pages, span.weights, strict=True):
            parts = zip(a[page].split(16), b[page].split(slices, dim=1), y[rows].split(slices, dim=1), strict=True)
            for s, (part_a, part_b, out) in enumerate(parts):
                factor = scale[s, rows, columns.index(page), None] if scale is not None and page in columns else 1.0
                out += weight * factor * (x[rows] @ part_a.T @ part_b)
    return y


@pytest.mark.parametrize("num_slices", SLICES)
@pytest.mark.parametrize("scaled", [False, True])
@given(spans=span_lists())
@settings(deadline=None, max_examples=30)
def test_lora_equals_the_plain_loop(num_slices: int, scaled: bool, spans: list[RowSpan]) -> None:
    mapping = build_mapping(spans, CPU)
    if mapping is None:
        return
    slices, (a, b) = SLICES[num_slices], pages(num_slices)
    generator = torch.Generator().manual_seed(len(spans))
    rows = spans[-1].stop
    x = torch.randn(rows, IN, generator=generator)
    y = torch.randn(rows, sum(slices), generator=generator)
    scale = torch.randn(num_slices, rows, len(mapping.pages), generator=generator).relu() if scaled else None
    expected = y + plain_lora(x, a, b, spans, slices, scale, mapping.pages)
    result = reference.lora_(y, x, a, b, mapping, slices, scale)
    assert result is y
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_bf16_lora_rounds_once() -> None:
    spans = [RowSpan(i, i + 1, (i, 5 * i + 1, 23), (0.5, -1.5, 0.25)) for i in range(4)] + [
        RowSpan(4, 30, (2, 9), (1.0, 0.5))
    ]
    mapping = build_mapping(spans, CPU)
    assert mapping is not None
    a, b = (part.bfloat16() for part in pages(3))
    x, y = torch.randn(30, IN).bfloat16(), torch.randn(30, 40).bfloat16()
    exact = y.double() + plain_lora(x.double(), a.double(), b.double(), spans, SLICES[3])
    reference.lora_(y, x, a, b, mapping, SLICES[3])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.bfloat16(), atol=1e-6, rtol=2**-7)
    assert (y == exact.bfloat16()).float().mean() > 0.98


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, 20], ids=["decoding", "prefill"])
def test_pages_of_other_rows_do_not_spread(poison: float, rows: int) -> None:
    """Page 3 belongs to another row and page 4 to none; both lie between the pages that are in use."""
    used = [(2,), (3,), (5,), (), (2, 5, 6)]
    spans = [RowSpan(i * rows, (i + 1) * rows, page, (0.5,) * len(page)) for i, page in enumerate(used)]
    mapping = build_mapping(spans, CPU)
    assert mapping is not None
    a, b = pages(3)
    x = torch.randn(len(used) * rows, IN)
    clean = reference.lora_(torch.zeros(len(x), 40), x, a, b, mapping, SLICES[3])
    for page in (3, 4):
        a[page], b[page] = poison, poison
    y = reference.lora_(torch.zeros(len(x), 40), x, a, b, mapping, SLICES[3])
    others = torch.ones(len(x), dtype=torch.bool)
    others[rows : 2 * rows] = False
    assert torch.equal(y[others], clean[others])
    assert not y[~others].isfinite().any()


@pytest.mark.parametrize("rows", [1, 20], ids=["decoding", "prefill"])
def test_a_scale_of_zero_hides_an_overflowing_page(rows: int) -> None:
    spans = [RowSpan(0, rows, (0, 1), (1.0, 1.0)), RowSpan(rows, rows + 1, (1,), (1.0,))]
    mapping = build_mapping(spans, CPU)
    assert mapping is not None
    a, b = pages(1)
    x = torch.randn(rows + 1, IN)
    alone = build_mapping([RowSpan(0, rows, (0,), (1.0,))], CPU)
    assert alone is not None
    expected = reference.lora_(torch.zeros(rows + 1, 24), x, a, b, alone, (24,))
    a[1] = float("inf")
    scale = torch.tensor([1.0, 0.0]).expand(1, rows + 1, 2)
    torch.testing.assert_close(reference.lora_(torch.zeros(rows + 1, 24), x, a, b, mapping, (24,), scale), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_transformers(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, residual = torch.randn(2, 7, 48, dtype=dtype)
    with torch.no_grad():
        expected, expected_sum = norm(x), norm(x + residual)
        torch.testing.assert_close(reference.rms_norm(x, norm.weight, 1e-5), expected)
        total = x + residual
        normed, stream = reference.rms_norm_residual((x, None), residual, norm.weight, 1e-5)
        torch.testing.assert_close(normed, expected_sum)
        assert torch.equal(stream, total)


def test_rotary_equals_transformers() -> None:
    x = torch.randn(5, 3, 8)
    cos, sin = torch.randn(2, 5, 4)
    full = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    [expected], _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], full[0][None], full[1][None])
    result = reference.rotary(x, full[0], torch.cat((-sin, sin), -1))
    torch.testing.assert_close(result, expected.transpose(0, 1))


def test_silu_mul() -> None:
    x = torch.randn(3, 10)
    torch.testing.assert_close(reference.silu_mul((x, None)), functional.silu(x[:, :5]) * x[:, 5:])


@given(rows=st.sampled_from([1, 2, 7, 33]), bias=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_packed_linear_equals_the_plain_one(rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(40, 24, dtype=dtype)
    added = torch.randn(40, dtype=dtype) if bias else None
    x = torch.randn(rows, 24, dtype=dtype)
    expected = functional.linear(x, weight, added)
    torch.testing.assert_close(reference.linear(x, weight, added), expected)
    torch.testing.assert_close(reference.linear(x, reference.pack_linear(weight), added), expected)
