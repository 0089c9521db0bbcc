"""PEFT's `adapter_config.json`, read strictly: what decides an adapter's mathematics, and refusal of what we lack."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters_store.patterns import Expression, ModuleNames, PatternBudget, PatternTable
from adapters_store.types import AdapterError

Number = TypeVar("Number", int, float)

MAX_CONFIG_BYTES = 1 << 20
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
    "modules_to_save": "fully trained modules",
}
_HARMLESS = frozenset(
    {
        "use_rslora",
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "runtime_config",
        "velora_config",
    }
)
"""rsLoRA is supported; the others matter while training only."""

_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations after which the base model's weights are no longer those of the checkpoint."""

_MAX_ALPHA = 3.4028234e38
"""Largest float32."""

_MAX_RANK = (1 << 31) - 1

_OUTSIDE = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class ModuleSettings:
    """The LoRA of one linear; `scale` is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""

    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class LoraSettings:
    """What `adapter_config.json` says about the mathematics.

    Module paths are those inside the base model, for example `model.layers.0.self_attn.q_proj`. Methods that match
    patterns raise AdapterError `adapter_bad_config` when that takes too long.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    target_modules: ModuleNames
    exclude_modules: ModuleNames
    layers: frozenset[int]
    layers_pattern: Sequence[Expression]
    base_model: str | None
    description: str

    def of(self, module: str) -> ModuleSettings:
        """The first pattern that matches the path's end decides, on a border between names, as in PEFT."""
        rank, alpha = self.rank_pattern.get(module, self.rank), self.alpha_pattern.get(module, self.alpha)
        return ModuleSettings(rank, alpha, alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def targets(self, module: str) -> bool:
        """Whether PEFT would put a LoRA on this linear of the decoder's layers."""
        if module in self.exclude_modules or module not in self.target_modules:
            return False
        if not self.layers or module in self.target_modules.listed:
            return True
        match = next(filter(None, (pattern.fullmatch(module) for pattern in self.layers_pattern)), None)
        return match is not None and int(match["index"]) in self.layers


def read_settings(path: Path) -> LoraSettings:
    """Parse and judge the file.

    Raises AdapterError: `adapter_incomplete`, `adapter_bad_config`, `adapter_unsupported`.
    """
    fields = _read_json(path)
    kind = _typed(fields, "peft_type", str, "the string 'LORA'")
    if kind.upper() != "LORA":
        raise AdapterError("adapter_unsupported", f"peft_type {kind!r} is not supported: expected 'LORA'")
    _refuse_variants(fields)
    budget = PatternBudget()
    base_model = fields.get("base_model_name_or_path")
    description = fields.get("description")
    return LoraSettings(
        rank=_positive_int(fields.get("r"), "r"),
        alpha=_finite(fields.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(fields, "use_rslora"),
        rank_pattern=_table(fields, "rank_pattern", _positive_int, budget),
        alpha_pattern=_table(fields, "alpha_pattern", _finite, budget),
        target_modules=_targets(fields, budget),
        exclude_modules=ModuleNames(budget, "exclude_modules", _names(fields, "exclude_modules") or ()),
        layers=_layers(fields.get("layers_to_transform")),
        layers_pattern=_layers_pattern(fields, budget),
        base_model=base_model if isinstance(base_model, str) else None,
        description=description if isinstance(description, str) else "",
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterError("adapter_incomplete", f"{path.name} is missing: expected PEFT's config beside the weights")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError("adapter_bad_config", f"{path.name} is too large: expected at most {MAX_CONFIG_BYTES} bytes")
    try:
        fields = json.loads(path.read_bytes())
        json.dumps(fields, ensure_ascii=False).encode()  # an escape may stand for half of a character
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            "adapter_bad_config", f"{path.name} is not valid JSON: expected one object in Unicode"
        ) from error
    if not isinstance(fields, dict):
        raise AdapterError("adapter_bad_config", f"{path.name} is not a JSON object: expected one object")
    return fields


def _refuse_variants(fields: Mapping[str, Any]) -> None:
    """Refuse everything that makes the adapter more than y += scale * B (A x) on plain linears.

    Fields that PEFT adds later are unknown here; it switches variants on by `use_*` flags and `*_config` objects.
    """
    for name, value in fields.items():
        if not value:
            continue
        if name in _UNSUPPORTED:
            raise AdapterError(
                "adapter_unsupported",
                f"{name} is set, but there is no support for {_UNSUPPORTED[name]}: expected plain LoRA",
            )
        if name not in _HARMLESS and (name.startswith("use_") or name.endswith("_config")):
            raise AdapterError("adapter_unsupported", f"{name[:80]} is set, but is not known: expected plain LoRA")
    bias = fields.get("bias")
    if bias not in (None, "none"):
        raise AdapterError("adapter_unsupported", f"bias {_shown(bias)} is not supported: expected 'none'")
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise AdapterError(
            "adapter_unsupported",
            f"init_lora_weights {init!r} changes the base weights: expected an adapter converted to plain LoRA, "
            "which PEFT saves given path_initial_model_for_weight_conversion",
        )
    listed = fields.get("target_modules")
    for target in listed if isinstance(listed, list) else ():
        if isinstance(target, str) and target.rpartition(".")[2] in _OUTSIDE:
            raise AdapterError(
                "adapter_unsupported",
                f"target_modules names {target!r}, but embeddings and the output head are not supported: "
                "expected linears of the decoder's layers",
            )


def _targets(fields: Mapping[str, Any], budget: PatternBudget) -> ModuleNames:
    names = _names(fields, "target_modules")
    if names is None:
        raise _bad("target_modules", None, "a list of module names, a regular expression or 'all-linear'")
    if isinstance(names, str) and names.lower() == "all-linear":
        names = ".*"
    return ModuleNames(budget, "target_modules", names)


def _layers_pattern(fields: Mapping[str, Any], budget: PatternBudget) -> Sequence[Expression]:
    """Patterns whose group `index` is the layer; by default the first number that is a name of its own."""
    names = _names(fields, "layers_pattern") or ()
    suffix = r"\.(?P<index>\d+)\..*"
    if not names:
        return [budget.compile("layers_pattern", r".*?\.[^.]*", suffix=suffix)]
    parts = (names,) if isinstance(names, str) else names
    return [budget.compile("layers_pattern", part, r"(?:^|.*?\.)", suffix) for part in parts]


def _typed(fields: Mapping[str, Any], name: str, kind: type, expected: str) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind):
        raise _bad(name, value, expected)
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _bad(name, value, "true or false")
    return bool(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive_int(value: Any, name: str) -> int:
    if not _is_int(value) or not 1 <= value <= _MAX_RANK:
        raise _bad(name, value, "a positive integer of at most 32 bits")
    return int(value)


def _finite(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _MAX_ALPHA:
        raise _bad(name, value, "a finite number")
    return float(value) + 0.0  # one zero: the other's alpha would give the same adapter another digest


def _table(
    fields: Mapping[str, Any], name: str, read: Callable[[Any, str], Number], budget: PatternBudget
) -> PatternTable[Number]:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise _bad(name, value, "an object of patterns and values")
    items = ((key, read(item, f"{name}[{_shown(key)}]")) for key, item in (value or {}).items())
    return PatternTable(budget, name, items)


def _layers(value: Any) -> frozenset[int]:
    layers = [value] if _is_int(value) else value or []
    if not isinstance(layers, list) or not all(map(_is_int, layers)):
        raise _bad("layers_to_transform", value, "a layer index or a list of them")
    return frozenset(layers)


def _names(fields: Mapping[str, Any], name: str) -> str | tuple[str, ...] | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _bad(name, value, "a list of names or one regular expression")
    return tuple(value)


def _bad(name: str, value: object, expected: str) -> AdapterError:
    return AdapterError("adapter_bad_config", f"{name} is {_shown(value)}: expected {expected}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
