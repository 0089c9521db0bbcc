import pytest
import torch

from routing.train.grouped_optimizer import GroupedAdamW, clip_rows


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_rows_move_as_under_torchs_adamw(weight_decay: float) -> None:
    torch.manual_seed(3)
    values = torch.randn(3, 40)
    rates = torch.tensor([[1e-1, 1e-3, 0.0]] * 4 + [[5e-2, 0.0, 1e-2]] * 4)
    alone = [torch.nn.Parameter(row.clone()) for row in values]
    optimizers = [torch.optim.AdamW([row], lr=0.0, weight_decay=weight_decay) for row in alone]
    together = GroupedAdamW(values, weight_decay)
    for step in range(8):
        gradients = torch.randn(3, 40) * 10.0 ** (step - 4)
        together.step(gradients, rates[step])
        for row, optimizer, gradient, rate in zip(alone, optimizers, gradients, rates[step], strict=True):
            row.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = float(rate)
            optimizer.step()
        torch.testing.assert_close(values, torch.stack([row.detach() for row in alone]), rtol=2e-5, atol=1e-7)


def test_a_row_of_rate_zero_stays_in_the_same_bits() -> None:
    values = torch.randn(2, 5)
    before = values.clone()
    GroupedAdamW(values, 0.5).step(torch.randn(2, 5), torch.tensor([0.0, 1e-2]))
    assert torch.equal(values[0], before[0])
    assert not torch.equal(values[1], before[1])


def test_rows_are_clipped_each_by_its_own_norm() -> None:
    gradients = torch.randn(3, 40) * torch.tensor([[1e-3], [1.0], [1e3]])
    expected = []
    for row in gradients:
        parts = [torch.nn.Parameter(torch.zeros(size)) for size in (7, 33)]
        for part, gradient in zip(parts, row.split((7, 33)), strict=True):
            part.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(parts, 0.7)
        expected.append(torch.cat([part.grad for part in parts if part.grad is not None]))
    clip_rows(gradients, 0.7)
    torch.testing.assert_close(gradients, torch.stack(expected))
    assert gradients[0].norm() < 0.7
    assert gradients[2].norm() <= 0.7 * (1 + 1e-5)
