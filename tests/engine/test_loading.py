"""Requests that wait for their adapters, step by step: the loader works when told, and every step checks its pages."""

import pytest

from adapters_store.types import Composition, Mix
from server.engine.starvation import STARVATION_STEPS
from tests.adapters_store.library import PACKED, single
from tests.engine.manual_loading import BYTES, Loading

BOTH = Mix((("00", 1.0), ("01", 0.5)))
FUSED = Mix.of([("00", 1.0), ("01", 3.0)], Composition.FUSION)


def test_adding_a_request_reads_nothing_and_waits_for_nothing() -> None:
    loading = Loading()
    loading.add("r", single("00"))
    assert not loading.disk.reads
    assert loading.engine.has_work
    loading.step(3)
    assert not loading.outputs["r"]
    stats = loading.engine.stats()
    assert (stats.waiting, stats.running, stats.waiting_adapters) == (1, 0, ("00",))
    assert stats.adapter_reads == ()


def test_a_cold_request_is_read_then_written_then_run() -> None:
    loading = Loading()
    loading.add("r", single("00"))
    loading.work()
    loading.step()
    assert loading.residency == {"00": "host"}
    assert (len(loading.loader.tasks), loading.loader.urgent) == (1, 1), "pages are reserved, and being written"
    assert loading.pool.pages_by_state()["used"] == 4
    loading.step(5)
    assert not loading.outputs["r"]
    loading.work()
    loading.step()
    assert loading.residency == {"00": "device"}
    assert loading.outputs["r"][0].tokens, "the pages are used in the very step that finds them written"
    loading.finish()
    assert loading.ending("r") == "length"
    assert loading.engine.stats().adapter_reads == (0.0,)


def test_a_resident_adapter_needs_no_loader() -> None:
    loading = Loading()
    loading.add("first", BOTH)
    loading.finish()
    loading.add("second", single("01"))
    loading.step(3)
    assert loading.ending("second") == "length"
    assert not loading.adapters.busy


def test_what_left_host_memory_but_not_the_device_is_not_read_again() -> None:
    loading = Loading(host_bytes=BYTES)
    for name, mix in (("a", single("02")), ("b", single("04")), ("c", FUSED)):
        loading.add(name, mix)
        loading.finish()
    assert "02" not in loading.host
    reads = loading.disk.reads.total()
    loading.add("again", single("02"))
    loading.step(3)
    assert loading.ending("again") == "length"
    loading.host.drop("00")
    loading.add("fusion", FUSED)
    loading.step(3)
    assert loading.ending("fusion") == "length"
    assert loading.disk.reads.total() == reads


@pytest.mark.parametrize("lookahead", [False, True])
def test_others_run_while_one_waits_for_a_disk_that_hangs(lookahead: bool) -> None:
    """Neither rows that run nor requests that come later are delayed by a step."""
    loading = Loading(lookahead=lookahead)
    loading.add("warm", single("01"))
    loading.finish()
    loading.add("stuck", single("00"))
    for number in range(3 * STARVATION_STEPS):
        loading.add(str(number), single("01") if number % 2 else Mix())
        loading.step(2 + lookahead)
        assert loading.ending(str(number)) == "length"
    assert not loading.outputs["stuck"]
    loading.finish()
    assert loading.ending("stuck") == "length"


def test_a_load_under_way_does_not_make_others_starve() -> None:
    """Steps during which pages are being written are not skipped steps: nobody else is kept from being admitted."""
    loading = Loading()
    loading.add("loads", single("00"))
    loading.work()
    loading.step(2 * STARVATION_STEPS)
    (sequence,) = loading.engine.scheduler.waiting
    assert sequence.skipped_steps == 0
    loading.add("other")
    loading.step(2)
    assert loading.ending("other") == "length"


def test_many_loads_under_way_keep_nobody_from_being_tried() -> None:
    """More mixes than the scheduler would try in vain are on their way, and one behind them is resident."""
    loading = Loading(num_pages=400, max_num_seqs=5)
    loading.add("warm", single("03"))
    loading.finish()
    for number in range(80):
        loading.add(f"cold {number}", Mix((("00", 1.0), ("01", 1.0 + number))))
    loading.work()
    loading.step()
    loading.add("hot", single("03"))
    loading.step(3)
    assert loading.ending("hot") == "length"
    assert loading.ending("cold 0") is None


def test_one_read_and_one_copy_for_all_who_wait() -> None:
    loading = Loading()
    for number in range(6):
        loading.add(str(number), single("00"))
    loading.add("both", BOTH)
    assert len(loading.loader.tasks) == 2
    loading.finish()
    assert loading.disk.reads == {"00": 1, "01": 1}
    assert loading.engine.stats().adapter_loads == 2
    assert all(loading.ending(name) == "length" for name in loading.outputs)


def test_a_fusion_is_made_from_what_was_read() -> None:
    loading = Loading()
    loading.add("r", FUSED)
    loading.finish()
    assert loading.ending("r") == "length"
    assert loading.pool.residents == (FUSED.digest,)
    assert loading.residency == {"00": "host", "01": "host"}
    loading.add("both", BOTH)
    loading.finish()
    assert loading.residency == {"00": "device", "01": "device"}
    assert loading.disk.reads == {"00": 1, "01": 1}


def test_waiting_requests_keep_their_adapters_in_host_memory() -> None:
    """Host memory for two: the third is read again when its turn comes, and those before it only once."""
    loading = Loading(num_pages=3, host_bytes=PACKED["02"].num_bytes + PACKED["04"].num_bytes)
    for digest in ("02", "04", "11"):
        loading.add(digest, single(digest))
    loading.finish()
    assert all(loading.ending(digest) == "length" for digest in ("02", "04", "11"))
    assert loading.disk.reads == {"02": 1, "04": 1, "11": 2}


def test_an_adapter_larger_than_host_memory_is_served_from_disk() -> None:
    loading = Loading(host_bytes=1)
    loading.add("r", single("02"))
    loading.finish()
    assert loading.ending("r") == "length"
    assert len(loading.host) == 0
    assert loading.disk.reads["02"] == 2


def test_free_pages_are_used_before_it_is_the_requests_turn() -> None:
    loading = Loading(max_num_seqs=1)
    loading.add("runs", max_tokens=20)
    loading.step()
    loading.add("waits", single("00"))
    loading.work()
    loading.step()
    loading.work()
    loading.step()
    assert loading.residency == {"00": "device"}
    assert loading.ending("runs") is None


def test_a_starving_mix_gets_its_pages() -> None:
    """A stream of requests for resident adapters keeps all pages in use; the large mix comes all the same."""
    loading = Loading(num_pages=3, max_num_seqs=3)
    loading.add("warm", single("00"))
    loading.finish()
    loading.add("large", single("02"))
    for number in range(4 * STARVATION_STEPS):
        loading.add(str(number), single("00"), max_tokens=4)
        loading.work()
        loading.step()
        if loading.ending("large"):
            break
    assert loading.ending("large") == "length"
    loading.finish()
    assert all(loading.ending(name) == "length" for name in loading.outputs)
