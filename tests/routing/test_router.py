"""The explicit router: what clients name becomes a route."""

from collections.abc import Mapping, Sequence

import pytest

from adapters_store.registry import Resolved
from adapters_store.types import Composition, Mix
from routing.router import ExplicitRouter, NamedWeight, Route, RouteError, RouteQuery, Routers


class Store:
    """Adapters `a` to `c` of tenant `t`, and the public `copy` with the weights of `a`. Counts the questions."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def resolve(self, tenant: str, names: Sequence[str]) -> Mapping[str, Resolved]:
        self.asked.append(list(names))
        digests = {"a": "d1", "b": "d2", "c": "d3"} if tenant == "t" else {}
        found = {name: Resolved(tenant, name, digests[name], False, "", "") for name in names if name in digests}
        return found | ({"copy": Resolved("default", "copy", "d1", True, "", "")} if "copy" in names else {})


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def router(store: Store) -> ExplicitRouter:
    ticks = iter(range(1000))
    return ExplicitRouter(store, "base", lambda: float(next(ticks)))  # type: ignore[arg-type]


def query(*adapters: tuple[str, float | None], model: str = "base", composition: str = "mixture") -> RouteQuery:
    named = tuple(NamedWeight(name, weight) for name, weight in adapters) if adapters else None
    return RouteQuery("t", model, named, Composition(composition))


async def test_the_base_model(router: ExplicitRouter) -> None:
    route = await router.route(query())
    assert route == Route(None, (), Composition.MIXTURE, Mix(), seconds=1.0)
    assert route.label == "base"


async def test_one_adapter_has_weight_one(router: ExplicitRouter) -> None:
    route = await router.route(query(model="b"))
    assert route.mix == Mix((("d2", 1.0),))
    assert route.label == "b"


async def test_weights_default_to_their_share(router: ExplicitRouter) -> None:
    route = await router.route(query(("b", None), ("a", 2.0), ("c", None)))
    assert [entry.weight for entry in route.adapters] == [1 / 3, 2.0, 1 / 3]
    assert route.mix == Mix((("d1", 2.0), ("d2", 1 / 3), ("d3", 1 / 3)))
    assert route.label == "a+b+c"


async def test_names_of_equal_weights_add_up(router: ExplicitRouter) -> None:
    route = await router.route(query(("a", 0.25), ("copy", 0.5)))
    assert route.mix == Mix((("d1", 0.75),))
    assert [(entry.owner, entry.name) for entry in route.adapters] == [("t", "a"), ("default", "copy")]
    assert [(each.tenant, each.name) for each in route.resolved] == [("t", "a"), ("default", "copy")]


async def test_what_has_no_weight_is_not_needed(router: ExplicitRouter) -> None:
    route = await router.route(query(("a", 0.0), ("b", 1.0), ("b", 1.0)))
    assert [entry.name for entry in route.adapters] == ["a", "b", "b"]
    assert [each.name for each in route.resolved] == ["b"]


async def test_all_names_are_asked_for_at_once(router: ExplicitRouter, store: Store) -> None:
    await router.route(query(("a", None), ("b", None), model="c"))
    await router.route(query())
    assert store.asked == [["a", "b", "c"]]


async def test_fusion_normalises(router: ExplicitRouter) -> None:
    route = await router.route(query(("a", 6.0), ("b", 2.0), composition="fusion"))
    assert [entry.weight for entry in route.adapters] == [0.75, 0.25]
    assert route.mix == Mix((("d1", 0.75), ("d2", 0.25)), Composition.FUSION)


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (0.1 + 0.2, -0.3)])
async def test_fusion_weights_must_not_cancel(router: ExplicitRouter, weights: tuple[float, float]) -> None:
    with pytest.raises(RouteError, match="must not sum to 0") as refused:
        await router.route(query(("a", weights[0]), ("b", weights[1]), composition="fusion"))
    assert refused.value.param == "lora.adapters"


async def test_selection_takes_the_first_of_the_heaviest(router: ExplicitRouter) -> None:
    route = await router.route(query(("a", 0.1), ("b", 0.9), ("c", 0.9), composition="selection"))
    assert route.mix == Mix((("d2", 1.0),))
    assert [(entry.name, entry.weight) for entry in route.adapters] == [("b", 1.0)]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (query(model="x"), "model"),
        (query(("a", None), model="x"), "model"),
        (query(("a", None), ("x", None)), "lora.adapters.1.name"),
        (query(("base", None)), "lora.adapters.0.name"),
        (RouteQuery("other", "a"), "model"),
    ],
)
async def test_unknown_names(router: ExplicitRouter, asked: RouteQuery, param: str) -> None:
    with pytest.raises(RouteError) as refused:
        await router.route(asked)
    assert (refused.value.code, refused.value.param) == ("model_not_found", param)


class Always:
    """A router that has seen what it was asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def route(self, query: RouteQuery) -> Route:
        return Route(self.name, (), query.composition, Mix())


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (RouteQuery("t", "auto"), "first"),
        (RouteQuery("t", "auto:second"), "second"),
        (RouteQuery("t", "a", router="second"), "second"),
        (RouteQuery("t", "a"), "explicit"),
    ],
)
async def test_which_router_decides(router: ExplicitRouter, asked: RouteQuery, name: str) -> None:
    routers = Routers(router, {"first": Always("first"), "second": Always("second")}, default="first")
    assert (await routers.route(asked)).router == name


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        (RouteQuery("t", "auto:third"), "router_not_found", "model"),
        (RouteQuery("t", "auto"), "router_not_found", "model"),
        (RouteQuery("t", "auto:", default_router="first"), "router_not_found", "model"),
        (RouteQuery("t", "a", router="third"), "router_not_found", "lora.router"),
        (RouteQuery("t", "auto", (NamedWeight("a"),)), "invalid_value", "lora.adapters"),
    ],
)
async def test_routers_that_cannot_decide(router: ExplicitRouter, asked: RouteQuery, code: str, param: str) -> None:
    with pytest.raises(RouteError) as refused:
        await Routers(router, {"first": Always("first")}).route(asked)
    assert (refused.value.code, refused.value.param) == (code, param)


async def test_without_routers_auto_is_refused(router: ExplicitRouter) -> None:
    with pytest.raises(RouteError, match="no router is available") as refused:
        await Routers(router).route(RouteQuery("t", "auto:retriever"))
    assert (refused.value.code, refused.value.param) == ("no_router", "model")
