"""Ways to change a PEFT folder that `write` made, each a function of the folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file

Damage: TypeAlias = Callable[[Path], None]

LAYER0 = "base_model.model.model.layers.0"
Q_A = f"{LAYER0}.self_attn.q_proj.lora_A.weight"
Q_B = f"{LAYER0}.self_attn.q_proj.lora_B.weight"


def change(**fields: Any) -> Damage:
    """Overwrite fields of the config."""

    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def retensor(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Edit the tensors in place."""

    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return apply


def rename(old: str, new: str) -> Damage:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return retensor(edit)


def raw_config(text: bytes) -> Damage:
    def apply(folder: Path) -> None:
        (folder / "adapter_config.json").write_bytes(text)

    return apply


def raw_weights(edit: Callable[[bytes], bytes]) -> Damage:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return apply


def remove(*names: str) -> Damage:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def set_value(name: str, value: float) -> Damage:
    return retensor(lambda tensors: tensors[name].view(-1).__setitem__(3, value))


def recast(dtype: torch.dtype) -> Damage:
    return retensor(lambda tensors: tensors.update({Q_A: tensors[Q_A].to(dtype)}))


def put(name: str, *size: int) -> Damage:
    return retensor(lambda tensors: tensors.update({name: torch.ones(*size)}))


def drop(part: str) -> Damage:
    return retensor(lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name])


def widen(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = torch.ones(4, 32) if "lora_A" in name else torch.ones(tensor.shape[0] + 16, 4)
