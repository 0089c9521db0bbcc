"""A disk that is full: a small file system of the server's own or, where none can be mounted, a limit on its files."""

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

BYTES = 256 << 20
PAGE = 4096


class SmallDisk:
    """A file system in memory at `folder`, in a mount namespace that lasts from `with` to its end.

    Who is started with `prefix` sees it. Raises OSError where this user may not mount one.
    """

    what = "file system full"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> "SmallDisk":
        mount = f"mount -t tmpfs -o size={BYTES},mode=700 none '{self._folder}' && echo mounted && exec cat"
        command = ("unshare", "--mount", "--map-root-user", "sh", "-c", mount)
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            said = self._holder.communicate()[1].decode(errors="replace").strip()
            raise OSError(f"no file system can be mounted: {said}")
        target = ("--target", str(self._holder.pid))
        self.prefix = ("nsenter", "--user", "--mount", "--preserve-credentials", *target)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.communicate()  # the end of its input is its end

    def path_of(self, file: Path) -> Path:
        """Where others find a file of this disk."""
        return Path(f"/proc/{self._holder.pid}/root{file}")

    @contextmanager
    def full(self, pid: int) -> Iterator[None]:  # noqa: ARG002
        """Without a free byte until the block ends."""
        filler = self.path_of(self._folder / "filler")
        with filler.open("wb") as file:
            try:
                _fill(file.fileno())
                yield
            finally:
                filler.unlink()


def _fill(handle: int) -> None:
    """Until nothing more goes in: others write, and make room, at the same time."""
    part, size = BYTES, 0
    while part >= PAGE:
        try:
            os.posix_fallocate(handle, size, part)
            size += part
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            part //= 2


class FileLimit:
    """Files that cannot grow (RLIMIT_FSIZE), which a process meets as it meets a full disk."""

    what = "files cannot grow"
    prefix: tuple[str, ...] = ()

    def path_of(self, file: Path) -> Path:
        """As for `SmallDisk`."""
        return file

    @contextmanager
    def full(self, pid: int) -> Iterator[None]:
        """No file of the process grows beyond a page until the block ends."""
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (PAGE, hard))
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
