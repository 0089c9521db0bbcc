"""How the memory of a device is shared out among keys and values, rank pages, and what a step needs while it runs."""

from dataclasses import dataclass

import torch

from adapters_store.types import GROUPS
from kernels.gate_rows import MASK_BITS
from server.engine.config import GIB, EngineConfig
from server.engine.gates import GateShape
from server.engine.scoring import SCORED_ROWS
from server.model.config import ModelConfig, ModelError

CPU_KV_MEMORY = 2 * GIB
CPU_PAGE_MEMORY = 1 * GIB
CUDA_SHARE = 0.9
CUDA_PAGE_SHARE = 0.15
FIXED_WORKSPACE = GIB // 2
"""cuBLAS's workspaces, compiled kernels, metadata, and what the allocator rounds up."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for keys and values, for rank pages, for everything that lives no longer than a step, and for gates."""

    kv: int
    pages: int
    workspace: int
    gates: int = 0


def plan_memory(config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> MemoryPlan:
    """What the settings say; on CUDA, sizes that they leave open share what is free once the weights are loaded.

    Raises ModelError where they do not fit.
    """
    if device.type != "cuda":
        return MemoryPlan(config.kv_memory or CPU_KV_MEMORY, config.page_memory or CPU_PAGE_MEMORY, 0)
    workspace = workspace_bytes(model, dtype, config.max_num_seqs, config.max_batch_tokens)
    if config.prompt_routers is not None:
        workspace += layered_bytes(model, dtype, config.max_layered_tokens)
    slots = gate_shape(config)
    gates = slots.num_bytes(model.linear_shape, dtype.itemsize) if slots is not None else 0
    free = int((torch.cuda.mem_get_info(device)[0] - workspace - gates) * CUDA_SHARE)
    pages = config.page_memory or int((free - (config.kv_memory or 0)) * CUDA_PAGE_SHARE)
    kv = config.kv_memory or free - pages
    if kv <= 0 or pages <= 0 or kv + pages > free:
        raise ModelError(
            f"{kv:,} bytes of KV memory and {pages:,} of page memory do not fit: {max(free, 0):,} bytes are free beside"
            f" the weights, a workspace of {workspace:,} and gates of {gates:,}"
        )
    return MemoryPlan(kv, pages, workspace, gates)


def gate_shape(config: EngineConfig) -> GateShape | None:
    """The slots that the settings ask for, with room for a power of two of gates as the kernels need it.

    Raises ModelError where they make no sense.
    """
    if config.gates is None or not config.gate_slots:
        return None
    slots, gates = config.gate_slots, config.gates_per_slot
    if slots < 0 or gates < 1:
        raise ModelError(f"gate_slots is {slots} and gates_per_slot {gates}, expected at least 0 and 1")
    return GateShape(slots, max(MASK_BITS, 1 << (gates - 1).bit_length()))


def workspace_bytes(model: ModelConfig, dtype: torch.dtype, max_num_seqs: int, max_batch_tokens: int) -> int:
    """Activations of the largest step, once for captured graphs and once for steps without, and the sampler's copies.

    At most the output of a group of linears, its delta and the product after it are alive beside the residual stream.
    """
    shape = model.linear_shape
    widest = max(sum(shape.group_outputs(group)) for group in GROUPS)
    activations = max_batch_tokens * (3 * widest + 4 * model.hidden_size) * dtype.itemsize
    rows = max(max_num_seqs, SCORED_ROWS)
    sampler = rows * model.vocab_size * (3 * dtype.itemsize + 3 * 4 + 3 * 8)
    return 2 * activations + sampler + FIXED_WORKSPACE


def layered_bytes(model: ModelConfig, dtype: torch.dtype, max_layered_tokens: int) -> int:
    """States of a prompt between two layers, and a copy of them for the router that reads them."""
    return 3 * max_layered_tokens * model.hidden_size * dtype.itemsize
