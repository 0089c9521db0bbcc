"""The life of a request: one lease, one account, one root of the prefix cache."""

from contextlib import aclosing

import pytest
from fake_engine import REPLY
from fakes import Harness

from adapters_store.blobs import BlobUnavailable
from adapters_store.registry import RegistryUnavailable
from adapters_store.store import UnknownAdapter
from adapters_store.types import Composition, Mix
from routing.router import RouteQuery
from server.ask import Ask
from server.cache_key import cache_key
from server.engine.sequence import SamplingParams
from server.errors import NotFound, Unavailable
from server.openai.answer import collect
from server.tenants import DEFAULT_TENANT

PAIR = (("d1", 0.5), ("d2", 0.5))


def ask(model: str = "sql", **fields: object) -> Ask:
    return Ask(DEFAULT_TENANT, RouteQuery("default", model), SamplingParams(), **{"prompts": ("Hi",), **fields})  # type: ignore[arg-type]


def test_cache_keys_differ_in_everything_that_changes_the_kv() -> None:
    keys = {
        cache_key(fingerprint, mix, salt)
        for fingerprint in ("model", "model2")
        for mix in (
            Mix(),
            Mix(PAIR),
            Mix(PAIR, Composition.FUSION),
            Mix((("d1", 0.5), ("d2", 0.5000000000000001))),
            Mix((("d1d2", 0.5),)),
        )
        for salt in (b"", b"tenant")
    }
    assert len(keys) == 2 * 5 * 2
    assert cache_key("model", Mix(PAIR), b"") == cache_key("model", Mix.of([PAIR[1], PAIR[0]]), b"")


def test_parts_of_a_cache_key_do_not_run_together() -> None:
    assert cache_key("a", Mix((("b", 1.0),)), b"c") != cache_key("ab", Mix((("", 1.0),)), b"c")
    assert cache_key("model", Mix(), b"salt") != cache_key("modelsalt", Mix(), b"")


async def test_the_lease_lasts_as_long_as_the_pieces(harness: Harness) -> None:
    digest = harness.digests["sql"]
    generation = harness.services.generator.start(ask())
    assert harness.store.digest_leases(digest) == 0
    async with aclosing(generation.pieces()) as pieces:
        text = (await anext(pieces)).text
        assert harness.store.digest_leases(digest) == 1
        text += "".join([piece.text async for piece in pieces])
    assert text == REPLY
    assert harness.store.digest_leases(digest) == 0
    assert harness.endings() == {"stop": 1.0}


async def test_engines_elsewhere_are_told_digests_without_folders(harness: Harness) -> None:
    digest = harness.digests["sql"]
    for fetches in (True, False):
        harness.services.generator.fetches = fetches
        await collect(harness.services.generator.start(ask()).pieces())
    near, far = harness.engine.requests
    assert near.paths[digest].endswith(digest)
    assert far.paths == {digest: ""}


async def test_pieces_that_are_closed_unread_leave_nothing(harness: Harness) -> None:
    await harness.services.generator.start(ask()).pieces().aclose()
    assert not harness.engine.requests
    assert harness.endings() == {}


async def test_what_fails_before_the_engine_is_not_accounted(harness: Harness) -> None:
    with pytest.raises(NotFound):
        await anext(harness.services.generator.start(ask("nobody")).pieces())
    harness.engine.alive = False
    with pytest.raises(Unavailable):
        await anext(harness.services.generator.start(ask()).pieces())
    assert harness.endings() == {}


async def test_an_adapter_deleted_since_it_was_routed_to(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(*_: object, **__: object) -> None:
        raise UnknownAdapter("sql")

    monkeypatch.setattr(harness.store, "lease", gone)
    with pytest.raises(NotFound) as refused:
        await anext(harness.services.generator.start(ask()).pieces())
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("lease", BlobUnavailable("files cannot be stored or read now: the disk is full")),
        ("resolve", RegistryUnavailable("its database does not answer")),
    ],
)
async def test_without_the_stores_services(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, method: str, error: BlobUnavailable | RegistryUnavailable
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(harness.store, method, fail)
    with pytest.raises(Unavailable) as refused:
        await anext(harness.services.generator.start(ask()).pieces())
    assert (refused.value.code, refused.value.message) == (error.code, error.message)
    assert harness.endings() == {}


async def test_end_all_gives_every_stream_its_ending(harness: Harness) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 1
    generation = harness.services.generator.start(ask(n=3))
    async with aclosing(generation.pieces()) as pieces:
        await anext(pieces)
        harness.services.generator.end_all()
        with pytest.raises(Unavailable, match="shutting down"):
            await collect(pieces)
    assert sum(harness.endings().values()) == 3
    harness.check_all_given_back()


async def test_what_the_engine_is_told_of_a_request(harness: Harness) -> None:
    await collect(harness.services.generator.start(ask(priority=7, timeout=60.0)).pieces())
    (request,) = harness.engine.requests
    assert request.priority == 7
    assert request.timeout is not None
