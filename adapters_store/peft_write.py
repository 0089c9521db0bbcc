"""An adapter in host memory, written as a folder that PEFT loads."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from adapters_store.linear_names import Module, module_path
from adapters_store.peft_format import CONFIG_NAME, WEIGHTS_NAME, Number, most_frequent
from adapters_store.safetensors_file import TensorWriter, header_of
from adapters_store.types import TARGETS, AdapterError, AdapterWeights, LoraPair

RECIPE_NAME = "loramux.json"


def write_peft(
    folder: Path, weights: AdapterWeights, base_model: str | None = None, recipe: Mapping[str, Any] | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, and `recipe` as JSON into `loramux.json` if given.

    The folder is made if need be, files of these names are replaced. Modules, tensors and ranks are exactly those of
    `weights`, so are scales, to within one unit in the last place of fp64. The same weights give the same bytes.
    Raises AdapterError `adapter_touches_no_module` for weights without pairs, and OSError from the disk.
    """
    if not weights.pairs:
        raise AdapterError("adapter_touches_no_module", "the adapter has no LoRA pair: expected at least one")
    pairs = dict(sorted(weights.pairs.items()))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        tensor_name(module, factor): tensor
        for module, pair in pairs.items()
        for factor, tensor in (("A", pair.a), ("B", pair.b))
    }
    with TensorWriter(folder / WEIGHTS_NAME, [header_of(*item) for item in tensors.items()]) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: _alpha(pair) for module, pair in pairs.items()}
    write_json(folder / CONFIG_NAME, lora_config(ranks, alphas, base_model))
    if recipe is not None:
        write_json(folder / RECIPE_NAME, recipe)


def tensor_name(module: Module, factor: str) -> str:
    """PEFT's name of a factor, "A" or "B"."""
    return f"base_model.model.{module_path(*module)}.lora_{factor}.weight"


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Equal fields give equal bytes."""
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def lora_config(
    ranks: Mapping[Module, int], alphas: Mapping[Module, float], base_model: str | None = None, use_rslora: bool = False
) -> dict[str, Any]:
    """PEFT's config of an adapter on exactly these modules, as short as may be."""
    rank, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns({module: _shortest(alpha) for module, alpha in alphas.items()})
    target_modules, layers = _targets(ranks)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": target_modules,
        "layers_to_transform": layers,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": use_rslora,
        "use_dora": False,
    }


def _alpha(pair: LoraPair) -> float:
    """The alpha whose quotient by the rank comes closest to the scale: rounding may lose its last bit."""
    alpha = pair.scale * pair.rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return min(near, key=lambda value: abs(value / pair.rank - pair.scale))


def _shortest(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha


def _patterns(values: Mapping[Module, Number]) -> tuple[Number, dict[str, Number]]:
    """The most frequent value, and patterns for the modules that have another: a target's name where one will do."""
    common = most_frequent(values.values())
    patterns: dict[str, Number] = {}
    for target in TARGETS:
        own = {module: value for module, value in values.items() if module[1] == target}
        name: Callable[[Module], str] = (lambda module: module[1]) if len(set(own.values())) == 1 else _path
        patterns |= {name(module): value for module, value in own.items() if value != common}
    return common, patterns


def _path(module: Module) -> str:
    return module_path(*module)


def _targets(pairs: Collection[Module]) -> tuple[list[str], list[int] | None]:
    """PEFT's `target_modules` and `layers_to_transform`: every target in every layer, or else each path by itself."""
    layers, targets = sorted({layer for layer, _ in pairs}), sorted({target for _, target in pairs})
    if len(pairs) == len(layers) * len(targets):
        return targets, layers
    return [module_path(*module) for module in pairs], None
