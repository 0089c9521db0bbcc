"""The way of packed adapters to a GPU: through page-locked memory, beside the steps that are under way."""

import torch
from torch import Tensor


class Uploader:
    """Copies host tensors to one device. On a CPU it gives them back as they are.

    One page-locked buffer as large as the largest tensor so far: many adapters that come at once wait for each other's
    copies, a few milliseconds, instead of locking memory for all of them. The copies run on a stream of their own, so
    the host never waits for a step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def __call__(self, source: Tensor) -> Tensor:
        """`source` (contiguous) on the device, for work that is launched on the current stream from here on."""
        if self._stream is None:
            return source.to(self.device)
        if self._copied is not None:
            self._copied.synchronize()
        if len(self._buffer) < source.nbytes:
            self._buffer = torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=True)
        pinned = self._buffer[: source.nbytes].view(source.dtype).view(source.shape)
        pinned.copy_(source)
        with torch.cuda.stream(self._stream):
            copy = pinned.to(self.device, non_blocking=True)
            self._copied = self._stream.record_event()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._copied)
        copy.record_stream(current)
        return copy
