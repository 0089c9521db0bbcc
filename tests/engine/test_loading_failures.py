"""Requests that are aborted, refused or failed while their adapters are on the way: each ends once, and alone."""

import pytest

from adapters_store.types import Composition, Mix
from server.engine.config import RequestError
from tests.adapters_store.library import single
from tests.engine.manual_loading import PATHS, Loading
from tests.engine.test_loading import BOTH, FUSED


def test_a_fusion_that_overflows_is_the_requests_own_fault() -> None:
    loading = Loading()
    loading.add("huge", Mix((("00", 1e308), ("01", 1e308)), Composition.FUSION))
    loading.add("fine", FUSED)
    loading.finish()
    (output,) = loading.outputs["huge"]
    assert (output.error_param, output.error_code) == ("lora.adapters", "invalid_value")
    assert "too large" in (output.error or "")
    assert loading.ending("fine") == "length"


@pytest.mark.parametrize("phase", ["reading", "read", "writing", "written"])
def test_abort_in_every_phase(phase: str) -> None:
    loading = Loading()
    loading.add("gone", single("00"))
    if phase != "reading":
        loading.work()
    if phase in ("writing", "written"):
        loading.step()
    if phase == "written":
        loading.work()
    loading.engine.abort("gone")
    loading.engine.abort("gone")
    loading.step()
    assert loading.ending("gone") == "abort"
    assert not loading.engine.has_work
    loading.finish()
    assert len(loading.outputs["gone"]) == 1
    assert loading.pool.pages_by_state()["used"] == 0
    loading.add("gone", single("00"))
    loading.finish()
    assert loading.ending("gone") == "length"
    assert loading.disk.reads == {"00": 1}


@pytest.mark.parametrize("mix", [single("01"), BOTH, FUSED], ids=["single", "mixture", "fusion"])
def test_an_adapter_that_cannot_be_read_ends_only_its_own_request(mix: Mix) -> None:
    loading = Loading()
    loading.disk.broken.add("01")
    loading.add("broken", mix)
    loading.add("fine", single("00"))
    loading.add("also broken", mix)
    loading.finish()
    for name in ("broken", "also broken"):
        (output,) = loading.outputs[name]
        assert (output.error, output.error_param) == ("adapter 01 is damaged", "model")
        assert loading.ending(name) == "adapter_unavailable"
    assert loading.ending("fine") == "length"
    loading.disk.broken.clear()
    loading.add("repaired", mix)
    loading.finish()
    assert loading.ending("repaired") == "length"


@pytest.mark.parametrize("mix", [BOTH, FUSED], ids=["mixture", "fusion"])
def test_two_adapters_that_cannot_be_read_are_one_ending(mix: Mix) -> None:
    loading = Loading()
    loading.disk.broken |= {"00", "01"}
    loading.add("broken", mix)
    loading.work()
    loading.step()
    assert loading.ending("broken") == "adapter_unavailable"
    assert not loading.engine.has_work


def test_a_load_that_fails_ends_all_who_share_it() -> None:
    """Pages for adapter 01 are reserved by one mix and shared by another, and its file breaks before it is written."""
    loading = Loading(num_pages=3)
    loading.add("holds", single("02"), max_tokens=6)
    loading.until_running("holds")
    for name, mix in (("alone", single("01")), ("both", BOTH), ("other", single("00"))):
        loading.add(name, mix)
    loading.work()
    loading.step()
    loading.host.drop("01")
    loading.disk.broken.add("01")
    loading.finish()
    assert loading.ending("alone") == loading.ending("both") == "adapter_unavailable"
    assert loading.ending("other") == "length"


def test_an_unforeseen_failure_tells_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    loading = Loading()
    loading.adapters._reads._read = lambda _, path: (_ for _ in ()).throw(MemoryError(path))
    loading.add("r", single("00"))
    loading.finish()
    assert loading.outputs["r"][0].error == "adapter 00 could not be loaded"
    assert "MemoryError: folder/00" in caplog.text


@pytest.mark.parametrize("mix", [single("01"), BOTH, FUSED], ids=["single", "mixture", "fusion"])
def test_a_read_that_fails_when_the_pages_are_reserved(mix: Mix) -> None:
    """It was read once, dropped from host memory before its turn, and then its file broke."""
    loading = Loading(num_pages=3)
    loading.add("holds", single("02"), max_tokens=6)
    loading.until_running("holds")
    loading.add("waits", mix)
    loading.add("waits too", mix)
    loading.work()
    loading.step()
    assert loading.disk.reads["01"] == 1
    loading.host.drop("01")
    loading.disk.broken.add("01")
    loading.finish()
    assert loading.ending("holds") == "length"
    assert loading.ending("waits") == loading.ending("waits too") == "adapter_unavailable"
    assert loading.pool.pages_by_state()["used"] == 0
    assert "01" not in loading.pool.residents


def test_a_mix_too_large_is_refused_when_its_size_is_known() -> None:
    loading = Loading(num_pages=3)
    large = Mix((("02", 1.0), ("04", 1.0)))
    loading.add("large", large)
    loading.finish()
    assert loading.ending("large") == "mix_too_large"
    assert loading.outputs["large"][0].error_param == "lora.adapters"
    sentence = r"2 adapters .* more rank pages than the server has: 6 for qkv, of 3 that there are and 0 that pinned"
    with pytest.raises(RequestError, match=sentence) as refused:
        loading.add("again", large)
    assert refused.value.code == "mix_too_large"
    assert not loading.engine.has_work
    loading.add("each", single("04"))
    loading.finish()
    assert loading.ending("each") == "length"


def test_pins_that_leave_no_room_refuse_those_who_wait() -> None:
    loading = Loading(num_pages=6)
    loading.add("holds", single("04"), max_tokens=8)
    loading.until_running("holds")
    loading.add("waits", Mix((("00", 1.0), ("01", 1.0), ("02", 1.0))))
    loading.add("fits", single("03"))
    loading.work()
    loading.step()
    assert loading.ending("waits") is None
    loading.adapters.pin("04", PATHS["04"], lambda _: None)
    loading.finish()
    assert loading.ending("holds") == loading.ending("fits") == "length"
    assert loading.ending("waits") == "mix_too_large"
