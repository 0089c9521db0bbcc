"""The retriever: what is chosen, how it is weighed, what is remembered, and what it answers where nothing fits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from adapters_store.types import Composition, Mix
from routing.prototype_index import PrototypeIndex
from routing.retriever import LONGEST_TEXT, Retriever, RetrieverDefaults
from routing.router import Outcome, Route, RouteError, RouteQuery, Scored
from routing.router_options import RouterOptions
from tests.routing.prototype_world import ChosenEncoder, Names, unit


class World:
    """Of tenant t: x, y, z along the axes, hidden along x under a public name; public: shared. Of u: theirs."""

    def __init__(self) -> None:
        self.names = Names(
            t={"x": False, "y": False, "z": False, "hidden": False},
            u={"theirs": False},
            default={"shared": True, "hidden": True},
        )
        self.encoder = ChosenEncoder(3)
        self.index = PrototypeIndex(3)
        for owner, name, public, vector in (
            ("t", "x", False, unit(1, 0, 0)),
            ("t", "y", False, unit(0, 1, 0)),
            ("t", "z", False, unit(0, 0, 1)),
            ("t", "hidden", False, unit(-1, 0, 0)),
            ("u", "theirs", False, unit(1, 0, 0)),
            ("default", "shared", True, unit(1, 1, 0)),
            ("default", "hidden", True, unit(1, 0, 0)),
        ):
            self.index.put(owner, name, public, vector[None])
        self.defaults = RetrieverDefaults(min_score=0.2)
        self.router = self.make()

    def make(self, **options: Any) -> Retriever:
        ticks = iter(range(100_000))
        store: Any = self.names
        return Retriever(
            "retriever", self.encoder, self.index, store, self.defaults, lambda: float(next(ticks)), **options
        )

    async def route(
        self,
        text: str | None,
        tenant: str = "t",
        composition: str = "mixture",
        router: str | None = None,
        **options: Any,
    ) -> Route:
        query = RouteQuery(
            tenant, "auto", None, Composition(composition), router, text=text, options=RouterOptions(**options)
        )
        return await self.router.route(query)


@pytest.fixture
def world() -> World:
    return World()


def chosen(route: Route) -> list[tuple[str, str, float]]:
    return [(each.owner, each.name, each.weight) for each in route.adapters]


def names(route: Route) -> list[str]:
    return [each.name for each in route.adapters]


class TestChoice:
    async def test_the_encoder_hears_whose_text_it_is(self, world: World) -> None:
        for tenant in ("t", "u"):
            await world.route("10,8,1", tenant=tenant)
        assert world.encoder.tenants == ["t", "u"]

    async def test_the_most_similar_share_equally(self, world: World) -> None:
        route = await world.route("10,8,1")
        third = 1 / 3
        assert chosen(route) == [("default", "shared", third), ("t", "x", third), ("t", "y", third)]
        assert route.mix == Mix((("default-shared", third), ("t-x", third), ("t-y", third)))
        assert (route.router, route.outcome, route.cached, route.scores) == ("retriever", Outcome.ROUTED, False, None)
        assert route.seconds == 1.0
        query = unit(10, 8, 1)
        expected = [float(query @ unit(1, 1, 0)), float(query[0]), float(query[1])]
        assert [each.score for each in route.adapters] == pytest.approx(expected, abs=2e-6)

    async def test_fewer_than_top_k_share_too(self, world: World) -> None:
        assert chosen(await world.route("0,0,1")) == [("t", "z", 1.0)]
        assert chosen(await world.route("10,1,4", min_score=0.3)) == [
            ("t", "x", 1 / 3),
            ("default", "shared", 1 / 3),
            ("t", "z", 1 / 3),
        ]
        assert names(await world.route("10,8,1", top_k=1)) == ["shared"]
        assert len((await world.route("10,8,7", top_k=100)).adapters) == 4

    async def test_only_own_and_public_adapters(self, world: World) -> None:
        assert names(await world.route("1,0,0", tenant="u")) == ["hidden", "theirs", "shared"]
        assert names(await world.route("1,0,0", tenant="v")) == ["hidden", "shared"]
        assert names(await world.route("-1,0,0")) == ["hidden"]
        assert [each.owner for each in (await world.route("-1,0,0")).adapters] == ["t"]

    async def test_softmax_weights_are_multiples_of_a_32th(self, world: World) -> None:
        route = await world.route("10,8,1", temperature=0.2)
        weights = [each.weight for each in route.adapters]
        powers = np.exp(np.array([each.score for each in route.adapters]) / 0.2)
        assert weights == pytest.approx(powers / powers.sum(), abs=1 / 32)
        assert sum(weights) == 1.0
        assert all((weight * 32).is_integer() for weight in weights)
        assert chosen(await world.route("10,8,1", temperature=0.001)) == [("default", "shared", 1.0)]

    async def test_as_few_as_hold_the_mass(self, world: World) -> None:
        counts = [len((await world.route("10,8,1", score_mass=mass)).adapters) for mass in (0.3, 0.7, 0.95, 1.0)]
        assert counts == [1, 2, 3, 3]
        route = await world.route("10,8,1", score_mass=0.7)
        assert [each.weight for each in route.adapters] == [0.5, 0.5]
        route = await world.route("10,8,1", score_mass=0.7, temperature=10.0)
        assert len(route.adapters) == 3

    async def test_compositions(self, world: World) -> None:
        route = await world.route("10,8,1", composition="selection")
        assert chosen(route) == [("default", "shared", 1.0)]
        assert route.mix == Mix((("default-shared", 1.0),))
        route = await world.route("10,8,1", composition="fusion", top_k=2)
        assert route.mix == Mix((("default-shared", 0.5), ("t-x", 0.5)), Composition.FUSION)

    async def test_explaining(self, world: World) -> None:
        route = await world.route("1,0,0", explain=True)
        assert route.scores == (
            Scored("x", 1.0),
            Scored("shared", pytest.approx(0.707107)),
            Scored("y", 0.0),
            Scored("z", 0.0),
            Scored("hidden", -1.0),
        )
        assert names(route) == ["x", "shared"]
        assert (await world.route("1,0,0", explain=True, candidates=("z", "x"))).scores == (
            Scored("x", 1.0),
            Scored("z", 0.0),
        )
        assert (await world.route(" ", explain=True)).scores == ()


class TestNothingFits:
    @pytest.mark.parametrize("text", [None, "", " ", "\n\t\u00a0\u3000"])
    async def test_no_text(self, world: World, text: str | None) -> None:
        route = await world.route(text)
        assert (route.router, route.adapters, route.mix) == ("retriever", (), Mix())
        assert route.outcome is Outcome.EMPTY_TEXT
        assert world.encoder.asked == []

    async def test_nothing_scores_enough(self, world: World) -> None:
        route = await world.route("0,-1,0")
        assert (route.outcome, route.adapters, route.router) == (Outcome.BELOW_MIN_SCORE, (), "retriever")
        assert names(await world.route("0,-1,0", min_score=-1.0, top_k=1)) == ["hidden"]

    async def test_no_candidates(self, world: World) -> None:
        assert (await world.route("1,0,0", candidates=())).outcome is Outcome.NO_CANDIDATES
        world.names.owned["t"]["new"] = False  # registered, and without prototypes yet
        assert (await world.route("1,0,0", candidates=("new",))).outcome is Outcome.NO_CANDIDATES
        for name in ("shared", "hidden"):
            world.index.remove("default", name)
        assert (await world.route("1,0,0", tenant="v")).outcome is Outcome.NO_CANDIDATES
        assert world.encoder.asked == []

    async def test_texts_of_any_kind(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        async def embed(texts: Sequence[str], *, tenant: str) -> np.ndarray:  # noqa: ARG001
            for text in texts:
                text.encode()
            return unit(1, 0, 0)[None]

        monkeypatch.setattr(world.encoder, "embed", embed)
        for text in ("x" * 100_000, "Übersetze", "量子力学", "مرحبا", "\ud800 half a pair", "\0", "🦜" * 50):
            assert names(await world.route(text)) == ["x", "shared"]

    async def test_what_no_encoder_reads_is_not_looked_at(self, world: World) -> None:
        text = "1,0,0".ljust(LONGEST_TEXT)
        assert not (await world.route(text + "one end")).cached
        assert world.encoder.asked == [[text]]
        assert (await world.route(text + "another")).cached


class TestCandidates:
    async def test_they_narrow_the_choice(self, world: World) -> None:
        assert names(await world.route("10,8,1", candidates=("y", "z", "y"), min_score=-1.0)) == ["y", "z"]
        assert chosen(await world.route("1,0,0", candidates=("shared",))) == [("default", "shared", 1.0)]

    async def test_a_revision_may_be_named(self, world: World) -> None:
        route = await world.route("10,8,1", candidates=("x@abcd", "y"))
        assert [each.digest for each in route.adapters] == ["abcd-x", "t-y"]

    @pytest.mark.parametrize(("tenant", "name"), [("t", "theirs"), ("t", "nothing"), ("v", "x"), ("t", "base")])
    async def test_what_may_not_be_seen_does_not_exist(self, world: World, tenant: str, name: str) -> None:
        with pytest.raises(RouteError) as refused:
            await world.route("1,0,0", tenant=tenant, candidates=("shared", name))
        assert (refused.value.code, refused.value.param) == ("model_not_found", "lora.candidates.1")
        assert str(refused.value) == f"lora.candidates.1: {name!r} does not exist, no such adapter"


class TestStaleIndex:
    async def test_what_is_gone_makes_room_for_the_next(self, world: World) -> None:
        del world.names.owned["default"]["shared"]
        assert names(await world.route("10,8,5")) == ["x", "y", "z"]
        for name in "xy":
            del world.names.owned["t"][name]
        assert names(await world.route("10,8,5", top_k=2)) == ["z"]
        world.names.owned.clear()
        assert (await world.route("10,8,5")).outcome is Outcome.NO_CANDIDATES

    async def test_what_is_not_public_any_more_is_neither_used_nor_shown(self, world: World) -> None:
        world.names.owned["default"]["shared"] = False
        route = await world.route("10,8,1", explain=True)
        assert names(route) == ["x", "y"]
        assert route.scores is not None
        assert "shared" not in [each.name for each in route.scores]

    async def test_another_owners_adapter_of_the_name_is_not_meant(self, world: World) -> None:
        world.names.owned["t"]["shared"] = False  # just registered: it hides the public one, and is not indexed yet
        assert names(await world.route("10,8,1")) == ["x", "y"]


class TestCache:
    async def test_a_text_is_embedded_once(self, world: World) -> None:
        first = await world.route("10,8,1")
        again = await world.route("10,8,1")
        assert (first.cached, again.cached) == (False, True)
        assert chosen(first) == chosen(again)
        assert world.encoder.asked == [["10,8,1"]]
        assert not (await world.route("10,8,1", tenant="u")).cached
        assert not (await world.route("10,8,1", top_k=2)).cached
        assert not (await world.route("10,8,1", candidates=("x",))).cached
        assert (await world.route("10,8,1", composition="selection")).cached

    async def test_decisions_for_the_base_are_remembered(self, world: World) -> None:
        assert not (await world.route("0,-1,0")).cached
        route = await world.route("0,-1,0")
        assert (route.cached, route.outcome) == (True, Outcome.BELOW_MIN_SCORE)

    async def test_an_explanation_is_made_anew(self, world: World) -> None:
        first = await world.route("1,0,0")
        explained = await world.route("1,0,0", explain=True)
        assert explained.cached
        assert explained.scores is not None
        assert chosen(explained) == chosen(first)
        assert (await world.route("1,0,0")).scores is None

    async def test_a_new_adapter_is_used_by_the_next_request(self, world: World) -> None:
        assert names(await world.route("1,2,3", top_k=1)) == ["z"]
        world.names.owned["t"]["new"] = False
        world.index.put("t", "new", False, unit(1, 2, 3)[None])
        assert names(await world.route("1,2,3", top_k=1)) == ["new"]
        assert not (await world.route("1,2,3", top_k=2, tenant="u")).cached
        world.index.put("t", "newer", False, unit(3, 2, 1)[None])
        assert (await world.route("1,2,3", top_k=2, tenant="u")).cached, "others' private adapters change nothing"

    async def test_sticky_decisions_stay(self, world: World) -> None:
        before = await world.route("1,2,3", sticky=True, top_k=1)
        world.names.owned["t"]["new"] = False
        world.index.put("t", "new", False, unit(1, 2, 3)[None])
        again = await world.route("1,2,3", sticky=True, top_k=1)
        assert (again.cached, chosen(again)) == (True, chosen(before))
        del world.names.owned["t"]["z"]
        after = await world.route("1,2,3", sticky=True, top_k=1)
        assert (after.cached, names(after)) == (False, ["new"])
        assert (await world.route("1,2,3", sticky=True, top_k=1)).cached

    async def test_remembered_adapters_mean_what_they_mean_now(self, world: World) -> None:
        await world.route("0,0,1")
        world.names.owned = Names(t={"z": False}).owned
        del world.names.owned["t"]["z"]
        route = await world.route("0,0,1")
        assert (route.cached, route.adapters) == (False, ())

    async def test_it_is_bounded(self, world: World) -> None:
        world.router = world.make(cached_routes=2)
        for text in ("1,0,0", "0,1,0", "0,0,1"):
            await world.route(text)
        assert [(await world.route(text)).cached for text in ("0,0,1", "0,1,0", "1,0,0")] == [True, True, False]


class TestFailures:
    @pytest.mark.parametrize(("router", "param"), [(None, "model"), ("retriever", "lora.router")])
    async def test_a_missing_encoder(self, world: World, router: str | None, param: str) -> None:
        world.encoder.failure = "the encoder does not start"
        with pytest.raises(RouteError) as refused:
            await world.route("1,0,0", router=router)
        assert (refused.value.code, refused.value.param) == ("router_unavailable", param)
        assert str(refused.value) == f"{param}: router 'retriever' is not available: the encoder does not start"
        world.encoder.failure = None
        assert not (await world.route("1,0,0")).cached

    @pytest.mark.parametrize("vector", [np.ones((1, 4)), np.ones(3), np.full((1, 3), np.nan), np.ones((2, 3))])
    async def test_vectors_of_another_width(
        self, world: World, vector: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def embed(_texts: Sequence[str], *, tenant: str) -> np.ndarray:  # noqa: ARG001
            return vector

        monkeypatch.setattr(world.encoder, "embed", embed)
        with pytest.raises(RouteError, match="do not fit the adapters' prototypes") as refused:
            await world.route("1,0,0")
        assert refused.value.code == "router_unavailable"

    @pytest.mark.parametrize(
        "options",
        [
            {"top_k": 0},
            {"temperature": 0.0},
            {"temperature": float("nan")},
            {"temperature": float("inf")},
            {"min_score": float("nan")},
            {"score_mass": 0.0},
            {"score_mass": 1.1},
        ],
    )
    async def test_options_out_of_range(self, world: World, options: dict[str, Any]) -> None:
        with pytest.raises(RouteError) as refused:
            await world.route("1,0,0", **options)
        (field,) = options
        assert (refused.value.code, refused.value.param) == ("invalid_value", f"lora.{field}")
