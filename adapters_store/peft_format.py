"""A PEFT LoRA folder on disk, checked against the served model before anything else sees it."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from adapters_store.model_card import read_description
from adapters_store.peft_config import LoraSettings, ModuleSettings, read_settings
from adapters_store.safetensors_file import DTYPES, MappedTensors, TensorHeader
from adapters_store.types import TARGETS, AdapterError, AdapterWeights, LinearShape, LoraPair

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MAX_WEIGHTS_BYTES = 2 << 30

_BLOCKS = {target: "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for target in TARGETS}
_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<block>self_attn|mlp)\.(?P<target>\w+)"
    r"\.lora_(?P<factor>[AB])(?:\.default)?\.weight"
)

Module = tuple[int, str]
"""(layer, target)"""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read: its weights, and what people want to know about it.

    `rank` is the largest of all modules, `alpha` the config's, `modules` the number of linears touched, `num_bytes` the
    size of their factors. `description` may be empty.
    """

    weights: AdapterWeights
    rank: int
    alpha: float
    targets: tuple[str, ...]
    modules: int
    num_bytes: int
    base_model: str | None
    description: str

    @property
    def digest(self) -> str:
        return self.weights.digest


@dataclass(frozen=True)
class _Opened:
    """An adapter's files, checked but for the values: the A and B of every module, in order of (layer, target)."""

    settings: LoraSettings
    modules: Mapping[Module, tuple[TensorHeader, TensorHeader]]
    loras: Mapping[Module, ModuleSettings]
    file: MappedTensors

    def pairs(self, tensor: Callable[[TensorHeader], torch.Tensor]) -> dict[Module, LoraPair]:
        pairs: dict[Module, LoraPair] = {}
        for module, heads in self.modules.items():
            a, b = map(tensor, heads)
            if a.dtype != b.dtype:
                dtype = torch.promote_types(a.dtype, b.dtype)
                a, b = a.to(dtype), b.to(dtype)
            pairs[module] = LoraPair(a, b, self.loras[module].scale)
        return pairs


def read_adapter(folder: Path, shape: LinearShape, max_bytes: int = MAX_WEIGHTS_BYTES) -> AdapterFile:
    """Read and check the adapter in `folder` for a model of the given shape; the tensors are copies in host memory.

    Every tensor must be half of a LoRA pair on a linear that the config targets. Modules that the config targets but
    the file lacks are not touched, as in PEFT, where their B would be zero. Raises AdapterError:
    `not_safetensors` (415), `adapter_too_large` (413), or (422) `adapter_incomplete`, `adapter_bad_config`,
    `adapter_unsupported`, `adapter_corrupt`, `adapter_touches_no_module`, `adapter_unknown_tensor`,
    `adapter_shape_mismatch`, `adapter_wrong_base`, `adapter_not_finite`.
    """
    with _open(folder, shape, max_bytes) as opened:
        heads = [head for pair in opened.modules.values() for head in pair]
        # The file is mapped; without the copy, whoever changes it would change the weights.
        return _assemble(folder, opened, {head.name: opened.file.tensor(head).clone() for head in heads})


@contextmanager
def mapped_weights(folder: Path, shape: LinearShape, digest: str) -> Iterator[AdapterWeights]:
    """The weights of a folder that is known to hold `digest`, without a copy and without a look at their values.

    They are the file's own bytes: use them inside the context only. Raises what `read_adapter` raises of names, shapes
    and the config.
    """
    with _open(folder, shape, MAX_WEIGHTS_BYTES) as opened:
        yield AdapterWeights(digest, opened.pairs(opened.file.tensor))


@contextmanager
def _open(folder: Path, shape: LinearShape, max_bytes: int) -> Iterator[_Opened]:
    path = folder / WEIGHTS_NAME
    try:
        _check_files(folder, path, max_bytes)
        settings = read_settings(folder / CONFIG_NAME)
        file = MappedTensors(path)
        modules = _map_tensors(file.headers, settings, shape)
        loras = {module: settings.of(module_path(*module)) for module in modules}
        _check_shapes(modules, loras, shape)
        yield _Opened(settings, modules, loras, file)
    except SafetensorError as error:
        raise AdapterError(
            "adapter_corrupt", f"{WEIGHTS_NAME} cannot be read: expected a complete safetensors file"
        ) from error
    except OSError as error:
        raise AdapterError(
            "adapter_corrupt", f"the adapter's files cannot be read ({error.strerror}): expected readable files"
        ) from error


def module_path(layer: int, target: str) -> str:
    """The linear's name inside the base model."""
    return f"model.layers.{layer}.{_BLOCKS[target]}.{target}"


def _check_files(folder: Path, path: Path, max_bytes: int) -> None:
    if not path.is_file():
        if (folder / PICKLE_NAME).is_file():
            raise AdapterError("not_safetensors", f"{PICKLE_NAME} is a pickle: expected {WEIGHTS_NAME}", 415)
        raise AdapterError("adapter_incomplete", f"{WEIGHTS_NAME} is missing: expected the weights beside the config")
    if path.stat().st_size > max_bytes:
        raise AdapterError(
            "adapter_too_large", f"{WEIGHTS_NAME} has {path.stat().st_size} bytes: expected at most {max_bytes}", 413
        )


def _map_tensors(
    headers: Sequence[TensorHeader], settings: LoraSettings, shape: LinearShape
) -> dict[Module, tuple[TensorHeader, TensorHeader]]:
    """The A and B of every module, in order of (layer, target)."""
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


def _check_shapes(
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


def _assemble(folder: Path, opened: _Opened, tensors: Mapping[str, torch.Tensor]) -> AdapterFile:
    settings = opened.settings
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError("adapter_not_finite", f"tensor {name!r} holds NaN or infinity: expected finite numbers")
    digest = _digest(settings.use_rslora, opened.modules, opened.loras, tensors)
    weights = AdapterWeights(digest, opened.pairs(lambda head: tensors[head.name]))
    return AdapterFile(
        weights=weights,
        rank=max(pair.rank for pair in weights.pairs.values()),
        alpha=settings.alpha,
        targets=tuple(sorted({target for _, target in weights.pairs})),
        modules=len(weights.pairs),
        num_bytes=weights.num_bytes,
        base_model=settings.base_model,
        description=read_description(folder) or settings.description,
    )


def _digest(
    use_rslora: bool,
    modules: Mapping[Module, tuple[TensorHeader, TensorHeader]],
    loras: Mapping[Module, ModuleSettings],
    tensors: Mapping[str, torch.Tensor],
) -> str:
    """sha256 over what the adapter computes: names of files, paths, dropout and spelling of the config do not count."""
    digest = hashlib.sha256()
    for module, heads in sorted(modules.items()):
        lora = loras[module]
        digest.update(f"|{module_path(*module)}|r={lora.rank}|alpha={lora.alpha.hex()}|rslora={use_rslora}".encode())
        for head in heads:
            digest.update(f"|{head.dtype}{list(head.shape)}|".encode())
            digest.update(tensors[head.name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
