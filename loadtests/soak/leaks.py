"""What a process holds, at rest before and behind the traffic and every two seconds meanwhile: does it grow?"""

import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

MOST = {"memory": 64 * 2**20, "descriptors": 24, "threads": 16}
"""Growth over the whole run that is no leak: caches, pools of connections and threads that were not full before."""
SHORTEST = 120.0
"""Seconds: the slope of less than that says nothing. Connections that come and go looked like twelve more a minute."""


@dataclass(frozen=True)
class Sample:
    """`memory` is resident, in bytes. `seconds`: when."""

    seconds: float
    memory: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> "Sample":
        """Of a process. Raises OSError when it is gone."""
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        memory, threads = (re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE) for name in ("VmRSS", "Threads"))
        if memory is None or threads is None:  # nobody has asked yet how it ended
            raise ProcessLookupError(f"process {pid} has ended")
        opened = len(os.listdir(f"/proc/{pid}/fd"))
        return cls(time.monotonic(), int(memory[1]) * 1024, opened, int(threads[1]))


def left(before: Sample, after: Sample) -> list[str]:
    """Sentences about what a process at rest has more of than it may, after it was at rest before."""
    more = {name: getattr(after, name) - getattr(before, name) for name in MOST}
    return [f"at rest the front end has {more[name]} more {name}" for name in MOST if more[name] > MOST[name]]


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points (Theil and Sen): a peak or two do not move it."""
    pairs = combinations(zip(times, values, strict=True), 2)
    return statistics.median([(b - a) / (t - s) for (s, a), (t, b) in pairs if t > s] or [0.0])


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """By how much each grows: its slope after the first quarter, in which caches fill, times the whole time.

    Nothing is said of a time that is too short.
    """
    late = samples[len(samples) // 4 :]
    if not late or late[-1].seconds - late[0].seconds < SHORTEST:
        return {}
    times = [sample.seconds for sample in late]
    whole = samples[-1].seconds - samples[0].seconds
    return {name: whole * slope(times, [getattr(sample, name) for sample in late]) for name in MOST}


def grown(samples: Sequence[Sample]) -> list[str]:
    """Sentences about what grows more than it may."""
    found = growth(samples).items()
    return [
        f"the front end's {name} grew by {more:.0f}, more than {MOST[name]}"
        for name, more in found
        if more > MOST[name]
    ]
