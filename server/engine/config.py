"""What an engine is started with, what it says of itself, and what it counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

GIB = 1 << 30
MOST_BATCH_TOKENS = (1 << 16) - 1
"""Rows of a step: what the second dimension of a kernel's grid can have."""


class RequestError(ValueError):
    """A request that the engine refuses. `param` names the offending field, `code` the kind of refusal."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine. Memory sizes are bytes; None chooses by device. `model` is a local folder.

    `device` is "auto", "cpu" or "cuda"; "cuda:1" is the second GPU, "auto:1" that one or, without any, the CPU.
    `max_batch_tokens` bounds the token rows of one step, and so how long decoding rows wait for a chunk of a prompt.
    `backend` is "auto", or the name of the kernels' backend. `load_format` "random" takes config.json alone and makes
    weights of `seed`, for measuring. `cuda_graphs` "eager" captures none, "lazy" only what is needed, when it is.
    `kernel_cache`: folder of compiled kernels, which makes later starts fast; None: Triton's own. `load_threads` read
    and pack adapters beside the steps. `gates`: "module:class" of the `GateFactory` for token-level routers,
    `prompt_routers` of the `PromptRouterFactory`; None: such requests are refused. Where steps are captured,
    `gate_slots` token-level routers run at a time, with up to `gates_per_slot` gates a linear each; others wait.
    `grammar_memory` is for compiled constraints that no request uses at the moment, `mask_threads` compute their masks.
    A prompt that is decided layer by layer may have `max_layered_tokens`, whose states are kept between its steps.
    `log_format` ("text", "json") and `log_level` are for an engine in a process of its own.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    max_num_seqs: int = 64
    max_batch_tokens: int = 512
    max_model_len: int | None = None
    kv_memory: int | None = None
    page_memory: int | None = None
    host_memory: int = 4 * GIB
    block_size: int = 16
    prefix_cache: bool = True
    num_threads: int | None = None
    backend: str = "auto"
    load_format: str = "safetensors"
    seed: int = 0
    cuda_graphs: str = "capture"
    kernel_cache: str | None = None
    load_threads: int = 2
    gates: str | None = None
    gate_slots: int = 4
    gates_per_slot: int = 64
    prompt_routers: str | None = None
    grammar_memory: int = GIB // 4
    mask_threads: int | None = None
    max_layered_tokens: int = 4096
    log_format: str = "text"
    log_level: str = "info"

    def shared_out(self, engines: int, cores: int) -> "tuple[EngineConfig, ...]":
        """One for each of several engines on one machine of so many cores.

        Engine i gets the i-th GPU, where GPUs are used. Threads and host memory are those of all engines together;
        memory for KV and pages is each one's own, as is its device.
        """
        if engines == 1:
            return (self,)
        threads = max(1, (self.num_threads or cores) // engines)
        shared = replace(self, num_threads=threads, host_memory=self.host_memory // engines)
        if self.device == "cpu":
            return (shared,) * engines
        return tuple(replace(shared, device=f"{self.device}:{number}") for number in range(engines))


@dataclass(frozen=True)
class EngineInfo:
    """What the front end needs to know of a started engine. `memory` is bytes by kind: weights, kv, pages, gates,
    and the workspace that steps are planned to need on a GPU."""

    model_fingerprint: str
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    num_pages: Mapping[str, int]
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    memory: Mapping[str, int]


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. Counters (tokens queried and hit in the prefix cache, preemptions, loads, evictions) never fall.

    `steps` are (seconds, token rows) of each step since the snapshot before, `adapter_reads` the seconds that each read
    of an adapter from disk took; adapters are given by digest. Requests whose adapters are being read count as waiting.
    `host_shrinks` counts how often host memory was taken back because the machine's was short.
    """

    running: int = 0
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_blocks: int = 0
    pages: Mapping[str, int] = field(default_factory=dict)
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    adapter_reads: tuple[float, ...] = ()
    host_evictions: int = 0
    host_bytes: int = 0
    host_budget: int = 0
    host_shrinks: int = 0
    adapters_host: int = 0
    adapters_device: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    steps: tuple[tuple[float, int], ...] = ()
