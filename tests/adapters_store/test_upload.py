"""Packed adapters in their pages. What only a GPU can show is tested on one, in tests/gpu."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adapters_store.pages import pack
from adapters_store.types import GROUPS
from adapters_store.upload import Uploader, write_pages
from tests.adapters_store.library import CPU, HIDDEN, KEYS, LIBRARY, PACKED, SHAPE, adapter, make_pool


def test_pages_of_another_adapter_are_zero_where_unused() -> None:
    pool = make_pool(3)
    everywhere = {group.name: (0, 1, 2) for group in GROUPS}
    write_pages(pack(adapter("full", 48), SHAPE, torch.float64), everywhere, pool.tensors)
    assert all(part.all() for pair in pool.tensors.values() for part in pair)
    small = pack(adapter("n", 3, ("k_proj", "up_proj")), SHAPE, torch.float64)
    write_pages(small, {"qkv": (1,), "gate_up": (2,)}, pool.tensors)
    a, b = pool.tensors["qkv"]
    assert a[:, 1].count_nonzero() == a[:, 1, 16:19].count_nonzero() == 2 * 3 * HIDDEN
    assert b[:, 1].count_nonzero() == b[:, 1, :3, HIDDEN : HIDDEN + KEYS].count_nonzero() == 2 * 3 * KEYS
    assert a[:, [0, 2]].all(), "other pages are left alone"
    assert pool.tensors["o"][0].all()


def test_pages_are_written_in_their_order() -> None:
    pool = make_pool(4)
    weights = LIBRARY["04"]
    write_pages(pack(weights, SHAPE, torch.float64), {"qkv": (3, 0, 2)}, pool.tensors)
    a, _ = pool.tensors["qkv"]
    slices = a[1, [3, 0, 2], 16:32].flatten(0, 1)
    assert torch.equal(slices[:33], weights.pairs[1, "k_proj"].a)
    assert not slices[33:].any()
    assert a[:, 1].isnan().all()


class FakeEvent:
    """Over when the test says so. The host has no way to wait for it, as for a `FakeStream`."""

    is_over = False

    def query(self) -> bool:
        return self.is_over


class FakeStream:
    """Remembers what it waits for. Work on a CPU is done when it is launched."""

    def __init__(self, _: object = None) -> None:
        self.events: list[FakeEvent] = []
        self.awaited: list[FakeEvent] = []

    def record_event(self) -> FakeEvent:
        self.events.append(FakeEvent())
        return self.events[-1]

    def wait_event(self, event: FakeEvent) -> None:
        self.awaited.append(event)


class Copies(TorchDispatchMode):
    """Remembers of each copy where it comes from, and whether the host waits for it where devices differ."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            _, source, *non_blocking = args
            self.made.append((source.untyped_storage().data_ptr(), not any(non_blocking)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """The current stream, of a device on which all memory is the host's."""
    steps = FakeStream()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: steps)
    return steps


@pytest.mark.parametrize("digest", sorted(LIBRARY))
def test_the_host_waits_for_no_copy_and_for_nothing_that_was_launched_before(digest: str, steps: FakeStream) -> None:
    pool, packed = make_pool(5), PACKED[digest]
    uploader = Uploader(pool.tensors, CPU)
    pages = {name: tuple(range(len(group.pages))) for name, group in packed.groups.items()}
    given = {
        part.untyped_storage().data_ptr() for group in packed.groups.values() for page in group.pages for part in page
    }
    with Copies() as copies:
        upload = uploader.start(packed, pages)
    assert not any(event.is_over for event in steps.events)
    waits = [waits for source, waits in copies.made if source in given]
    assert len(waits) == 2 * sum(len(group.pages) for group in packed.groups.values())
    assert not any(waits)
    assert not upload.done()


@pytest.mark.parametrize("digest", sorted(LIBRARY))
def test_the_way_through_the_buffer_gives_the_same_pages(digest: str, steps: FakeStream) -> None:
    """And each stream waits for the other: copies for the steps before them, later steps for the copies."""
    pool, twin, packed = make_pool(5), make_pool(5), PACKED[digest]
    uploader = Uploader(pool.tensors, CPU)
    for buffers in uploader._buffers.values():
        for buffer in buffers:
            buffer.fill_(torch.nan)
    pages = {name: tuple(range(4, 4 - len(group.pages), -1)) for name, group in packed.groups.items()}
    upload = uploader.start(packed, pages)
    write_pages(packed, pages, twin.tensors)
    for name, parts in pool.tensors.items():
        for found, expected in zip(parts, twin.tensors[name], strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    copies = uploader._stream
    assert isinstance(copies, FakeStream)
    assert copies.awaited == steps.events
    assert len(steps.events) == 1
    assert not upload.done()
    assert not steps.awaited
    copies.events[-1].is_over = True
    assert upload.done()
    assert steps.awaited == copies.events
    assert upload.packed is packed
