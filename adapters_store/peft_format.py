"""A PEFT LoRA folder on disk, checked against the served model before anything else sees it."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from adapters_store.linear_names import Module, check_ranks, check_shapes, map_tensors, module_path
from adapters_store.model_card import read_description
from adapters_store.peft_config import LoraSettings, ModuleSettings, read_settings
from adapters_store.safetensors_file import DTYPES, MappedTensors, TensorHeader
from adapters_store.types import GROUP_OF, AdapterError, AdapterLimits, AdapterWeights, LinearShape, LoraPair

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MAX_WEIGHTS_BYTES = AdapterLimits.max_bytes

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class AdapterSummary:
    """What people want to know about an adapter: all but the last two follow from the digest.

    `rank` is the largest of all modules, `alpha` the most frequent one, `modules` the number of linears touched,
    `num_bytes` the size of their factors. `description` may be empty.
    """

    digest: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    modules: int
    num_bytes: int
    base_model: str | None
    description: str


@dataclass(frozen=True)
class AdapterFile(AdapterSummary):
    """An adapter as read, its weights in host memory."""

    weights: AdapterWeights


@dataclass(frozen=True)
class AdapterLayout:
    """What an adapter's headers say: rank and common dtype of each linear that it touches."""

    modules: Mapping[Module, tuple[int, torch.dtype]]

    @cached_property
    def group_ranks(self) -> dict[str, int]:
        """As `AdapterWeights.group_ranks`."""
        ranks: dict[str, int] = {}
        for (_, target), (rank, _) in self.modules.items():
            name = GROUP_OF[target].name
            ranks[name] = max(ranks.get(name, 0), rank)
        return ranks


Keep = Callable[[Module, str, torch.Tensor], None]
"""Called with a module, "A" or "B", and that factor."""


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter's files, checked but for the values: the A and B of every module, in order of (layer, target)."""

    settings: LoraSettings
    modules: Mapping[Module, tuple[TensorHeader, TensorHeader]]
    loras: Mapping[Module, ModuleSettings]
    file: MappedTensors

    def pairs(self, tensor: Callable[[TensorHeader], torch.Tensor]) -> dict[Module, LoraPair]:
        """Every module's pair, of tensors that are had by their headers."""
        pairs: dict[Module, LoraPair] = {}
        for module, heads in self.modules.items():
            a, b = map(tensor, heads)
            if a.dtype != b.dtype:
                dtype = torch.promote_types(a.dtype, b.dtype)
                a, b = a.to(dtype), b.to(dtype)
            pairs[module] = LoraPair(a, b, self.loras[module].scale)
        return pairs

    def read(self, keep: Keep) -> str:
        """Give every factor, a copy, to `keep`, and return the digest. Raises AdapterError `adapter_not_finite`.

        It is the sha256 over what the adapter computes: names of files, paths, dropout and spelling of the config do
        not count.
        """
        digest = hashlib.sha256()
        for module, heads in self.modules.items():
            lora, rslora = self.loras[module], self.settings.use_rslora
            digest.update(f"|{module_path(*module)}|r={lora.rank}|alpha={lora.alpha.hex()}|rslora={rslora}".encode())
            for factor, head in zip("AB", heads, strict=True):
                tensor = self.file.tensor(head).clone()  # the file is mapped: whoever changes it would change this
                if not torch.isfinite(tensor).all():
                    raise AdapterError(
                        "adapter_not_finite", f"tensor {head.name!r} holds NaN or infinity: expected finite numbers"
                    )
                digest.update(f"|{head.dtype}{list(head.shape)}|".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
                keep(module, factor, tensor)
        return digest.hexdigest()

    def summary(self, folder: Path, digest: str) -> AdapterSummary:
        """All that is known of the adapter, in `folder`, once its digest is."""
        heads = [head for pair in self.modules.values() for head in pair]
        return AdapterSummary(
            digest=digest,
            rank=max(lora.rank for lora in self.loras.values()),
            alpha=most_frequent([lora.alpha for lora in self.loras.values()]),
            targets=tuple(sorted({target for _, target in self.modules})),
            modules=len(self.modules),
            num_bytes=sum(math.prod(head.shape) * DTYPES[head.dtype].itemsize for head in heads),
            base_model=self.settings.base_model,
            description=read_description(folder) or self.settings.description,
        )


def read_adapter(folder: Path, shape: LinearShape, limits: AdapterLimits | None = None) -> AdapterFile:
    """Read and check the adapter in `folder` for a model of the given shape; the tensors are copies in host memory.

    Every tensor must be half of a LoRA pair on a linear that the config targets. Modules that the config targets but
    the file lacks are not touched, as in PEFT, where their B would be zero. Raises AdapterError:
    `not_safetensors` (415), `adapter_too_large` (413), or (422) `adapter_incomplete`, `adapter_bad_config`,
    `adapter_unsupported`, `adapter_corrupt`, `adapter_touches_no_module`, `adapter_unknown_tensor`,
    `adapter_shape_mismatch`, `adapter_wrong_base`, `adapter_not_finite`.
    """
    with open_adapter(folder, shape, limits or AdapterLimits()) as opened:
        tensors: dict[str, torch.Tensor] = {}

        def keep(module: Module, factor: str, tensor: torch.Tensor) -> None:
            tensors[opened.modules[module]["AB".index(factor)].name] = tensor

        digest = opened.read(keep)
        weights = AdapterWeights(digest, opened.pairs(lambda head: tensors[head.name]))
        return AdapterFile(**vars(opened.summary(folder, digest)), weights=weights)


def read_summary(folder: Path, shape: LinearShape, limits: AdapterLimits | None = None) -> AdapterSummary:
    """As `read_adapter`, with one factor in memory at a time."""
    with open_adapter(folder, shape, limits or AdapterLimits()) as opened:
        return opened.summary(folder, opened.read(lambda _module, _factor, _tensor: None))


def read_layout(folder: Path, shape: LinearShape) -> AdapterLayout:
    """The ranks of an adapter that was registered, read from its headers. Raises what `mapped_weights` raises."""
    with open_adapter(folder, shape) as opened:
        dtypes = {
            module: torch.promote_types(DTYPES[a.dtype], DTYPES[b.dtype]) for module, (a, b) in opened.modules.items()
        }
        return AdapterLayout({module: (lora.rank, dtypes[module]) for module, lora in opened.loras.items()})


@contextmanager
def mapped_weights(folder: Path, shape: LinearShape, digest: str) -> Iterator[AdapterWeights]:
    """The weights of a folder that is known to hold `digest`, without a copy and without a look at their values.

    They are the file's own bytes: use them inside the context only. Raises what `read_adapter` raises of names, shapes
    and the config.
    """
    with open_adapter(folder, shape) as opened:
        yield AdapterWeights(digest, opened.pairs(opened.file.tensor))


@contextmanager
def open_adapter(folder: Path, shape: LinearShape, limits: AdapterLimits | None = None) -> Iterator[OpenedAdapter]:
    """The adapter in `folder`, all checked but its values; of any size and rank without `limits`."""
    path = folder / WEIGHTS_NAME
    try:
        _check_files(folder, path, limits.max_bytes if limits else None)
        settings = read_settings(folder / CONFIG_NAME)
        file = MappedTensors(path)
        modules = map_tensors(file.headers, settings, shape)
        loras = {module: settings.of(module_path(*module)) for module in modules}
        if limits:
            check_ranks(loras, limits)
        check_shapes(modules, loras, shape)
        yield OpenedAdapter(settings, modules, loras, file)
    except SafetensorError as error:
        raise AdapterError(
            "adapter_corrupt", f"{WEIGHTS_NAME} cannot be read: expected a complete safetensors file"
        ) from error
    except OSError as error:
        raise AdapterError(
            "adapter_corrupt", f"the adapter's files cannot be read ({error.strerror}): expected readable files"
        ) from error


def most_frequent(values: Collection[Number]) -> Number:
    """The value that comes most often, the largest of several."""
    return max(Counter(values).items(), key=lambda item: (item[1], item[0]))[0]


def _check_files(folder: Path, path: Path, max_bytes: int | None) -> None:
    if not path.is_file():
        if (folder / PICKLE_NAME).is_file():
            raise AdapterError("not_safetensors", f"{PICKLE_NAME} is a pickle: expected {WEIGHTS_NAME}", 415)
        raise AdapterError("adapter_incomplete", f"{WEIGHTS_NAME} is missing: expected the weights beside the config")
    if max_bytes is not None and path.stat().st_size > max_bytes:
        raise AdapterError(
            "adapter_too_large", f"{WEIGHTS_NAME} has {path.stat().st_size} bytes: expected at most {max_bytes}", 413
        )
