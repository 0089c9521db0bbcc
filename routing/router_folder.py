"""A trained router's folder: `router.json`, its card, and `router.safetensors`, its change of the base encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from adapters_store.safetensors_file import check_header
from adapters_store.types import AdapterError
from routing.card_file import (
    CARD_FILE,
    CHANGE_FILE,
    RouterFolderError,
    check_digest,
    check_names,
    expect,
    file_sha256,
    is_hex,
    is_number,
    is_text,
    is_whole,
    parse_common,
    read_fields,
    write_fields,
)

if TYPE_CHECKING:
    import torch

KIND = "retriever"
VERSION = 1
MODES = ("head", "lora", "full")
MAX_TENSORS = 10_000
MAX_WIDTH = 16_384
MAX_PREFIX = 1_000
_REQUIRED = {"kind", "version", "base", "mode", "prefix", "width", "sha256"}
_OPTIONAL = {"name", "min_score", "training"}


@dataclass(frozen=True, slots=True)
class RouterCard:
    """What `router.json` says.

    `base_id` is the id of the base encoder under the same `prefix`, `width` that of the embeddings, `min_score` the
    cosine similarity below which a prompt is none of the adapters' (None: not calibrated), `sha256` that of
    `router.safetensors` in hex, `training` recipe, tasks and metrics as plain JSON.
    """

    base_id: str
    base_name: str
    mode: str
    prefix: str
    width: int
    sha256: str
    name: str | None = None
    min_score: float | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


def read_router(folder: Path) -> RouterCard:
    """Reads and checks a trained router's folder: the card's fields, the tensors' headers and the file's digest.

    Whether the change fits an encoder shows when `EncoderModel.load` applies it.

    Raises:
        RouterFolderError: a file is missing, too large, malformed, or not the one that the card names.
    """
    fields = read_fields(folder / CARD_FILE)
    expect(fields.get("kind", KIND) == KIND, "kind", repr(KIND))  # first: another kind has other fields
    check_names(fields, _REQUIRED, _OPTIONAL)
    card = _parse(fields)
    path = folder / CHANGE_FILE
    check_digest(path, card.sha256)
    _check_tensors(path, card)
    return card


def write_router(folder: Path, card: RouterCard, change: Mapping[str, torch.Tensor]) -> RouterCard:
    """Writes both files into `folder`; returns the card with the tensors' digest.

    Raises:
        RouterFolderError: what was written would not be read back.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHANGE_FILE
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in change.items()}, path)
    path.chmod(0o644)
    return rewrite_card(folder, replace(card, sha256=file_sha256(path)))


def rewrite_card(folder: Path, card: RouterCard) -> RouterCard:
    """Replaces `router.json` and reads the folder back."""
    fields: dict[str, Any] = {
        "kind": KIND,
        "version": VERSION,
        "base": {"id": card.base_id, "name": card.base_name},
        "mode": card.mode,
        "prefix": card.prefix,
        "width": card.width,
        "min_score": card.min_score,
        "sha256": card.sha256,
        "training": dict(card.training),
    }
    if card.name is not None:
        fields["name"] = card.name
    write_fields(folder, fields)
    return read_router(folder)


def _parse(fields: Mapping[str, Any]) -> RouterCard:
    expect(fields["version"] == VERSION and not isinstance(fields["version"], bool), "version", str(VERSION))
    expect(fields["mode"] in MODES, "mode", "one of " + ", ".join(MODES))
    width = fields["width"]
    expect(is_whole(width, 1, MAX_WIDTH), "width", f"a whole number from 1 to {MAX_WIDTH}")
    expect(is_text(fields["prefix"], 0, MAX_PREFIX), "prefix", f"a text of at most {MAX_PREFIX} characters")
    base = fields["base"]
    expect(isinstance(base, dict) and base.keys() == {"id", "name"}, "base", "an object of id and name")
    expect(is_hex(base["id"], 16), "base.id", "16 lower-case hex digits")
    expect(is_text(base["name"], 1, 200), "base.name", "a text of 1 to 200 characters")
    sha256, name, training = parse_common(fields)
    score = fields.get("min_score")
    expect(score is None or (is_number(score) and -1 <= score <= 1), "min_score", "a number from -1 to 1, or null")
    return RouterCard(
        base_id=base["id"],
        base_name=base["name"],
        mode=fields["mode"],
        prefix=fields["prefix"],
        width=width,
        sha256=sha256,
        name=name,
        min_score=None if score is None else float(score),
        training=training,
    )


def _check_tensors(path: Path, card: RouterCard) -> None:
    try:
        check_header(path)
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            dtypes = {file.get_slice(name).get_dtype() for name in shapes}
    except (AdapterError, SafetensorError, OSError) as error:
        raise RouterFolderError(f"{CHANGE_FILE}: expected a safetensors file ({error})") from error
    if not 0 < len(shapes) <= MAX_TENSORS:
        raise RouterFolderError(f"{CHANGE_FILE}: {len(shapes)} tensors, expected 1 to {MAX_TENSORS}")
    if dtypes != {"F32"}:
        raise RouterFolderError(f"{CHANGE_FILE}: expected F32 tensors only, got {', '.join(sorted(dtypes))}")
    if card.mode == "head" and shapes != {"head": (card.width, card.width)}:
        raise RouterFolderError(f"{CHANGE_FILE}: expected one tensor `head` of {card.width} x {card.width}")
    if card.mode == "lora":
        _check_lora(shapes)


def _check_lora(shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        module, _, factor = name.rpartition(".")
        other = shapes.get(f"{module}.{'lora_B' if factor == 'lora_A' else 'lora_A'}")
        if factor not in ("lora_A", "lora_B") or not module or other is None or len(shape) != 2 or len(other) != 2:
            raise RouterFolderError(f"{CHANGE_FILE}: tensor {name[:200]}: expected pairs MODULE.lora_A, MODULE.lora_B")
        a, b = (shape, other) if factor == "lora_A" else (other, shape)
        if a[0] != b[1]:
            raise RouterFolderError(f"{CHANGE_FILE}: tensor {name[:200]}: rank {a[0]} in A but {b[1]} in B")
