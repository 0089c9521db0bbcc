"""Folders and files that nobody but the server's own user reads: weights, prompts' examples, hashes of keys."""

import os
from pathlib import Path

FOLDER_MODE = 0o700
FILE_MODE = 0o600
FROZEN_MODE = 0o400


def make_private_folder(path: Path) -> None:
    """Make the folder and the parents that are missing; what is there keeps its mode. Raises OSError."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(FOLDER_MODE, exist_ok=True)
    path.mkdir(exist_ok=True)


def make_private_file(path: Path) -> None:
    """Make an empty file unless there is one. Raises OSError."""
    if not path.exists():
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, FILE_MODE))
