"""The row that joins trained gates, against least squares written out token by token."""

import numpy as np
import pytest
import torch
from torch import Tensor

from routing.train.row_fit import RowFit, hits

WIDTH, TOKENS = 12, 60


def tokens(seed: int, count: int = TOKENS) -> Tensor:
    """Around a mean of their own, with one feature that hardly changes, as models have them."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(WIDTH, generator=generator)
    mean[0] = 5.0
    return mean + torch.randn(count, WIDTH, generator=generator)


GATES = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(9))


def by_hand(gate: Tensor, old: dict[int, Tensor], new: Tensor, ridge: float) -> np.ndarray:
    """One linear's row: the weighted rows of both sides and of the ridge as one least-squares problem in numpy."""
    leads, aboves, owns = [], [], []
    for label, x in old.items():
        for logits in (x @ gate.T).double().numpy():
            others = np.delete(logits, label)
            owns.append(logits[label])
            leads.append(logits[label] - others.max())
            aboves.append(logits[label] - others.mean())
    everything = torch.cat(list(old.values())).double().numpy()
    fresh = new.double().numpy()
    targets = [*(np.array(owns) - np.mean(aboves)), *((fresh @ gate.double().numpy().T).max(1) + np.mean(leads))]
    weights = np.array([1 / len(everything)] * len(everything) + [1 / len(fresh)] * len(fresh))
    x = np.concatenate([everything, fresh])
    square = np.average(x**2, axis=0, weights=weights).mean() * 2
    design = np.concatenate([x * np.sqrt(weights)[:, None], np.sqrt(ridge * square) * np.eye(WIDTH)])
    wanted = np.concatenate([np.array(targets) * np.sqrt(weights), np.zeros(WIDTH)])
    return np.linalg.lstsq(design, wanted, rcond=None)[0]


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_rows_are_those_of_least_squares(ridge: float) -> None:
    old, new = {0: tokens(1), 2: tokens(2, 35), 1: tokens(3)}, tokens(4, 25)
    fit = RowFit(GATES)
    for label, x in old.items():
        fit.add(x[:20], label)
    fit.add(new[:10], None)
    fit.add(new[10:], None)
    for label, x in old.items():  # in parts, and in any order
        fit.add(x[20:], label)
    found = fit.rows(ridge)
    for linear in range(2):
        np.testing.assert_allclose(found[linear].numpy(), by_hand(GATES[linear], old, new, ridge), rtol=1e-3, atol=1e-3)


def test_new_tokens_go_to_the_new_row_and_others_stay() -> None:
    old = {label: tokens(label + 1) for label in range(3)}
    mean = torch.stack([x.mean(0) for x in old.values()])
    gate = mean - mean.mean(0)  # prototypes
    for label, x in old.items():
        assert hits([gate], x, label).mean() > 0.95
    fit, new = RowFit(gate[None]), tokens(7)
    for label, x in old.items():
        fit.add(x, label)
    fit.add(new, None)
    extended = torch.cat([gate, fit.rows()])
    assert hits([extended], new, 3).mean() > 0.95
    for label, x in old.items():
        assert hits([extended], x, label).mean() > 0.95


def test_hits_are_shares_of_the_gates() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    gates = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.5]])]
    assert hits(gates, x, 0).tolist() == [1.0, 0.5]
    assert hits(gates, x, 1).tolist() == [0.0, 0.5]


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="gates of 1 rows"):
        RowFit(GATES[:, :1])
    fit = RowFit(GATES)
    fit.add(tokens(1), 0)
    with pytest.raises(ValueError, match="0 tokens of the new adapter, 60 of others"):
        fit.rows()
