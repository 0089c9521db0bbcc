"""Caches shrink while memory is short, and grow again when it is not; for real below a limit of the kernel's."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapters_store.pages import PackedAdapter, PackedGroup
from adapters_store.tiers import HostTier
from server.engine.available_memory import MemoryReading
from server.engine.memory_watch import CALM_SECONDS, LOOK_SECONDS, MemoryWatch

TOTAL = 1000
LOW, HIGH = 50, 100


def sized(digest: str, size: int = 100) -> PackedAdapter:
    page = torch.zeros(1, 1, 1, size, dtype=torch.int8), torch.empty(1, 1, 0, dtype=torch.int8)
    return PackedAdapter(digest, {"o": PackedGroup((page,), 1.0)})


class World:
    """A tier of three adapters, and a machine that says what a test wants."""

    def __init__(self) -> None:
        self.now = 0.0
        self.available = 500
        self.stalled = 0.0
        self.keep: set[str] = set()
        self.tier = HostTier(300)
        for digest in "abc":
            self.tier.insert(sized(digest))
        self.watch = MemoryWatch(self.tier, self.keep, None, self._read, lambda: self.now)

    def look(self, available: int, after: float = LOOK_SECONDS) -> tuple[int, int]:
        """(bytes, budget) after a look."""
        self.now += after
        self.available = available
        self.watch.look()
        self.tier.check_integrity()
        return self.tier.num_bytes, self.tier.budget_bytes

    def _read(self) -> MemoryReading | None:
        return MemoryReading(self.available, TOTAL, self.stalled)


def test_it_shrinks_below_low_until_high_is_free(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    assert world.look(LOW) == (300, 300)
    with caplog.at_level(logging.WARNING):
        assert world.look(LOW - 1) == (200, 249)
    assert "memory is short: 49 of 1000 bytes are left; 100 bytes of caches were dropped" in caplog.text
    assert "a" not in world.tier, "the least recently used goes first"
    assert world.tier.counters.shrinks == 1
    assert world.look(LOW) == (200, 249), "between low and high nothing moves"


def test_what_requests_wait_for_stays(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.keep.update("ac")
    assert world.look(0, after=0.0) == (200, 200)
    assert "b" not in world.tier
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert world.look(0) == (200, 200)
    assert not caplog.records, "where nothing can be given there is nothing to say"


def test_it_grows_again_when_it_was_calm_for_a_while() -> None:
    world = World()
    assert world.look(10) == (200, 210)
    assert world.look(HIGH + 40) == (200, 210), "not at once"
    assert world.look(HIGH + 40, after=CALM_SECONDS) == (200, 230)
    assert world.look(HIGH + 40) == (200, 250)
    assert world.look(HIGH) == (200, 250)
    assert world.look(900) == (200, 300)
    assert world.look(900) == (200, 300), "never beyond what was asked for"


def test_who_stands_still_for_memory_shrinks_earlier() -> None:
    world = World()
    world.stalled = 50.0
    assert world.look(HIGH) == (300, 300)
    assert world.look(HIGH - 10) == (200, 290)


def test_it_looks_once_a_second() -> None:
    world = World()
    world.look(500)
    assert world.look(0, after=LOOK_SECONDS / 2) == (300, 300)
    assert world.look(0, after=LOOK_SECONDS / 2) == (200, 200)


FILLS = """
import torch
from adapters_store.pages import PackedAdapter, PackedGroup
from adapters_store.tiers import HostTier
from server.engine.available_memory import MemoryProbe
from server.engine.memory_watch import MemoryWatch

tier, seconds = HostTier(1 << 34), iter(range(10**9))
watch = MemoryWatch(tier, (), None, MemoryProbe().read, lambda: float(next(seconds)))
for number in range(400):
    watch.look()
    page = torch.ones(1, 1, 1, 4 << 20, dtype=torch.int8), torch.empty(1, 1, 0, dtype=torch.int8)
    tier.insert(PackedAdapter(str(number), {"o": PackedGroup((page,), 1.0)}))
print(tier.counters.shrinks, tier.num_bytes)
"""
LIMIT = 1 << 30


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group of a gigabyte."""
    folder = Path("/sys/fs/cgroup/memory")
    limit = "memory.limit_in_bytes"
    if not folder.is_dir():
        folder, limit = folder.parent, "memory.max"
    own = folder / f"loramux-test-{os.getpid()}"
    try:
        own.mkdir()
        (own / limit).write_text(str(LIMIT))
    except OSError as error:
        if own.is_dir():
            own.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield own
    own.rmdir()


@pytest.mark.slow
def test_the_kernel_does_not_kill_who_watches(limited: Path) -> None:
    """1.6 GB of adapters into a tier that may have 16, where the kernel allows one; without the watch it kills."""
    enters = f"import os; open('{limited}/cgroup.procs', 'w').write(str(os.getpid()))\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", enters + FILLS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    shrinks, held = map(int, done.stdout.split())
    assert shrinks > 0
    assert 0 < held < LIMIT
