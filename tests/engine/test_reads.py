"""Reads from disk: one for all who wait, none for nobody, and tenants take turns."""

import pytest

from adapters_store.types import Mix
from server.engine import reads as reads_module
from server.engine.config import RequestError
from server.engine.reads import Reads, page_check
from tests.adapters_store.library import LIBRARY, PACKED, single
from tests.engine.manual_loading import BYTES, PATHS, Loading


def test_what_nobody_waits_for_any_more_is_not_read() -> None:
    loading = Loading()
    for digest in LIBRARY:
        loading.add(digest, single(digest), tenant="flood")
    loading.add("both", Mix((("00", 1.0), ("01", 1.0))), tenant="flood")
    for digest in LIBRARY:
        loading.engine.abort(digest)
    loading.add("mine", single("04"), tenant="other")
    loading.step()
    loading.finish()
    assert loading.disk.reads == {"00": 1, "01": 1, "04": 1}
    assert loading.ending("both") == loading.ending("mine") == "length"


def test_tasks_do_not_pile_up_behind_a_disk_that_hangs() -> None:
    loading = Loading()
    for number in range(50):
        loading.add(str(number), single("00"))
        loading.engine.abort(str(number))
        loading.step()
    assert len(loading.loader.tasks) == 1


def test_what_is_asked_for_again_after_its_task_found_nothing_is_read() -> None:
    loading = Loading()
    loading.add("gone", single("00"))
    loading.engine.abort("gone")
    loading.work()
    loading.add("new", single("01"))  # the task has run, and is not reported yet
    loading.finish()
    assert loading.ending("new") == "length"
    assert loading.disk.reads == {"01": 1}


def test_a_read_that_has_begun_goes_on_without_those_who_left() -> None:
    loading = Loading()
    loading.add("gone", single("00"))
    loading.work()
    loading.engine.abort("gone")
    loading.step()
    assert "00" in loading.host


def test_a_read_that_panics_ends_its_own_request_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    loading = Loading()
    loading.disk.panics.add("00")
    for name, digest in (("first", "00"), ("other", "01")):
        loading.add(name, single(digest))
    loading.finish()
    (output,) = loading.outputs["first"]
    assert (output.error, output.error_code) == ("adapter 00 could not be loaded", "adapter_unavailable")
    assert loading.ending("other") == "length"
    assert "Panic: at adapter 00" in caplog.text
    loading.disk.panics.clear()
    loading.add("again", single("00"))
    loading.finish()
    assert loading.ending("again") == "length"


def test_a_flood_of_reads_delays_nobody_else_by_more_than_one() -> None:
    loading = Loading()
    for digest in sorted(LIBRARY)[:9]:
        loading.add(digest, single(digest), tenant="flood")
    loading.add("mine", single("11"), tenant="modest")
    loading.loader.run()
    loading.loader.run()
    assert loading.disk.packed == ["00", "11"]
    loading.finish()


def test_reads_for_pages_that_are_held_come_first() -> None:
    """An adapter that has left host memory when its pages are reserved is read before others of its tenant."""
    loading = Loading(num_pages=3)
    loading.add("holds", single("02"), max_tokens=3)
    loading.until_running("holds")
    loading.add("waits", single("04"))
    loading.work()
    loading.step()
    loading.host.drop("04")
    for digest in ("00", "01", "03"):
        loading.add(digest, single(digest))
    while not loading.ending("holds"):
        loading.step()
    loading.step()
    loading.disk.packed.clear()
    loading.loader.run()
    assert loading.disk.packed == ["04"]
    loading.finish()


def test_when_one_adapter_of_a_mix_cannot_be_read_the_others_are_not_begun() -> None:
    loading = Loading()
    loading.disk.broken.add("00")
    loading.add("r", Mix((("00", 1.0), ("01", 1.0))))
    loading.loader.run()
    loading.step()
    loading.finish()
    assert loading.ending("r") == "adapter_unavailable"
    assert loading.disk.reads == {"00": 1}


def test_a_thread_that_fails_before_it_reads_is_an_answer() -> None:
    loading = Loading()
    loading.add("r", single("00"))
    loading.add("s", single("01"))
    _, done = loading.loader.tasks.pop(0)
    loading.loader.finished.append((RuntimeError("no device"), done))
    loading.step()
    loading.finish()
    assert loading.ending("r") == "adapter_unavailable"
    assert loading.ending("s") == "length"


def test_an_adapter_that_no_pool_page_count_can_hold_is_refused_before_it_is_packed() -> None:
    loading = Loading(num_pages=2)
    for name in ("large", "also large"):
        loading.add(name, Mix((("02", 1.0), ("01", 1.0))))
    loading.finish()
    assert loading.ending("large") == loading.ending("also large") == "mix_too_large"
    assert "02" not in loading.disk.packed
    assert loading.outputs["large"][0].error == ("the adapter needs 3 rank pages for qkv, more than the server's 2")
    with pytest.raises(
        RequestError, match="1 adapter of this request needs more rank pages than the server has: 3 for"
    ):
        loading.add("again", single("02"))
    assert loading.disk.reads["02"] == 1
    answers: list[object] = []
    loading.adapters.pin("02", PATHS["02"], answers.append)
    loading.finish()
    assert answers == [False]


def test_a_mix_is_refused_as_soon_as_what_is_known_of_it_is_too_large() -> None:
    loading = Loading(num_pages=4)
    for digest in ("02", "04"):
        loading.add(digest, single(digest))
        loading.finish()
    with pytest.raises(RequestError, match=r"3 adapters .* at least 6 for qkv, of 4 that there are"):
        loading.add("large", Mix((("02", 1.0), ("04", 1.0), ("11", 1.0))))
    assert "11" not in loading.disk.reads


def test_pins_are_named_in_the_refusal() -> None:
    loading = Loading(num_pages=4)
    loading.adapters.pin("00", PATHS["00"], lambda _: None)
    loading.adapters.pin("01", PATHS["01"], lambda _: None)
    loading.finish()
    loading.add("large", single("02"))
    loading.finish()
    error = loading.outputs["large"][0].error or ""
    assert "3 for qkv, of 4 that there are and 2 that pinned adapters take" in error


def test_the_check_names_group_and_numbers() -> None:
    check = page_check({"qkv": 2, "o": 2, "gate_up": 2, "down": 1})
    check({"qkv": 32, "down": 16})
    with pytest.raises(RequestError, match="needs 2 rank pages for down, more than the server's 1"):
        check({"qkv": 32, "down": 17})


def test_ranks_that_nobody_needs_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads_module, "REMEMBERED", 4)
    loading = Loading(num_pages=3, host_bytes=2 * BYTES)
    ranks = loading.adapters._reads.ranks
    loading.adapters._reads._most_ranks = 4
    loading.add("runs", single("02"), max_tokens=200)
    loading.until_running("runs")
    loading.adapters.pin("03", PATHS["03"], lambda _: None)
    loading.work()
    loading.step()
    for number in range(400):
        digest = f"other {number}"
        ranks[digest] = {"qkv": 16}
        loading.step()
    assert len(ranks) <= 4 + 4 + len(loading.host) + 3
    assert {"02", "03"} <= ranks.keys()
    assert "other 399" in ranks
    loading.finish()
    assert loading.ending("runs") == "length"


def test_reads_alone_bound_what_they_remember() -> None:
    loading = Loading()
    reads: Reads = loading.adapters._reads
    reads.ranks.update({str(number): PACKED["00"].group_ranks for number in range(reads_module.REMEMBERED + 1)})
    reads.forget_ranks(lambda: {"0", "1"})
    assert {"0", "1"} <= reads.ranks.keys()
    assert len(reads.ranks) <= reads_module.REMEMBERED // 2 + 2
    reads.forget_ranks(lambda: pytest.fail("not due"))
