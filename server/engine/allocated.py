"""How much memory this process has taken from the C library."""

import ctypes
from collections.abc import Callable


class _Mallinfo2(ctypes.Structure):
    """Ten numbers; number 4 is `hblkhd`, mapped one by one, and number 7 `uordblks`, in heaps."""

    _fields_ = (("numbers", ctypes.c_size_t * 10),)


def allocated_bytes() -> int:
    """What all threads have taken from `malloc` and not given back; 0 where the C library does not tell.

    glibc tells since 2.33, see mallinfo2(3). Unlike the resident memory it does not count what was given back and is
    kept for the next one.
    """
    ask: Callable[[], _Mallinfo2] | None = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = _Mallinfo2  # type: ignore[attr-defined]
    numbers = ask().numbers
    return int(numbers[4] + numbers[7])
