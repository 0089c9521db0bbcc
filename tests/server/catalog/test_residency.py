"""What a tenant is told of where an adapter is."""

from hypothesis import given
from hypothesis import strategies as st

from server.catalog.residency import Residency

DIGEST = "d" * 64


class Ticks:
    """Every reading is later than the one before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def told(residency: Residency, tenant: str, *, in_use: bool = False) -> str:
    return residency.told(DIGEST, tenant, "owner", "name", in_use=in_use)


def test_only_who_used_it_since_then_is_told() -> None:
    residency = Residency(Ticks())
    residency.used("early", "owner", "name")
    residency.moved(DIGEST, "host")
    residency.used("host", "owner", "name")
    residency.moved(DIGEST, "device")
    residency.used("user", "owner", "name")
    residency.used("other name", "owner", "another")
    assert residency.of(DIGEST) == "device"
    assert [told(residency, tenant) for tenant in ("early", "host", "user", "other name", "stranger")] == [
        "disk",
        "host",
        "device",
        "disk",
        "disk",
    ]
    residency.moved(DIGEST, "host")
    assert (residency.of(DIGEST), told(residency, "user"), told(residency, "host")) == ("host", "host", "host")
    residency.moved(DIGEST, "device")
    assert told(residency, "user") == "host"
    residency.moved(DIGEST, "disk")
    assert (residency.of(DIGEST), told(residency, "user")) == ("disk", "disk")
    residency.moved(DIGEST, "device")
    assert told(residency, "user") == "disk"
    assert told(residency, "user", in_use=True) == "device"


def test_news_of_the_same_tier_mean_that_it_was_elsewhere() -> None:
    for tier in ("host", "device"):
        residency = Residency(Ticks())
        residency.moved(DIGEST, tier)
        residency.used("user", "owner", "name")
        residency.moved(DIGEST, tier)
        assert told(residency, "user") == "disk"


def test_uses_are_bounded() -> None:
    residency = Residency(Ticks(), max_uses=2)
    residency.moved(DIGEST, "device")
    for tenant in "abca":
        residency.used(tenant, "owner", "name")
    assert [told(residency, tenant) for tenant in "abc"] == ["device", "disk", "device"]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("moved"), st.sampled_from(["device", "host", "disk"])),
            st.tuples(st.just("used"), st.sampled_from(["a", "b"])),
        ),
        max_size=20,
    )
)
def test_what_one_tenant_is_told_does_not_depend_on_another(events: list[tuple[str, str]]) -> None:
    """With b's uses or without them, a is told the same."""

    def run(hidden: str) -> str:
        residency = Residency(Ticks())
        for kind, value in events:
            if kind == "moved":
                residency.moved(DIGEST, value)
            elif value != hidden:
                residency.used(value, "owner", "name")
        if ("used", "a") not in events:
            assert told(residency, "a") == "disk"
        return told(residency, "a")

    assert run("") == run("b")
