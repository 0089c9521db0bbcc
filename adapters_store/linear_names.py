"""Which linear each tensor of an adapter belongs to, by PEFT's names, and whether it fits there."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from adapters_store.peft_config import LoraSettings, ModuleSettings
from adapters_store.safetensors_file import DTYPES, TensorHeader
from adapters_store.types import TARGETS, AdapterError, AdapterLimits, LinearShape

_BLOCKS = {target: "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for target in TARGETS}
_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<block>self_attn|mlp)\.(?P<target>\w+)"
    r"\.lora_(?P<factor>[AB])(?:\.default)?\.weight"
)

Module = tuple[int, str]
"""(layer, target)"""


def module_path(layer: int, target: str) -> str:
    """The linear's name inside the base model."""
    return f"model.layers.{layer}.{_BLOCKS[target]}.{target}"


def map_tensors(
    headers: Sequence[TensorHeader], settings: LoraSettings, shape: LinearShape
) -> dict[Module, tuple[TensorHeader, TensorHeader]]:
    """The A and B of every module, in order of (layer, target). Raises AdapterError for what is no plain LoRA."""
    found: dict[Module, dict[str, TensorHeader]] = defaultdict(dict)
    strangers: list[str] = []
    for head in headers:
        _refuse_by_name(head.name)
        match = _TENSOR.fullmatch(head.name)
        layer = int(match["layer"]) if match else 0
        if not match or _BLOCKS.get(match["target"]) != match["block"] or layer >= shape.num_layers:
            strangers.append(head.name)
            continue
        factors = found[layer, match["target"]]
        if match["factor"] in factors:
            raise AdapterError("adapter_unknown_tensor", f"tensor {head.name} comes twice: expected one per factor")
        factors[match["factor"]] = head
    if not found:
        example = f", found {strangers[0]!r}" if strangers else ", found no tensor"
        raise AdapterError(
            "adapter_touches_no_module",
            f"no linear of the served model is touched: expected {_expected(shape)}{example}",
        )
    if strangers:
        raise AdapterError(
            "adapter_unknown_tensor",
            f"tensor {strangers[0]!r} fits no linear of the served model: expected {_expected(shape)}",
        )
    return {module: _pair(module, factors, settings) for module, factors in sorted(found.items())}


def _refuse_by_name(name: str) -> None:
    parts = name.split(".")
    for part in ("embed_tokens", "lm_head"):
        if part in parts:
            raise AdapterError(
                "adapter_unsupported",
                f"tensor {name!r} adapts {part}, which is not supported: expected linears of the decoder's layers",
            )
    if "lora_magnitude_vector" in parts:
        raise AdapterError(
            "adapter_unsupported", f"tensor {name!r} belongs to DoRA, which is not supported: expected plain LoRA"
        )


def _expected(shape: LinearShape) -> str:
    last = module_path(shape.num_layers - 1, "down_proj")
    return f"base_model.model.{module_path(0, 'q_proj')}.lora_A.weight to base_model.model.{last}.lora_B.weight"


def _pair(
    module: Module, factors: Mapping[str, TensorHeader], settings: LoraSettings
) -> tuple[TensorHeader, TensorHeader]:
    for factor, other in (("A", "B"), ("B", "A")):
        if factor not in factors:
            raise AdapterError(
                "adapter_incomplete", f"tensor {factors[other].name!r} stands alone: expected its lora_{factor} too"
            )
    if not settings.targets(module_path(*module)):
        raise AdapterError(
            "adapter_bad_config",
            f"tensor {factors['A'].name!r} is outside of the config's target_modules, layers_to_transform and "
            "exclude_modules: expected tensors and config to agree",
        )
    for head in factors.values():
        if head.dtype not in DTYPES:
            raise AdapterError(
                "adapter_unsupported",
                f"tensor {head.name!r} has dtype {head.dtype}: expected one of {', '.join(DTYPES)}",
            )
    return factors["A"], factors["B"]


def check_ranks(loras: Mapping[Module, ModuleSettings], limits: AdapterLimits) -> None:
    """Raise AdapterError for the first rank that is too large."""
    for module, lora in loras.items():
        if lora.rank > limits.max_rank:
            raise AdapterError(
                "adapter_unsupported",
                f"rank {lora.rank} of {module_path(*module)} is not supported: expected at most {limits.max_rank}",
            )


def check_shapes(
    modules: Mapping[Module, tuple[TensorHeader, TensorHeader]],
    loras: Mapping[Module, ModuleSettings],
    shape: LinearShape,
) -> None:
    """Raise for the first tensor that does not fit; where every layer's features differ, it is another base model."""
    misfits: list[tuple[TensorHeader, tuple[int, int], bool]] = []
    foreign_layers: set[int] = set()
    for (layer, target), (a, b) in modules.items():
        rank, inputs, outputs = loras[layer, target].rank, shape.inputs[target], shape.outputs[target]
        factors = ((a, (rank, inputs), a.shape[1:] != (inputs,)), (b, (outputs, rank), b.shape[:1] != (outputs,)))
        for head, expected, foreign in factors:
            if head.shape != expected:
                misfits.append((head, expected, foreign))
            if foreign:
                foreign_layers.add(layer)
    if not misfits:
        return
    if foreign_layers == {layer for layer, _ in modules}:
        head, expected, _ = next(misfit for misfit in misfits if misfit[2])
        raise AdapterError(
            "adapter_wrong_base",
            f"tensor {head.name!r} has shape {list(head.shape)} and no layer fits the served model: "
            f"expected {list(expected)}",
        )
    head, expected, _ = misfits[0]
    raise AdapterError(
        "adapter_shape_mismatch", f"tensor {head.name!r} has shape {list(head.shape)}: expected {list(expected)}"
    )
