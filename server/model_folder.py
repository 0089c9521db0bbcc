"""A model's folder: whether it is complete and unchanged, and the receipt that makes the second look cheap."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.convert import WEIGHTS, sha256_of, write_json

RECEIPT = "pull.json"


def is_complete(
    folder: Path,
    files: Sequence[str],
    digests: Mapping[str, str],
    verifying: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> bool:
    """Whether `folder` holds every file, and those of `digests` with these sha256.

    Weights that `digests` leaves out must have the digest of the receipt. The receipt left by the last full check
    reduces this one to a comparison of the weights' size and modification time; without a fitting receipt they are
    hashed again, inside `verifying()`. The other files are small and always hashed.
    """
    if missing(folder, files):
        return False
    if any(sha256_of(folder / file) != digest for file, digest in digests.items() if file != WEIGHTS):
        return False
    receipt = _read_receipt(folder)
    expected = digests.get(WEIGHTS) or receipt.get("sha256")
    stat = (folder / WEIGHTS).stat()
    if receipt == {"sha256": expected, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}:
        return True
    with verifying():
        if sha256_of(folder / WEIGHTS) != expected:
            return False
    with contextlib.suppress(OSError):  # a read-only data folder is as good, only slower to verify
        write_receipt(folder, str(expected))
    return True


def missing(folder: Path, files: Sequence[str]) -> list[str]:
    """Those of `files` that are not there."""
    return [file for file in files if not (folder / file).is_file()]


def write_receipt(folder: Path, digest: str) -> None:
    """Notes that the weights had this sha256 when they had this size and modification time."""
    stat = (folder / WEIGHTS).stat()
    write_json(folder / RECEIPT, {"sha256": digest, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})


def _read_receipt(folder: Path) -> dict[str, Any]:
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return receipt if isinstance(receipt, dict) else {}
