"""Packed adapters on their way into the device's pages."""

from collections.abc import Mapping
from itertools import zip_longest

import torch
from torch import Tensor

from adapters_store.pages import PackedAdapter
from adapters_store.types import PAGE_RANK

PageTensors = Mapping[str, tuple[Tensor, Tensor]]
"""`PagePool.tensors`."""

PageIds = Mapping[str, tuple[int, ...]]


def write_pages(packed: PackedAdapter, pages: PageIds, tensors: PageTensors) -> None:
    """Copy an adapter into its pages, by the calling thread; all on one device. Unused rank rows become zero."""
    for name, group in packed.groups.items():
        for page, parts in zip(pages[name], group.pages, strict=True):
            _write_page(tensors[name], page, parts)


def _write_page(tensors: tuple[Tensor, Tensor], page: int, parts: tuple[Tensor, Tensor]) -> None:
    (pool_a, pool_b), (a, b) = tensors, parts
    rows = b.shape[1]
    slices = pool_a.unflatten(2, (-1, PAGE_RANK))[:, page]
    slices[:, :, :rows].copy_(a)
    pool_b[:, page, :rows].copy_(b)
    if rows < PAGE_RANK:
        slices[:, :, rows:].zero_()
        pool_b[:, page, rows:].zero_()


class Upload:
    """One adapter's copies to a GPU, under way. `done` asks the device and does not wait for it."""

    def __init__(self, packed: PackedAdapter, reader: torch.cuda.Stream, finished: torch.cuda.Event) -> None:
        self.packed = packed
        self._reader = reader
        self._finished = finished

    def done(self) -> bool:
        """Whether the pages are written; then all that is launched on the steps' stream from here on may read them."""
        if not self._finished.query():
            return False
        self._reader.wait_event(self._finished)  # free, as the event is over; it orders what comes next behind it
        return True


class Uploader:
    """Copies packed adapters from page-locked memory into a GPU's pages, on a stream of its own.

    Neither the host nor the steps wait. The pages may have belonged to an evicted adapter that launched steps still
    read: the copies go into a buffer first, one page of each group at a time, and from there into the pages behind all
    that was launched before. The buffer is used on this stream alone, in its order, so that it needs no other guard.
    """

    def __init__(self, tensors: PageTensors, device: torch.device) -> None:
        self.device = device
        self._tensors = tensors
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            self._buffers = {
                name: (a.new_empty(a[:, 0].numel()), b.new_empty(b[:, 0].numel())) for name, (a, b) in tensors.items()
            }

    def start(self, packed: PackedAdapter, pages: PageIds) -> Upload:
        """Launch the copies into `pages`, which nothing that is launched from here on uses until they are done."""
        steps = torch.cuda.current_stream(self.device)
        launched = steps.record_event()
        with torch.cuda.stream(self._stream):
            for number, parts in enumerate(zip_longest(*(group.pages for group in packed.groups.values()))):
                staged = {
                    name: (_send(part[0], self._buffers[name][0]), _send(part[1], self._buffers[name][1]))
                    for name, part in zip(packed.groups, parts, strict=True)
                    if part is not None
                }
                if not number:
                    self._stream.wait_event(launched)
                for name, part in staged.items():
                    _write_page(self._tensors[name], pages[name][number], part)
            return Upload(packed, steps, self._stream.record_event())


def _send(source: Tensor, buffer: Tensor) -> Tensor:
    """`source` in the front of `buffer`, once the current stream gets there."""
    return buffer[: source.numel()].view(source.shape).copy_(source, non_blocking=True)
