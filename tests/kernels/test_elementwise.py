"""Norms, activation, rotary embedding with stores, greedy choice and ids in Triton against plain torch."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.elementwise import rms_norm, rms_norm_residual, silu_mul
from kernels.rotary_store import rotary_store
from kernels.sampling import CHUNK, IDS_BLOCK, greedy, input_ids
from kernels.summands import Summands
from tests.kernels.poison import poisoned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
EPS = 1e-5
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def total(x: Summands) -> Tensor:
    y, delta = x
    return y.double() if delta is None else y.double() + delta.double()


def error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


@every_dtype
@pytest.mark.parametrize(("shape", "weight_dims"), [((3, 48), 1), ((2, 3, 16), 2), ((2, 2, 20), 1), ((1, 8), 1)])
def test_rms_norm(shape: tuple[int, ...], weight_dims: int, dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(*shape[-weight_dims:], dtype=dtype)
    with poisoned():
        out = rms_norm(x, weight, EPS)
    expected = torch.nn.functional.rms_norm(x.double(), shape[-1:], eps=EPS) * weight.double()
    assert error(out, expected) < TOLERANCE[dtype]


@every_dtype
def test_norms_round_as_the_reference_does(dtype: torch.dtype) -> None:
    x, residual, weight = (randn(*shape, dtype=dtype) for shape in ((3, 40), (3, 40), (40,)))
    out, summed = rms_norm_residual((x, None), residual, weight, EPS)
    expected, expected_sum = reference.rms_norm_residual((x.clone(), None), residual, weight, EPS)
    assert torch.equal(summed, expected_sum)
    # the sums of squares may differ in their last bit, and with them one value in many
    assert error(out, expected) < TOLERANCE[dtype] / 5
    assert error(rms_norm(summed, weight, EPS), expected) < TOLERANCE[dtype] / 5


@every_dtype
@pytest.mark.parametrize("with_delta", [False, True])
def test_rms_norm_residual(with_delta: bool, dtype: torch.dtype) -> None:
    x = randn(3, 72, dtype=dtype), randn(3, 72, dtype=dtype) if with_delta else None
    residual, weight = randn(3, 72, dtype=dtype), randn(72, dtype=dtype)
    before = total(x), residual.clone()
    with poisoned():
        out, summed = rms_norm_residual(x, residual, weight, EPS)
    expected_sum = total(x) + residual.double()
    assert error(summed, expected_sum) < TOLERANCE[dtype]
    expected = torch.nn.functional.rms_norm(expected_sum, (72,), eps=EPS) * weight.double()
    assert error(out, expected) < TOLERANCE[dtype]
    assert torch.equal(total(x), before[0])
    assert torch.equal(residual, before[1])


def test_a_norm_of_a_view_and_a_wrong_weight() -> None:
    x, weight = randn(2, 6, 16, dtype=torch.float32), randn(4, 16, dtype=torch.float32)
    out = rms_norm(x[:, :4], weight, EPS)
    assert error(out, reference.rms_norm(x[:, :4], weight, EPS)) < 1e-6
    with pytest.raises(ValueError, match=r"weight \(4, 16\) must match .* x \(2, 6, 16\)"):
        rms_norm(x, weight, EPS)


@every_dtype
@pytest.mark.parametrize(("rows", "width"), [(2, 40), (1, 1100)])
@pytest.mark.parametrize("with_delta", [False, True])
def test_silu_mul(with_delta: bool, rows: int, width: int, dtype: torch.dtype) -> None:
    x = randn(rows, 2 * width, dtype=dtype), randn(rows, 2 * width, dtype=dtype) if with_delta else None
    with poisoned():
        out = silu_mul(x)
    gate, up = total(x).chunk(2, dim=-1)
    assert out.shape == (rows, width)
    assert error(out, torch.nn.functional.silu(gate) * up) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of exp, in the interpreter
def test_silu_of_large_values_is_finite() -> None:
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]], device=DEVICE)
    out = silu_mul((torch.cat((gate, torch.ones_like(gate)), dim=-1), None))
    assert torch.allclose(out, torch.nn.functional.silu(gate))


class Projected:
    """Outputs of the projections of some tokens, their angles, and caches of which every other block is foreign."""

    def __init__(
        self, slots: list[int], heads: int, kv_heads: int, size: int, dtype: torch.dtype, with_delta: bool, norm: bool
    ) -> None:
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        shape = len(slots), (heads + 2 * kv_heads) * size
        self.qkv = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype) if with_delta else None
        self.norm = randn(heads + kv_heads, size, dtype=dtype) if norm else None
        angles = torch.rand(len(slots), size // 2, device=DEVICE) * 6
        self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(dtype)
        self.sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(dtype)
        self.slots = int32(*slots)
        blocks = max(slots) // 4 + 2
        self.layers = torch.full((2, 2, blocks, 4, kv_heads, size), 7.0, dtype=dtype, device=DEVICE)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        k_cache, v_cache = self.layers[1]
        with poisoned():
            q = rotary_store(
                self.qkv,
                self.norm,
                EPS,
                self.cos,
                self.sin,
                k_cache,
                v_cache,
                self.slots,
                self.heads,
                self.kv_heads,
            )
        return q, k_cache.flatten(0, 1), v_cache.flatten(0, 1)

    def expected(self) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, and values, fp64[T, *, D]."""
        heads = total(self.qkv).unflatten(-1, (-1, self.size))
        qk, v = heads[:, : -self.kv_heads], heads[:, -self.kv_heads :]
        if self.norm is not None:
            qk = reference.rms_norm(qk.float(), self.norm.float(), EPS).double()
        return reference.rotary(qk, self.cos.double(), self.sin.double()), v


@every_dtype
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (9, 3, 24)])
def test_rotary_store(heads: int, kv_heads: int, size: int, with_delta: bool, norm: bool, dtype: torch.dtype) -> None:
    projected = Projected([9, -1, 2], heads, kv_heads, size, dtype, with_delta, norm)
    q, keys, values = projected.run()
    qk, v = projected.expected()
    kept = [0, 2]
    assert error(q, qk[:, :heads]) < TOLERANCE[dtype]
    assert error(keys[[9, 2]], qk[kept, heads:]) < TOLERANCE[dtype]
    assert error(values[[9, 2]], v[kept]) < TOLERANCE[dtype]
    others = [slot for slot in range(len(keys)) if slot not in (9, 2)]
    assert (keys[others] == 7).all()
    assert (values[others] == 7).all()
    assert (projected.layers[0] == 7).all()


def test_rotary_store_refuses_a_cache_with_gaps() -> None:
    projected = Projected([1], 2, 2, 16, torch.float32, False, False)
    projected.layers = torch.zeros(2, 2, 2, 4, 2, 32, device=DEVICE)[..., :16]
    with pytest.raises(ValueError, match="evenly spaced slots"):
        projected.run()


@every_dtype
@pytest.mark.parametrize("size", [5, 100, CHUNK + 3])
def test_greedy_takes_the_first_of_equal_maxima(size: int, dtype: torch.dtype) -> None:
    logits = randn(2, size, dtype=dtype)
    logits[0, [size // 2, size - 2, size - 1]] = 50.0
    logits[1, size // 3] = 50.0
    with poisoned():
        tokens = greedy(logits)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [size // 2, size // 3]


@every_dtype
@pytest.mark.parametrize("size", [40, CHUNK + 3])
def test_greedy_marks_rows_that_are_not_finite(size: int, dtype: torch.dtype) -> None:
    logits = torch.full((4, size), -torch.inf, dtype=dtype, device=DEVICE)
    logits[0, 3] = torch.nan
    logits[0, 5] = 1.0
    logits[1, 7] = torch.inf
    logits[2, size - 1] = -3.0
    assert greedy(logits).tolist() == [-1, -1, size - 1, -1]


@every_dtype
@pytest.mark.parametrize("size", [5, 100, CHUNK + 35])
def test_greedy_of_what_masks_allow(size: int, dtype: torch.dtype) -> None:
    """As the reference; a mask may have more bits than there are tokens, and what it forbids may be anything."""
    logits, masks = randn(6, size, dtype=dtype), random_masks(6, size)
    logits[1] = torch.nan
    logits[2, [0, size - 1]] = torch.nan
    masks[2, 0] &= ~1
    masks[2, (size - 1) // 32] &= ~(1 << (size - 1) % 32)
    masks[3] = 0
    with poisoned():
        tokens = greedy(logits, masks)
    expected = reference.greedy(logits.cpu(), masks.cpu())
    assert tokens.tolist() == expected.tolist()
    assert tokens[[1, 3]].tolist() == [-1, -1]
    assert (tokens[[0, 2, 4, 5]] >= 0).all()


def random_masks(rows: int, size: int) -> Tensor:
    """int32[rows, words]: every second token on average, the last and the one before it always."""
    bits = torch.rand(rows, -(-size // 32) + 1, 32) < 0.5
    bits.view(rows, -1)[:, size - 2 : size] = True
    words = (bits.long() << torch.arange(32)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).to(DEVICE)


def test_input_ids_come_from_the_host_or_from_the_last_step() -> None:
    sampled = torch.tensor([11, -1, 13], device=DEVICE)
    ids = int32(5, 6, 7, 8, *range(IDS_BLOCK))
    sources = int32(-1, 2, 1, 0, *[-1] * IDS_BLOCK)
    with poisoned():
        out = input_ids(ids, sources, sampled)
    assert out.dtype == torch.int64
    assert out.tolist() == [5, 13, 0, 11, *range(IDS_BLOCK)]


def test_no_rows() -> None:
    empty = torch.empty(0, 32, device=DEVICE)
    weight = torch.ones(32, device=DEVICE)
    assert rms_norm(empty, weight, EPS).shape == (0, 32)
    assert silu_mul((empty, None)).shape == (0, 16)
    assert greedy(empty).shape == (0,)
    assert input_ids(int32(), int32(), torch.empty(0, dtype=torch.int64, device=DEVICE)).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("rows", [1, 64, 257])
def test_model_sizes(rows: int, pdl: bool) -> None:
    dtype = torch.bfloat16
    x = randn(rows, 4096, dtype=dtype), randn(rows, 4096, dtype=dtype)
    residual, weight = randn(rows, 4096, dtype=dtype), randn(4096, dtype=dtype)
    with poisoned():
        out, summed = rms_norm_residual(x, residual, weight, EPS, pdl=pdl)
        out = rms_norm(out, weight, EPS, pdl=pdl)
    expected_sum = total(x) + residual.double()
    expected = torch.nn.functional.rms_norm(expected_sum, (4096,), eps=EPS) * weight.double()
    expected = torch.nn.functional.rms_norm(expected, (4096,), eps=EPS) * weight.double()
    assert error(summed, expected_sum) < TOLERANCE[dtype]
    assert error(out, expected) < 2 * TOLERANCE[dtype]
    wide = randn(rows, 28672, dtype=dtype), randn(rows, 28672, dtype=dtype)
    with poisoned():
        activated = silu_mul(wide, pdl=pdl)
    gate, up = total(wide).chunk(2, dim=-1)
    assert error(activated, torch.nn.functional.silu(gate) * up) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("rows", [1, 64, 257])
def test_greedy_of_a_large_vocabulary(rows: int, pdl: bool) -> None:
    logits = randn(rows, 128256, dtype=torch.bfloat16)
    logits[rows - 1, 100] = torch.nan
    with poisoned():
        tokens = greedy(logits, pdl=pdl)
    values = logits.float()
    columns = torch.arange(values.shape[1], device=DEVICE)
    expected = torch.where(values == values.amax(-1, keepdim=True), columns, values.shape[1]).amin(-1)
    expected[rows - 1] = -1
    assert torch.equal(tokens, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_masked_greedy_of_a_large_vocabulary(pdl: bool) -> None:
    logits, masks = randn(64, 128256, dtype=torch.bfloat16), random_masks(64, 128256)
    with poisoned():
        tokens = greedy(logits, masks, pdl=pdl)
    values = reference.forbid(logits, masks).float()
    columns = torch.arange(values.shape[1], device=DEVICE)
    expected = torch.where(values == values.amax(-1, keepdim=True), columns, values.shape[1]).amin(-1)
    assert torch.equal(tokens, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
def test_rotary_store_of_a_model(norm: bool) -> None:
    slots = torch.randperm(4 * 80)[:65].tolist()
    projected = Projected([-1, *slots[1:]], 32, 8, 128, torch.bfloat16, True, norm)
    q, keys, values = projected.run()
    qk, v = projected.expected()
    assert error(q, qk[:, :32]) < TOLERANCE[torch.bfloat16]
    assert error(keys[slots[1:]], qk[1:, 32:]) < TOLERANCE[torch.bfloat16]
    assert error(values[slots[1:]], v[1:]) < TOLERANCE[torch.bfloat16]
