"""The one form in which an adapter is stored, whoever registers it.

Adapters of equal digests share their files. What decides those must therefore be what decides the digest: a header
full of metadata, or a config that takes long to read, would be served to all who have the same weights.
"""

from pathlib import Path

from torch import Tensor

from adapters_store.blobs import disk_errors
from adapters_store.linear_names import Module
from adapters_store.peft_format import CONFIG_NAME, WEIGHTS_NAME, AdapterSummary, open_adapter
from adapters_store.peft_write import lora_config, tensor_name, write_json
from adapters_store.safetensors_file import TensorHeader, TensorWriter
from adapters_store.types import AdapterLimits, LinearShape


def write_stored(folder: Path, into: Path, shape: LinearShape, limits: AdapterLimits) -> AdapterSummary:
    """Check the adapter in `folder`, and write config and weights into the folder `into` as they are to be stored.

    They are a function of the digest, load in PEFT, and have the digest and the dtypes of the original. One factor is
    in memory at a time. Raises what `read_adapter` raises, and BlobUnavailable when the disk fails.
    """
    with open_adapter(folder, shape, limits) as opened:
        headers = [
            TensorHeader(tensor_name(module, factor), head.dtype, head.shape)
            for module, heads in opened.modules.items()
            for factor, head in zip("AB", heads, strict=True)
        ]
        with disk_errors():
            into.mkdir(parents=True, exist_ok=True)
            with TensorWriter(into / WEIGHTS_NAME, headers) as file:

                def keep(module: Module, factor: str, tensor: Tensor) -> None:
                    file.write(tensor_name(module, factor), tensor)

                digest = opened.read(keep)
            ranks = {module: lora.rank for module, lora in opened.loras.items()}
            alphas = {module: lora.alpha for module, lora in opened.loras.items()}
            write_json(into / CONFIG_NAME, lora_config(ranks, alphas, use_rslora=opened.settings.use_rslora))
        return opened.summary(folder, digest)
