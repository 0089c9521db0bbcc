"""`router.safetensors`, the weights of a router that decides from hidden states: read with care, written as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from adapters_store.safetensors_file import DTYPES, MappedTensors, TensorHeader
from adapters_store.types import AdapterError
from routing.card_file import CARD_FILE, CHANGE_FILE, RouterFolderError, check_digest, file_sha256, write_fields

Card = TypeVar("Card")


def open_tensors(folder: Path, sha256: str) -> MappedTensors:
    """The file that the card names by its digest. Raises RouterFolderError."""
    path = folder / CHANGE_FILE
    check_digest(path, sha256)
    try:
        return MappedTensors(path)
    except (AdapterError, SafetensorError, OSError) as error:
        raise RouterFolderError(f"{CHANGE_FILE}: expected a safetensors file ({error})") from error


def check_tensor(head: TensorHeader, shape: tuple[int, ...]) -> None:
    """Raise RouterFolderError for another dtype or shape."""
    if head.dtype not in DTYPES:
        raise RouterFolderError(f"{CHANGE_FILE}: tensor {head.name}: {head.dtype}, expected {', '.join(DTYPES)}")
    if head.shape != shape:
        raise RouterFolderError(f"{CHANGE_FILE}: tensor {head.name}: shape {list(head.shape)}, expected {list(shape)}")


def finite_values(file: MappedTensors, head: TensorHeader) -> Tensor:
    """The tensor in fp32. Raises RouterFolderError for NaN and infinity."""
    values = file.tensor(head).float().clone()  # the file is mapped: whoever changes it would change this
    if not torch.isfinite(values).all():
        raise RouterFolderError(f"{CHANGE_FILE}: tensor {head.name}: expected finite numbers only")
    return values


def write_both(
    folder: Path,
    tensors: Mapping[str, Tensor],
    fields: Callable[[str], dict[str, Any]],
    read: Callable[[Path], Card],
) -> Card:
    """Writes tensors, and the card's `fields` of their sha256, into `folder`; returns what `read` then reads.

    A router that is there already is replaced only by one that was read back.

    Raises:
        RouterFolderError: what was written would not be read back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-", dir=folder) as name:  # on the same disk: renaming is one step
        partial = Path(name)
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, partial / CHANGE_FILE)
        (partial / CHANGE_FILE).chmod(0o644)
        write_fields(partial, fields(file_sha256(partial / CHANGE_FILE)))
        written = read(partial)
        for file in (CHANGE_FILE, CARD_FILE):
            (partial / file).replace(folder / file)
    return written
