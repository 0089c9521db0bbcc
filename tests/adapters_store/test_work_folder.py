"""The folder of a running store, and what dead ones leave."""

import subprocess
import sys
from pathlib import Path

import pytest

from adapters_store.blobs import BlobUnavailable
from adapters_store.work_folder import WorkFolder

KILLED = """
import os, signal, sys
from pathlib import Path
from adapters_store.work_folder import WorkFolder
work = WorkFolder(Path(sys.argv[1]))
(work.adapters / "digest").mkdir()
work.staging().__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_living_ones_do_not_touch_each_other(tmp_path: Path) -> None:
    one, other = WorkFolder(tmp_path / "root"), WorkFolder(tmp_path / "root")
    assert one.path != other.path
    assert one.adapters.is_dir()
    assert other.adapters.is_dir()
    one.close()
    assert not one.path.exists()
    assert other.adapters.is_dir()
    other.close()
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["lock"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    (left,) = tmp_path.glob("run-*")
    assert (left / "adapters" / "digest").is_dir()
    (tmp_path / "run-without-lock").mkdir()
    (tmp_path / "cache").mkdir()
    work = WorkFolder(tmp_path)
    assert list(tmp_path.glob("run-*")) == [work.path]
    assert (tmp_path / "cache").is_dir()
    work.close()


def test_staging_outlives_no_error(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    staging = work.staging()
    folder = staging.__enter__()
    (folder / "file").touch()
    staging.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not folder.exists()
    work.close()
    with pytest.raises(BlobUnavailable), work.staging():
        pass
