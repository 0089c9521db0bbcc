"""A trained prompt-level router's folder: `router.json`, its card, and `router.safetensors`, the routers of all layers.

Tensors are `layers.{l}.w` (N, d) of a MoA router, `layers.{l}.w_r` (d, N) of a MiLoRA router, with `w_sa` (d) beside it
for attention pooling and `a` (7), `b` (5) for the rational activation. Rows or columns are in the order of the card's
adapters, with a last one for "no adapter" if it says so; over modules in the order of its targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters_store.safetensors_file import MappedTensors, TensorHeader
from adapters_store.types import TARGETS, LinearShape
from routing.card_adapters import (
    MAX_ADAPTERS,
    CardAdapter,
    adapter_fields,
    check_base,
    parse_adapters,
    parse_base,
)
from routing.card_file import (
    CARD_FILE,
    CHANGE_FILE,
    RouterFolderError,
    check_names,
    expect,
    is_whole,
    parse_common,
    read_fields,
)
from routing.card_tensors import check_tensor, finite_values, open_tensors, write_both
from routing.prompt_router import (
    ACTIVATIONS,
    ADAPTERS,
    ATTENTION,
    BY_LAYER,
    DECISIONS,
    EXPERTS,
    GELU_A,
    GELU_B,
    MODULES,
    NORMS,
    POOLINGS,
    RATIONAL,
    LayerRouter,
    PromptRouter,
    RouterForm,
)

MILORA, MOA = "milora", "moa"
KINDS = (MILORA, MOA)
VERSION = 1
MAX_TOP_K = 8
MAX_LAYERS = 1024
_REQUIRED = {"kind", "version", "base", "adapters", "experts", "targets", "has_null", "layers", "top_k"}
_REQUIRED |= {"pooling", "activation", "norm", "decision", "depth", "sha256"}
_OPTIONAL = {"name", "training"}


@dataclass(frozen=True, slots=True)
class PromptCard:
    """What `router.json` says.

    `kind` is "milora" or "moa"; `base_fingerprint` the base model's `ModelConfig.fingerprint()`. `adapters` are those
    whose use is decided: with experts "modules" the one to which the linears belong. `has_null`: the last expert is "no
    adapter". `sha256` is that of `router.safetensors` in hex, `training` recipe, tasks and metrics as plain JSON.
    """

    kind: str
    base_fingerprint: str
    base_name: str
    adapters: tuple[CardAdapter, ...]
    form: RouterForm
    has_null: bool
    sha256: str
    name: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


def read_prompt_router(folder: Path, shape: LinearShape | None = None, fingerprint: str | None = None) -> PromptCard:
    """Reads and checks the folder: the card's fields, the file's digest, and the tensors' names, shapes and values.

    Raises:
        RouterFolderError: a file is missing, too large, malformed, or not the one that the card names; or the router
            does not fit a model of `shape`, or belongs to another base model than that of `fingerprint`.
    """
    card, file, heads = _open(folder, shape, fingerprint)
    for head in heads.values():
        finite_values(file, head)
    return card


def load_prompt_router(
    folder: Path, shape: LinearShape | None = None, fingerprint: str | None = None
) -> tuple[PromptCard, PromptRouter]:
    """The card and the weights, on the CPU. Raises what `read_prompt_router` raises."""
    card, file, heads = _open(folder, shape, fingerprint)
    values = {name: finite_values(file, head) for name, head in heads.items()}
    matrix = _matrix(card.kind)
    layers = []
    for layer in range(card.form.num_layers):
        own = {name: values.get(f"layers.{layer}.{name}") for name in ("w_sa", "a", "b")}
        w = values[f"layers.{layer}.{matrix}"]
        layers.append(LayerRouter(w.T.contiguous() if card.kind == MILORA else w, **own))
    return card, PromptRouter(card.form, tuple(layers))


def check_card(card: PromptCard) -> None:
    """Raise RouterFolderError for a card that could not be read back; its digest does not count."""
    _parse(_fields(card, "0" * 64))


def write_prompt_router(
    folder: Path, card: PromptCard, layers: tuple[LayerRouter, ...], *, dtype: torch.dtype = torch.float32
) -> PromptCard:
    """Writes both files into `folder`; returns the card with the tensors' digest.

    A router that is there already is replaced only by one that was read back.

    Args:
        dtype: of the stored matrices; coefficients of activations stay fp32.

    Raises:
        RouterFolderError: what was written would not be read back.
    """
    tensors: dict[str, Tensor] = {}
    for layer, own in enumerate(layers):
        w = own.w.T if card.kind == MILORA else own.w
        named = {_matrix(card.kind): w.to(dtype), "w_sa": None if own.w_sa is None else own.w_sa.to(dtype)}
        named |= {"a": own.a, "b": own.b}
        tensors |= {f"layers.{layer}.{name}": tensor for name, tensor in named.items() if tensor is not None}
    return write_both(folder, tensors, lambda sha256: _fields(card, sha256), read_prompt_router)


def _matrix(kind: str) -> str:
    return "w_r" if kind == MILORA else "w"


def _fields(card: PromptCard, sha256: str) -> dict[str, Any]:
    form = card.form
    fields: dict[str, Any] = {
        "kind": card.kind,
        "version": VERSION,
        "base": {"fingerprint": card.base_fingerprint, "name": card.base_name},
        "adapters": adapter_fields(card.adapters),
        "experts": form.experts,
        "targets": list(TARGETS) if form.experts == MODULES else [],
        "has_null": card.has_null,
        "layers": form.num_layers,
        "top_k": form.top_k,
        "pooling": form.pooling,
        "activation": form.activation,
        "norm": form.norm,
        "decision": form.decision,
        "depth": form.depth,
        "sha256": sha256,
        "training": dict(card.training),
    }
    return fields if card.name is None else {**fields, "name": card.name}


def _open(
    folder: Path, shape: LinearShape | None, fingerprint: str | None
) -> tuple[PromptCard, MappedTensors, dict[str, TensorHeader]]:
    """All is checked but the values."""
    fields = read_fields(folder / CARD_FILE)
    expect(fields.get("kind") in KINDS, "kind", " or ".join(map(repr, KINDS)))
    check_names(fields, _REQUIRED, _OPTIONAL)
    card = _parse(fields)
    check_base(fingerprint, card.base_fingerprint, card.base_name, "routers")
    if shape is not None:
        expect(card.form.num_layers == shape.num_layers, "layers", f"{shape.num_layers}, those of the base model")
    file = open_tensors(folder, card.sha256)
    return card, file, _checked(file.headers, card, shape)


def _parse(fields: Mapping[str, Any]) -> PromptCard:
    expect(is_whole(fields["version"], VERSION, VERSION), "version", str(VERSION))
    fingerprint, base_name = parse_base(fields["base"])
    kind = fields["kind"]
    experts = (ADAPTERS,) if kind == MOA else EXPERTS
    _one_of(fields, "experts", experts)
    modules = fields["experts"] == MODULES
    adapters = parse_adapters(fields["adapters"], 1 if modules else MAX_ADAPTERS)
    expect(fields["targets"] == (list(TARGETS) if modules else []), "targets", "all seven linears, or [] over adapters")
    expect(isinstance(fields["has_null"], bool), "has_null", "true or false")
    expect(not (modules and fields["has_null"]), "has_null", "false: linears need no row for none of them")
    count = len(TARGETS) if modules else len(adapters) + fields["has_null"]
    form = _form(fields, count)
    return PromptCard(kind, fingerprint, base_name, adapters, form, fields["has_null"], *parse_common(fields))


def _form(fields: Mapping[str, Any], num_experts: int) -> RouterForm:
    layers, depth = fields["layers"], fields["depth"]
    expect(is_whole(layers, 1, MAX_LAYERS), "layers", f"a whole number from 1 to {MAX_LAYERS}")
    most = min(MAX_TOP_K, num_experts)
    expect(is_whole(fields["top_k"], 1, most), "top_k", f"a whole number from 1 to {most}")
    for name, known in (("pooling", POOLINGS), ("activation", ACTIVATIONS), ("norm", NORMS)):
        _one_of(fields, name, known)
    _one_of(fields, "decision", (BY_LAYER,) if fields["kind"] == MILORA else DECISIONS)
    if fields["decision"] == BY_LAYER:
        expect(depth is None, "depth", "null: every layer decides for itself")
    else:
        expect(depth is None or is_whole(depth, 1, layers), "depth", f"null or a whole number from 1 to {layers}")
    return RouterForm(
        experts=fields["experts"],
        num_layers=layers,
        num_experts=num_experts,
        top_k=fields["top_k"],
        pooling=fields["pooling"],
        activation=fields["activation"],
        norm=fields["norm"],
        decision=fields["decision"],
        depth=depth,
    )


def _one_of(fields: Mapping[str, Any], name: str, known: tuple[str, ...]) -> None:
    found = fields[name]
    expect(isinstance(found, str) and found in known, name, "one of " + ", ".join(known))


def _checked(headers: tuple[TensorHeader, ...], card: PromptCard, shape: LinearShape | None) -> dict[str, TensorHeader]:
    """The tensors' headers by name, each as the card's form wants it."""
    found = {head.name: head for head in headers}
    matrix, form = _matrix(card.kind), card.form
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(form.num_layers):
        width = _width(found, f"layers.0.{matrix}", card.kind) if shape is None else shape.inputs["q_proj"]
        n = form.num_experts
        shapes[f"layers.{layer}.{matrix}"] = (width, n) if card.kind == MILORA else (n, width)
        if form.pooling == ATTENTION:
            shapes[f"layers.{layer}.w_sa"] = (width,)
        if form.activation == RATIONAL:
            shapes[f"layers.{layer}.a"], shapes[f"layers.{layer}.b"] = (len(GELU_A),), (len(GELU_B),)
    if missing := [name for name in shapes if name not in found]:
        raise RouterFolderError(
            f"{CHANGE_FILE}: tensor {missing[0]}: expected one for each of {form.num_layers} layers"
        )
    if strangers := sorted(found.keys() - shapes.keys()):
        raise RouterFolderError(f"{CHANGE_FILE}: tensor {strangers[0][:200]}: the card's router has no such tensor")
    for name, wanted in shapes.items():
        check_tensor(found[name], wanted)
    return {name: found[name] for name in shapes}


def _width(found: Mapping[str, TensorHeader], name: str, kind: str) -> int:
    """Of hidden states, as the first layer's matrix has it."""
    size = found[name].shape if name in found else ()
    return max(1, size[0 if kind == MILORA else -1]) if len(size) == 2 else 1
