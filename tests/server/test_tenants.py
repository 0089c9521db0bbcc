"""Keys and whose they are."""

import pytest

from server.tenants import DEFAULT_TENANT, Caller, Keys


def test_without_keys_everybody_is_the_admin() -> None:
    keys = Keys()
    assert not keys.required
    assert keys.caller(None) == keys.caller("anything") == Caller(DEFAULT_TENANT, admin=True)
    assert keys.may_read_metrics(None)


@pytest.mark.parametrize(
    ("key", "caller"),
    [
        ("one", Caller(DEFAULT_TENANT)),
        ("two", Caller(DEFAULT_TENANT)),
        ("boss", Caller(DEFAULT_TENANT, admin=True)),
        ("meter", None),
        ("on", None),
        ("onee", None),
        ("", None),
        ("öne\ud800", None),
        (None, None),
    ],
)
def test_callers(key: str | None, caller: Caller | None) -> None:
    assert Keys(["one", "two"], "boss", "meter").caller(key) == caller


def test_metrics_keys() -> None:
    keys = Keys(["one"], "boss", "meter")
    assert [keys.may_read_metrics(key) for key in ("boss", "meter", "one", "", None)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert not Keys(metrics_key="meter").may_read_metrics(None)
