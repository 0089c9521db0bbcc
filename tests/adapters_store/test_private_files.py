"""What a store makes belongs to its user alone."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.local_blobs import LocalBlobs
from adapters_store.private_files import make_private_file, make_private_folder
from adapters_store.registry import Registry
from adapters_store.work_folder import WorkFolder


@pytest.fixture(autouse=True)
def generous_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folders_and_files(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "a" / "b")
    make_private_file(tmp_path / "a" / "file")
    assert [mode(tmp_path / path) for path in ("a", "a/b", "a/file")] == [0o700, 0o700, 0o600]
    (tmp_path / "shared").mkdir(0o755)
    (tmp_path / "shared" / "file").write_text("kept")
    make_private_folder(tmp_path / "shared")
    make_private_file(tmp_path / "shared" / "file")
    assert mode(tmp_path / "shared") == 0o755
    assert (tmp_path / "shared" / "file").read_text() == "kept"
    with pytest.raises(FileExistsError):
        make_private_folder(tmp_path / "shared" / "file")


def test_a_stores_folders(tmp_path: Path) -> None:
    data = tmp_path / "data"
    Registry.open(f"sqlite:///{data / 'registry' / 'm.sqlite'}", lambda: 0.0).close()
    blobs = LocalBlobs(data / "blobs" / "m")
    blob = blobs.put_stream([b"weights"])
    work = WorkFolder(data / "store" / "m")
    fetched = blobs.fetch(blob.sha256, work.adapters, "weights")
    with work.staging() as staging:
        assert mode(staging) == 0o700
    folders = [data, data / "registry", data / "blobs", data / "blobs" / "m", data / "store", data / "store" / "m"]
    assert [mode(folder) for folder in folders] == [0o700] * len(folders)
    assert mode(data / "registry" / "m.sqlite") == 0o600
    assert mode(blobs.path_of(blob.sha256)) == mode(fetched) == 0o400
    work.close()
