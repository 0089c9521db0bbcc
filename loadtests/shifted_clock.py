"""A clock that jumps: `python -m loadtests.shifted_clock FILE MODULE ARGUMENT...` runs a module under it.

Only what Python's `time.time` tells is moved, by the seconds that FILE holds; monotonic clocks go on as they are, as
when somebody sets the time of a machine.
"""

import mmap
import runpy
import struct
import sys
import time
from pathlib import Path

_SECONDS = struct.Struct("<d")


class ShiftedClock:
    """The file from the other side."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.set(0.0)

    def set(self, seconds: float) -> None:
        """From now on the clock is so far ahead of the machine's, or behind it."""
        if not self.file.exists():
            self.file.write_bytes(_SECONDS.pack(seconds))
        with self.file.open("r+b") as file:  # in place: the other side has mapped it
            file.write(_SECONDS.pack(seconds))

    def command(self, module: str) -> tuple[str, ...]:
        """What runs `module` under this clock, without its arguments."""
        return (sys.executable, "-P", "-m", "loadtests.shifted_clock", str(self.file), module)


def main() -> None:
    file, module, *arguments = sys.argv[1:]
    with Path(file).open("rb") as opened:
        shared = mmap.mmap(opened.fileno(), _SECONDS.size, access=mmap.ACCESS_READ)
    real, real_ns = time.time, time.time_ns

    def shift() -> float:
        seconds: float = _SECONDS.unpack_from(shared)[0]
        return seconds

    time.time = lambda: real() + shift()
    time.time_ns = lambda: real_ns() + int(shift() * 1e9)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
