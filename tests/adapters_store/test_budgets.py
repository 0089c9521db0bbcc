"""Budgets and places in both databases."""

from collections.abc import Callable

from adapters_store.registry import BudgetWish, PlaceWish, Registry

MakeUrl = Callable[[], str]


def wish(back: float, need: float, want: float) -> BudgetWish:
    return BudgetWish("acme", "requests", 1e-6, 10.0, back, need, want)


def test_holders_share_one_bucket(make_url: MakeUrl) -> None:
    url = make_url()
    registries = [Registry.open(url, lambda: 1000.0) for _ in range(2)]
    one, other = (registry.budgets(f"p{number}") for number, registry in enumerate(registries))
    try:
        assert one.exchange([wish(0, 1, 6)])[0][0].amount == 6
        assert round(other.exchange([wish(0, 1, 6)])[0][0].amount, 3) == 4
        assert other.exchange([wish(0, 1, 6)])[0][0].amount == 0
        one.exchange([wish(5, 0, 0)])
        assert round(other.exchange([wish(-2, 1, 6)])[0][0].amount, 3) == 3
        most = [PlaceWish("acme", 3, 0, 2, 2)]
        assert one.exchange([], most)[1] == [2]
        assert other.exchange([], most)[1] == [0]
        assert other.exchange([], [PlaceWish("acme", 3, 0, 1, 1)])[1] == [1]
        one.leave()
        assert other.exchange([], [PlaceWish("acme", 3, 1, 3, 3)])[1] == [3]
    finally:
        for registry in registries:
            registry.close()
