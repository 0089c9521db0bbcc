"""A trained token-level router's folder: `router.json`, its card, and `router.safetensors`, the gates of all layers.

A linear with input x has one gate, a matrix of a row for each adapter in the card's order, and one more for "no
adapter" if the card says so; its logits are the rows' products with x (MeteoRA, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters_store.linear_names import Module, module_path
from adapters_store.safetensors_file import MappedTensors, TensorHeader
from adapters_store.types import GROUP_OF, TARGETS, LinearShape
from routing.card_adapters import CardAdapter, adapter_fields, check_base, parse_adapters, parse_base
from routing.card_file import (
    CARD_FILE,
    CHANGE_FILE,
    RouterFolderError,
    check_names,
    expect,
    is_number,
    is_whole,
    parse_common,
    read_fields,
)
from routing.card_tensors import check_tensor, finite_values, open_tensors, write_both

KIND = "meteora"
VERSION = 1
MAX_TOP_K = 8
_REQUIRED = {"kind", "version", "base", "adapters", "targets", "top_k", "temperature", "has_null", "sha256"}
_OPTIONAL = {"name", "training"}


@dataclass(frozen=True, slots=True)
class GateCard:
    """What `router.json` says.

    `base_fingerprint` is the base model's `ModelConfig.fingerprint()`, `targets` are the linears of every layer that
    have a gate, by PEFT's names. Every token takes its `top_k` rows of highest logit, weighted by the softmax of these
    logits over `temperature`. `sha256` is that of `router.safetensors` in hex, `training` recipe, tasks and metrics as
    plain JSON.
    """

    base_fingerprint: str
    base_name: str
    adapters: tuple[CardAdapter, ...]
    targets: tuple[str, ...]
    top_k: int
    temperature: float
    has_null: bool
    sha256: str
    name: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of a gate: one an adapter, then that of "no adapter"."""
        return len(self.adapters) + self.has_null


def read_gates(folder: Path, shape: LinearShape | None = None, fingerprint: str | None = None) -> GateCard:
    """Reads and checks the folder: the card's fields, the file's digest, and the names, shapes and values of the gates.

    Raises:
        RouterFolderError: a file is missing, too large, malformed, or not the one that the card names; or the gates do
            not fit a model of `shape`, or belong to another base model than that of `fingerprint`.
    """
    card, file, heads = _open(folder, shape, fingerprint)
    for head in heads.values():
        finite_values(file, head)
    return card


def load_gates(folder: Path, shape: LinearShape | None = None) -> dict[Module, Tensor]:
    """The gates, fp32 (rows, in_features), by (layer, target). Raises what `read_gates` raises."""
    _, file, heads = _open(folder, shape, None)
    return {module: finite_values(file, head) for module, head in heads.items()}


def check_card(card: GateCard) -> None:
    """Raise RouterFolderError for a card that could not be read back; its digest does not count."""
    _parse(_fields(replace(card, sha256="0" * 64)))


def write_gates(
    folder: Path, card: GateCard, gates: Mapping[Module, Tensor], *, dtype: torch.dtype = torch.float32
) -> GateCard:
    """Writes both files into `folder`; returns the card with the tensors' digest.

    A router that is there already is replaced only by one that was read back.

    Args:
        gates: (rows, in_features) by (layer, target).
        dtype: of the stored gates.

    Raises:
        RouterFolderError: what was written would not be read back.
    """
    tensors = {f"{module_path(*module)}.gate": gate.to(dtype) for module, gate in gates.items()}
    return write_both(folder, tensors, lambda sha256: _fields(replace(card, sha256=sha256)), read_gates)


def _fields(card: GateCard) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "kind": KIND,
        "version": VERSION,
        "base": {"fingerprint": card.base_fingerprint, "name": card.base_name},
        "adapters": adapter_fields(card.adapters),
        "targets": list(card.targets),
        "top_k": card.top_k,
        "temperature": card.temperature,
        "has_null": card.has_null,
        "sha256": card.sha256,
        "training": dict(card.training),
    }
    return fields if card.name is None else {**fields, "name": card.name}


def _open(
    folder: Path, shape: LinearShape | None, fingerprint: str | None
) -> tuple[GateCard, MappedTensors, dict[Module, TensorHeader]]:
    """All is checked but the values."""
    fields = read_fields(folder / CARD_FILE)
    expect(fields.get("kind") == KIND, "kind", repr(KIND))
    check_names(fields, _REQUIRED, _OPTIONAL)
    card = _parse(fields)
    check_base(fingerprint, card.base_fingerprint, card.base_name, "gates")
    file = open_tensors(folder, card.sha256)
    return card, file, _modules(file.headers, card, shape)


def _parse(fields: Mapping[str, Any]) -> GateCard:
    expect(is_whole(fields["version"], VERSION, VERSION), "version", str(VERSION))
    fingerprint, base_name = parse_base(fields["base"])
    expect(isinstance(fields["has_null"], bool), "has_null", "true or false")
    adapters = parse_adapters(fields["adapters"])
    rows = len(adapters) + fields["has_null"]
    most = min(MAX_TOP_K, rows)
    expect(is_whole(fields["top_k"], 1, most), "top_k", f"a whole number from 1 to {most}")
    temperature = fields["temperature"]
    expect(is_number(temperature) and temperature > 0, "temperature", "a number above 0")
    sha256, name, training = parse_common(fields)
    return GateCard(
        base_fingerprint=fingerprint,
        base_name=base_name,
        adapters=adapters,
        targets=_targets(fields["targets"]),
        top_k=fields["top_k"],
        temperature=float(temperature),
        has_null=fields["has_null"],
        sha256=sha256,
        name=name,
        training=training,
    )


def _targets(found: object) -> tuple[str, ...]:
    known = f"some of {', '.join(TARGETS)}, none of them twice"
    if not isinstance(found, list) or not found or not all(target in TARGETS for target in found):
        raise RouterFolderError(f"{CARD_FILE}: field targets: expected {known}")
    expect(len(set(found)) == len(found), "targets", known)
    return tuple(found)


def _modules(
    headers: tuple[TensorHeader, ...], card: GateCard, shape: LinearShape | None
) -> dict[Module, TensorHeader]:
    """The gates' headers in order of (layer, target), all layers with the same targets."""
    layers = shape.num_layers if shape is not None else max(1, -(-len(headers) // len(card.targets)))
    wanted = {
        f"{module_path(layer, target)}.gate": (layer, target) for layer in range(layers) for target in card.targets
    }
    found = {head.name: head for head in headers}
    if missing := [name for name in wanted if name not in found]:
        raise RouterFolderError(f"{CHANGE_FILE}: tensor {missing[0]}: expected one for each of {layers} layers")
    if strangers := sorted(found.keys() - wanted.keys()):
        raise RouterFolderError(f"{CHANGE_FILE}: tensor {strangers[0][:200]}: no such gate in {layers} layers")
    modules = {wanted[name]: found[name] for name in wanted}
    widths = dict(shape.inputs) if shape is not None else _widths(modules)
    for (_, target), head in modules.items():
        check_tensor(head, (card.rows, widths[target]))
    return modules


def _widths(modules: Mapping[Module, TensorHeader]) -> dict[str, int]:
    """Inputs of each target as the first layer has them: linears that share an input have one width."""
    of_group: dict[str, int] = {}
    for (_, target), head in modules.items():
        of_group.setdefault(GROUP_OF[target].name, max(1, head.shape[-1] if head.shape else 1))
    return {target: of_group[GROUP_OF[target].name] for _, target in modules}
