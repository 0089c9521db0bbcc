"""Damage to routers' folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from routing.card_file import CARD_FILE, CHANGE_FILE, file_sha256


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((folder / CARD_FILE).read_text())
    change(fields)
    (folder / CARD_FILE).write_text(json.dumps(fields))


def resave(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Other tensors, and a card that names them."""
    save_file(tensors, folder / CHANGE_FILE)
    edit(folder, lambda fields: fields.update(sha256=file_sha256(folder / CHANGE_FILE)))
