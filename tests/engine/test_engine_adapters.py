"""Adapters that come without a request: pins, prefetches, reading ahead; and adapters that have to go."""

from typing import Any

import pytest

from adapters_store.types import Mix
from server.engine.config import RequestError
from tests.adapters_store.library import single
from tests.engine.manual_loading import BYTES, PATHS, Loading


class Wishing(Loading):
    """Remembers the answers by name."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.answers: dict[str, object] = {}

    def answer(self, name: str, value: object) -> None:
        assert name not in self.answers, "answered twice"
        self.answers[name] = value

    def pin(self, digest: str) -> None:
        self.answers.pop(digest, None)
        self.adapters.pin(digest, PATHS[digest], lambda value: self.answer(digest, value))

    def prefetch(self, digest: str) -> None:
        self.answers.pop(digest, None)
        self.adapters.prefetch(digest, PATHS[digest], lambda value: self.answer(digest, value))

    def is_pinned(self, digest: str) -> bool:
        return digest in self.pool._pins


def test_a_pin_is_accepted_once_its_size_is_known_and_loaded_when_pages_are_there() -> None:
    loading = Wishing(num_pages=6)
    loading.add("holds", Mix((("02", 1.0), ("04", 1.0))), max_tokens=6)
    loading.until_running("holds")
    loading.pin("01")
    assert not loading.answers
    loading.loader.run()
    loading.step()
    assert loading.answers == {"01": True}
    assert loading.residency["01"] == "host", "all pages are in use"
    loading.finish()
    assert loading.residency["01"] == "device"


def test_a_pinned_adapter_stays_whatever_comes() -> None:
    loading = Wishing(num_pages=6)
    loading.pin("01")
    loading.finish()
    for digest in ("02", "04", "00", "02"):
        loading.add(f"{digest} {len(loading.outputs)}", single(digest))
        loading.finish()
        assert loading.residency["01"] == "device"
    assert loading.disk.reads["01"] == 1
    loading.adapters.unpin("01")
    loading.add("both", Mix((("02", 1.0), ("04", 1.0))))
    loading.finish()
    assert loading.ending("both") == "length"
    assert loading.residency["01"] == "host"


def test_pins_take_half_of_the_pages_at_most() -> None:
    loading = Wishing(num_pages=6)
    for digest in ("00", "01", "03", "04"):
        loading.pin(digest)
    loading.finish()
    assert loading.answers == {"00": True, "01": True, "03": True, "04": False}
    loading.pin("01")
    assert loading.answers["01"] is True, "again, with nothing to read"
    loading.adapters.unpin("00")
    loading.adapters.unpin("01")
    loading.adapters.unpin("unknown")
    loading.adapters.unpin("03")
    loading.pin("04")
    loading.finish()
    assert loading.answers["04"] is True
    assert loading.residency["04"] == "device"


def test_a_pin_that_cannot_be_read_says_so() -> None:
    loading = Wishing()
    loading.disk.broken.add("00")
    loading.pin("00")
    loading.finish()
    error = loading.answers["00"]
    assert isinstance(error, RequestError)
    assert error.code == "adapter_unavailable"
    assert not loading.is_pinned("00")


def test_unpinned_before_it_was_read() -> None:
    loading = Wishing()
    loading.pin("00")
    loading.adapters.unpin("00")
    loading.finish()
    assert loading.answers == {"00": False}
    assert not loading.is_pinned("00")
    loading.pin("00")
    assert loading.answers == {"00": True}


def test_a_pin_whose_file_breaks_before_it_is_loaded_does_not_try_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    loading = Wishing(num_pages=3, host_bytes=1)
    loading.add("holds", single("02"), max_tokens=8)
    loading.until_running("holds")
    loading.pin("00")
    loading.loader.run()
    loading.step()
    assert loading.answers == {"00": True}
    loading.disk.broken.add("00")
    loading.finish()
    assert not loading.adapters.busy
    assert "pinned adapter 00 is not loaded: adapter 00 is damaged" in caplog.text


def test_prefetch_brings_it_as_near_as_it_can() -> None:
    loading = Wishing(num_pages=3)
    loading.prefetch("02")
    assert not loading.answers
    loading.finish()
    assert loading.answers == {"02": "device"}
    loading.prefetch("02")
    assert loading.answers == {"02": "device"}
    loading.prefetch("04")
    loading.finish()
    assert loading.answers["04"] == "device"
    assert loading.residency["02"] == "host", "the one that nobody uses makes room"
    loading.add("holds", single("04"), max_tokens=50)
    loading.step(2)
    loading.prefetch("02")
    loading.step()
    assert loading.answers["02"] == "host"
    loading.disk.broken.add("01")
    loading.prefetch("01")
    loading.finish()
    assert isinstance(loading.answers["01"], RequestError)


def test_reading_ahead_is_for_idle_time_and_for_room_that_is_left() -> None:
    loading = Wishing(host_bytes=3 * BYTES)
    loading.add("runs", max_tokens=4)
    loading.adapters.read_ahead(PATHS)
    loading.step(3)
    assert not loading.loader.tasks, "a request is there"
    while loading.adapters.busy:
        assert len(loading.loader.tasks) <= 1, "one at a time"
        if loading.loader.tasks:
            loading.loader.run()
        loading.step()
    assert len(loading.host) >= 3
    assert loading.host.counters.evictions == 0
    assert loading.pool.residents == ()


def test_what_cannot_be_read_ahead_is_left_to_whoever_asks_for_it() -> None:
    loading = Wishing()
    loading.disk.broken |= {"00", "01"}
    loading.adapters.read_ahead({digest: PATHS[digest] for digest in ("00", "01", "03")})
    loading.finish()
    assert loading.residency == {"03": "host"}
    loading.add("r", single("00"))
    loading.finish()
    assert loading.ending("r") == "adapter_unavailable"


def test_reading_now() -> None:
    loading = Wishing()
    loading.adapters.read_now("00", PATHS["00"])
    loading.adapters.read_now("00", PATHS["00"])
    loading.check()
    assert loading.residency == {"00": "host"}
    assert loading.adapters.take_read_seconds() == (0.0,)
    assert loading.adapters.take_read_seconds() == ()


def test_eviction_frees_host_memory_now_and_pages_when_nothing_uses_them() -> None:
    loading = Wishing()
    loading.add("runs", single("00"), max_tokens=6)
    loading.add("other", single("01"))
    loading.until_running("runs")
    loading.adapters.evict("00")
    loading.check()
    assert "00" not in loading.host
    assert loading.residency["00"] == "device"
    loading.finish()
    assert loading.ending("runs") == "length"
    assert loading.residency == {"00": "disk", "01": "device"}
    loading.adapters.evict("01")
    loading.check()
    assert loading.residency["01"] == "disk"
    assert loading.pool.pages_by_state() == {"free": 36, "used": 0, "cached": 0}


def test_eviction_ends_what_was_to_be_read() -> None:
    loading = Wishing()
    loading.adapters.read_ahead({"01": PATHS["01"]})
    loading.prefetch("02")
    for digest in ("01", "02"):
        loading.adapters.evict(digest)
    loading.finish()
    assert loading.residency == {}
    assert loading.answers == {"02": "disk"}


@pytest.mark.parametrize("phase", ["being read", "being loaded", "loaded"])
def test_an_eviction_that_comes_late_leaves_a_new_pin_alone(phase: str) -> None:
    """The adapter was deleted and unpinned, and the same weights were registered and pinned again."""
    loading = Wishing()
    loading.adapters.pin("00", PATHS["00"], lambda _: None)
    loading.finish()
    loading.adapters.unpin("00")
    loading.adapters.evict("00")
    loading.check()
    assert loading.residency["00"] == "disk"
    loading.adapters._reads.ranks.clear()
    loading.pin("00")
    if phase != "being read":
        loading.work()
        loading.step()
    if phase == "loaded":
        loading.finish()
    loading.adapters.evict("00")
    loading.finish()
    assert loading.answers == {"00": True}
    assert loading.is_pinned("00")
    assert loading.residency["00"] == "device"
    loading.adapters.unpin("00")
    loading.adapters.evict("00")
    loading.check()
    assert loading.residency["00"] == "disk"


def test_residency_is_told_once_a_change() -> None:
    loading = Wishing()
    adapters = loading.adapters
    loading.add("r", single("00"))
    loading.loader.run()
    loading.engine.step()
    assert adapters.take_residency() == {"00": "host"}
    assert adapters.take_residency() == {}
    loading.loader.run()
    loading.engine.step()
    assert adapters.take_residency() == {"00": "device"}
    adapters.evict("00")
    while loading.engine.has_work:
        loading.engine.step()
    adapters.read_now("00", PATHS["00"])
    assert adapters.take_residency() == {"00": "host"}
    adapters.evict("00")
    adapters.read_now("00", PATHS["00"])
    assert adapters.take_residency() == {}, "it is where it was"
