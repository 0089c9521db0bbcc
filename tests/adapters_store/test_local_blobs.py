"""Blobs in a local folder: damage, failing disks, killed writers, and sweeps beside writers."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adapters_store.blobs import BlobCorrupt, BlobUnavailable
from adapters_store.local_blobs import LocalBlobs

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HOUR = 3600.0


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"\0", b""], ids=["short", "altered", "empty"])
def test_a_damaged_local_blob_is_set_aside_and_can_be_put_again(tmp_path: Path, damage: bytes) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.put_stream([CONTENT])
    stored = tmp_path / "blobs" / "sha256" / DIGEST
    stored.chmod(0o644)
    stored.write_bytes(damage)
    with pytest.raises(BlobCorrupt, match="register the same content again"):
        blobs.fetch(DIGEST, tmp_path / "out")
    assert not blobs.exists(DIGEST)
    assert list((tmp_path / "out").iterdir()) == []
    assert [each.read_bytes() for each in (tmp_path / "blobs" / "quarantine").iterdir()] == [damage]
    blobs.put_stream([CONTENT])
    assert blobs.fetch(DIGEST, tmp_path / "out").read_bytes() == CONTENT


def test_putting_content_again_repairs_it(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.put_stream([CONTENT])
    stored = tmp_path / "blobs" / "sha256" / DIGEST
    stored.chmod(0o644)
    stored.write_bytes(b"damaged")
    blobs.put_stream([CONTENT])
    assert blobs.fetch(DIGEST, tmp_path / "out").read_bytes() == CONTENT


def test_existing_content_is_not_written_again_but_counts_as_new(tmp_path: Path) -> None:
    steps: list[str] = []
    blobs = LocalBlobs(tmp_path / "blobs", steps.append)
    (tmp_path / "file").write_bytes(CONTENT)
    blobs.put_file(tmp_path / "file")
    stored = tmp_path / "blobs" / "sha256" / DIGEST
    inode = stored.stat().st_ino
    os.utime(stored, (1000, 1000))
    steps.clear()
    blobs.put_file(tmp_path / "file")
    assert steps == []
    assert stored.stat().st_ino == inode
    assert blobs.sweep(set(), HOUR, time.time() + 60) == ()


def test_a_sweep_clears_what_killed_writers_left(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    leftover = tmp_path / "blobs" / "temporary" / "half"
    leftover.write_bytes(b"half")
    blobs.sweep(set(), HOUR, time.time())
    assert leftover.exists()
    blobs.sweep(set(), HOUR, time.time() + 2 * HOUR)
    assert not leftover.exists()


def test_a_fetch_across_disks_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.put_stream([CONTENT])
    monkeypatch.setattr(os, "link", refuse)
    path = blobs.fetch(DIGEST, tmp_path / "out")
    assert path.read_bytes() == CONTENT
    assert path.stat().st_nlink == 1
    assert path.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the disk is read-only"), (errno.EIO, "input/output error")],
)
@pytest.mark.parametrize("step", ["blob.opened", "blob.synced", "blob.renamed"])
def test_a_failing_disk_is_said_in_one_sentence(tmp_path: Path, step: str, code: int, reason: str) -> None:
    def fault(at: str) -> None:
        if at == step:
            raise OSError(code, os.strerror(code), "/secret/path")

    with pytest.raises(BlobUnavailable) as caught:
        LocalBlobs(tmp_path / "blobs", fault).put_stream([CONTENT])
    assert reason in caught.value.message
    assert "/secret" not in caught.value.message
    assert caught.value.status == 503
    assert list((tmp_path / "blobs" / "temporary").iterdir()) == []


def test_a_file_in_place_of_the_folder_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("in the way")
    with pytest.raises(BlobUnavailable):
        LocalBlobs(tmp_path / "blobs")


_WRITER = """
import os, signal, sys
from adapters_store.local_blobs import LocalBlobs
from pathlib import Path
def fault(step):
    if step == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
LocalBlobs(Path(sys.argv[1]), fault).put_stream([bytes(range(256)) * 5000])
"""


@pytest.mark.parametrize(
    ("step", "stored"),
    [
        ("blob.opened", False),
        ("blob.written", False),
        ("blob.synced", False),
        ("blob.renamed", True),
        ("blob.stored", True),
    ],
)
def test_a_killed_writer_leaves_all_or_nothing(tmp_path: Path, step: str, stored: bool) -> None:
    root = tmp_path / "blobs"
    done = subprocess.run([sys.executable, "-c", _WRITER, str(root), step], check=False)
    assert done.returncode == -signal.SIGKILL
    blobs = LocalBlobs(root)
    assert [blob.sha256 for blob in blobs.list()] == [DIGEST] * stored
    blobs.put_stream([CONTENT])
    assert blobs.fetch(DIGEST, tmp_path / "out").read_bytes() == CONTENT
    blobs.sweep({DIGEST}, HOUR, time.time() + 2 * HOUR)
    assert list((root / "temporary").iterdir()) == []


def test_a_sweep_never_takes_what_is_being_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put between a sweep's last look and its deletion waits, finds the blob gone, and writes it anew."""
    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.put_stream([CONTENT])
    os.utime(tmp_path / "blobs" / "sha256" / DIGEST, (1000, 1000))
    unlink = Path.unlink
    writer = threading.Thread(target=lambda: blobs.put_stream([CONTENT]))

    def put_meanwhile(path: Path, missing_ok: bool = False) -> None:
        if path.name == DIGEST:
            writer.start()
            writer.join(timeout=0.3)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", put_meanwhile)
    assert blobs.sweep(set(), HOUR, time.time()) == (DIGEST,)
    writer.join()
    assert blobs.fetch(DIGEST, tmp_path / "out").read_bytes() == CONTENT
