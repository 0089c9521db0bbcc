"""What is read of /proc and of control groups of both versions, whole and in containers."""

from pathlib import Path

import pytest

from server.engine.available_memory import MemoryProbe, MemoryReading

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(
        tmp_path / "proc" / "meminfo", "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 400 kB\nHugePages_Total: 0\n"
    )
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def group(folder: Path, limit: str, used: int, idle: int = 0) -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 5\ninactive_file {idle}\n")


def test_the_machine(root: Path) -> None:
    assert MemoryProbe(root).read() == MemoryReading(400 * 1024, 1000 * 1024)
    write(root / "proc" / "pressure" / "memory", "some avg10=31.50 avg60=1.00 total=5\nfull avg10=2.00 total=1\n")
    assert MemoryProbe(root).read() == MemoryReading(400 * 1024, 1000 * 1024, 31.5)


def test_the_tightest_group_above_counts(root: Path) -> None:
    write(root / "proc" / "self" / "cgroup", "0::/all/mine\n")
    mount = root / "sys" / "fs" / "cgroup"
    group(mount / "all" / "mine", "max", 90)
    group(mount / "all", "100", 95, idle=4)
    assert MemoryProbe(root).read() == MemoryReading(9, 100)
    group(mount / "all" / "mine", "50", 60)
    assert MemoryProbe(root).read() == MemoryReading(0, 50)


def test_a_container_sees_its_group_as_the_mount(root: Path) -> None:
    write(root / "proc" / "self" / "cgroup", "0::/docker/abc\n")
    group(root / "sys" / "fs" / "cgroup", "200", 150)
    assert MemoryProbe(root).read() == MemoryReading(50, 200)


def test_version_1(root: Path) -> None:
    write(root / "proc" / "self" / "cgroup", "5:cpu:/x\n4:memory:/mine\n0::/\n")
    folder = root / "sys" / "fs" / "cgroup" / "memory" / "mine"
    write(folder / "memory.limit_in_bytes", str(100 * MIB))
    write(folder / "memory.usage_in_bytes", str(80 * MIB))
    write(folder / "memory.stat", f"inactive_file 1\ntotal_inactive_file {10 * MIB}\n")
    write(folder.parent / "memory.limit_in_bytes", "9223372036854771712")
    write(folder.parent / "memory.usage_in_bytes", "1")
    assert MemoryProbe(root).read() == MemoryReading(30 * MIB, 100 * MIB)


def test_what_cannot_be_read_does_not_limit(tmp_path: Path) -> None:
    assert MemoryProbe(tmp_path).read() is None
    write(tmp_path / "proc" / "meminfo", "nonsense")
    assert MemoryProbe(tmp_path).read() is None


def test_this_machine_has_memory() -> None:
    reading = MemoryProbe().read()
    assert reading is not None
    assert reading.total > 0
