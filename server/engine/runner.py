"""The model with its memory: runs one batch and returns logits."""

import torch

from adapters_store.pages import plan_pages
from adapters_store.pool import PagePool
from server.engine.config import GIB, EngineConfig
from server.model.config import ModelConfig, ModelError
from server.model.decoder import Decoder, ForwardBatch

KvCache = list[tuple[torch.Tensor, torch.Tensor]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU_KV_MEMORY = 2 * GIB
CPU_PAGE_MEMORY = 1 * GIB
CUDA_SHARE = 0.9
CUDA_PAGE_SHARE = 0.15


class Runner:
    """Weights, KV cache and rank pages on one device, each as large as planned, and the forward pass."""

    def __init__(self, config: EngineConfig) -> None:
        self.model = ModelConfig.from_folder(config.model)
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.device, self.model)
        self.decoder = Decoder.from_folder(config.model, self.device, self.dtype)
        kv_memory, page_memory = self._plan_memory(config)
        self.max_model_len = self._max_model_len(config)
        self.num_blocks = kv_memory // self.block_bytes(config.block_size)
        longest = -(-self.max_model_len // config.block_size)
        if self.num_blocks < longest:
            needed = longest * self.block_bytes(config.block_size)
            raise ModelError(
                f"{kv_memory:,} bytes of KV memory hold {self.num_blocks * config.block_size} tokens, fewer than the"
                f" context of {self.max_model_len}: give at least {needed:,} bytes or a smaller max_model_len"
            )
        shape = self.model.linear_shape
        num_pages = plan_pages(shape, page_memory, self.dtype.itemsize)
        self.pool = PagePool(shape, num_pages, self.device, self.dtype)
        self.kv_cache = self._allocate_kv(config.block_size)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits of `batch.logit_rows`: (rows, vocabulary) float32."""
        return self.decoder.forward(batch, self.kv_cache, self.pool.tensors)

    def block_bytes(self, block_size: int) -> int:
        """Bytes of keys and values of one block over all layers."""
        per_token = 2 * self.model.num_layers * self.model.num_kv_heads * self.model.head_dim
        return block_size * per_token * self.dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.kv_cache)

    def _allocate_kv(self, block_size: int) -> KvCache:
        shape = (self.num_blocks, block_size, self.model.num_kv_heads, self.model.head_dim)

        def cache() -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return [(cache(), cache()) for _ in range(self.model.num_layers)]

    def _plan_memory(self, config: EngineConfig) -> tuple[int, int]:
        """Bytes for KV and for rank pages. On CUDA `auto` shares what is free after the weights."""
        if self.device.type != "cuda":
            return config.kv_memory or CPU_KV_MEMORY, config.page_memory or CPU_PAGE_MEMORY
        free = int(torch.cuda.mem_get_info(self.device)[0] * CUDA_SHARE)
        pages = config.page_memory or int(free * CUDA_PAGE_SHARE)
        return config.kv_memory or free - pages, pages

    def _max_model_len(self, config: EngineConfig) -> int:
        longest = self.model.max_position_embeddings
        if config.max_model_len is None:
            return longest
        if not 1 <= config.max_model_len <= longest:
            raise ModelError(f"max_model_len is {config.max_model_len}, but the model's context is {longest} tokens")
        return config.max_model_len


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA when there is a GPU. Raises ModelError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {name} was asked for, but no CUDA device is available")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, model: ModelConfig) -> torch.dtype:
    """`auto`: float32 on a CPU, else the checkpoint's own (bfloat16 for float16). Raises ModelError for others."""
    if name == "auto":
        name = "float32" if device.type == "cpu" or model.dtype == "float32" else "bfloat16"
    if name not in DTYPES:
        raise ModelError(f"dtype {name} is not supported, expected one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]
