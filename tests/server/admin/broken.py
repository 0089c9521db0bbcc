"""Adapters that cannot be served, each with its answer."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Files = dict[str, tuple[str, bytes]]
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")


def config(**fields: Any) -> Callable[[Path], Files]:
    def broken(folder: Path) -> Files:
        files = intact(folder)
        changed = json.loads(files["config"][1]) | fields
        return files | {"config": (CONFIG, json.dumps(changed).encode())}

    return broken


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Files]:
    def broken(folder: Path) -> Files:
        changed = load_file(folder / WEIGHTS)
        edit(changed)
        target = folder.parent / "broken.safetensors"
        save_file(changed, target)
        return intact(folder) | {"weights": (WEIGHTS, target.read_bytes())}

    return broken


def intact(folder: Path) -> Files:
    return {"config": (CONFIG, (folder / CONFIG).read_bytes()), "weights": (WEIGHTS, (folder / WEIGHTS).read_bytes())}


def renamed(old: str, new: str) -> Callable[[Path], Files]:
    def edit(found: dict[str, torch.Tensor]) -> None:
        for name in list(found):
            found[name.replace(old, new)] = found.pop(name)

    return tensors(edit)


def without(field: str) -> Callable[[Path], Files]:
    def broken(folder: Path) -> Files:
        files = intact(folder)
        del files[field]
        return files

    return broken


def raw(field: str, content: Callable[[bytes], bytes]) -> Callable[[Path], Files]:
    def broken(folder: Path) -> Files:
        files = intact(folder)
        return files | {field: (files[field][0], content(files[field][1]))}

    return broken


def archive(make: Callable[[Path], bytes]) -> Callable[[Path], Files]:
    return lambda folder: {"archive": ("adapter.zip", make(folder))}


def _zip_of(*entries: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in entries:
            file.writestr(name, data)
    return out.getvalue()


def _traversal(folder: Path) -> bytes:
    return _zip_of((f"../{CONFIG}", b"{}"), (WEIGHTS, (folder / WEIGHTS).read_bytes()))


def _link(folder: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        file.add(folder / CONFIG, CONFIG)
        link = tarfile.TarInfo(WEIGHTS)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    return out.getvalue()


def _pickle(folder: Path) -> bytes:
    return _zip_of((CONFIG, (folder / CONFIG).read_bytes()), ("adapter_model.bin", b"\x80\x02."))


def _put(found: dict[str, torch.Tensor], name: str, *size: int) -> None:
    found[name] = torch.ones(*size)


def _widened(found: dict[str, torch.Tensor]) -> None:
    found[Q_A], found[Q_B] = torch.ones(2, 16), torch.ones(16, 2)


def _nan(found: dict[str, torch.Tensor]) -> None:
    found[Q_A][0, 0] = float("nan")


BROKEN: dict[str, tuple[Callable[[Path], Files], int, str]] = {
    "touches nothing": (renamed("model.model.layers", "model.transformer.h"), 422, "adapter_touches_no_module"),
    "wrong rank": (tensors(lambda found: _put(found, Q_A, 3, 8)), 422, "adapter_shape_mismatch"),
    "another base": (tensors(_widened), 422, "adapter_wrong_base"),
    "unknown tensor": (
        tensors(lambda found: _put(found, "base_model.model.model.layers.0.self_attn.what", 1)),
        422,
        "adapter_unknown_tensor",
    ),
    "layer beyond": (
        tensors(lambda found: _put(found, Q_A.replace("layers.0", "layers.7"), 2, 8)),
        422,
        "adapter_unknown_tensor",
    ),
    "NaN": (tensors(_nan), 422, "adapter_not_finite"),
    "DoRA": (config(use_dora=True), 422, "adapter_unsupported"),
    "bias": (config(bias="all"), 422, "adapter_unsupported"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), 422, "adapter_unsupported"),
    "not LoRA": (config(peft_type="IA3"), 422, "adapter_unsupported"),
    "bad rank": (config(r="two"), 422, "adapter_bad_config"),
    "no JSON": (raw("config", lambda _: b"{"), 422, "adapter_bad_config"),
    "truncated": (raw("weights", lambda data: data[:-7]), 422, "adapter_corrupt"),
    "noise": (raw("weights", lambda _: b"\0" * 100), 422, "adapter_corrupt"),
    "half a pair": (tensors(lambda found: found.pop(Q_B)), 422, "adapter_incomplete"),
    "no weights": (without("weights"), 422, "adapter_incomplete"),
    "no config": (without("config"), 422, "adapter_incomplete"),
    "traversal": (archive(_traversal), 422, "adapter_unsafe"),
    "link": (archive(_link), 422, "adapter_unsafe"),
    "no archive": (archive(lambda _: b"hello there"), 422, "adapter_corrupt"),
    "empty archive": (archive(lambda _: _zip_of()), 422, "adapter_incomplete"),
    "pickle": (archive(_pickle), 415, "not_safetensors"),
    "too large": (raw("weights", lambda data: data + b"\0" * 5000), 413, "adapter_too_large"),
    "config too large": (raw("config", lambda _: b" " * (2 << 20)), 413, "adapter_too_large"),
    "archive and files": (lambda folder: intact(folder) | {"archive": ("a.zip", _zip_of())}, 400, "bad_upload"),
}
