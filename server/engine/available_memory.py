"""How much memory there is before the kernel kills: the machine's, and that of the control groups around a process."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 60
"""Version 1 writes a number near 2**63 where there is no limit."""


@dataclass(frozen=True)
class MemoryReading:
    """Bytes that can still be taken, of the `total` of whatever limits first; and how much taking them hurts.

    `stalled`: percent of the last ten seconds in which something waited for memory (PSI), 0 where nobody counts it.
    """

    available: int
    total: int
    stalled: float = 0.0


class MemoryProbe:
    """Reads `/proc` and `/sys/fs/cgroup`, below `root`. What cannot be read does not limit."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._groups = list(_groups(root / "sys" / "fs" / "cgroup", self._proc / "self" / "cgroup"))

    def read(self) -> MemoryReading | None:
        """What it is now; None on a system that does not tell."""
        readings = [reading for reading in (self._machine(), *map(_group, self._groups)) if reading is not None]
        if not readings:
            return None
        tightest = min(readings, key=lambda reading: reading.available / max(1, reading.total))
        stalled = max((_stalled(folder / "memory.pressure") for folder in self._groups), default=0.0)
        return MemoryReading(
            tightest.available, tightest.total, max(stalled, _stalled(self._proc / "pressure" / "memory"))
        )

    def _machine(self) -> MemoryReading | None:
        lines = dict(line.split(":", 1) for line in _text(self._proc / "meminfo").splitlines() if ":" in line)
        if "MemAvailable" not in lines or "MemTotal" not in lines:
            return None
        available, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
        return MemoryReading(available, total)


def _groups(mount: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups, version 2 and 1, from its own up to the root's.

    In a container the group's own path does not exist below the mount, which is then the group itself.
    """
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = mount / controllers
        own = top / path.strip("/")
        while own != top and not own.is_dir():
            own = own.parent
        yield own
        while own != top:
            own = own.parent
            yield own


def _group(folder: Path) -> MemoryReading | None:
    """What a group may still take: what it holds of files that were read once can be dropped."""
    for most, used, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _text(folder / most).strip(), _text(folder / used).strip()
        if limit.isdecimal() and usage.isdecimal() and int(limit) < UNLIMITED:
            counts = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
            free = int(limit) - int(usage) + int(counts.get(idle, 0))
            return MemoryReading(max(0, free), int(limit))
    return None


def _stalled(file: Path) -> float:
    for line in _text(file).splitlines():
        if line.startswith("some "):
            return float(line.split()[1].removeprefix("avg10="))
    return 0.0


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
