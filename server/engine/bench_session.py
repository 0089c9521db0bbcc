"""The set-up of a benchmark: its settings, and the engine over a random model that its scenarios share."""

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from adapters_store.pages import page_bytes
from adapters_store.tiers import HostTier
from adapters_store.types import GROUPS, PAGE_RANK, TARGETS
from kernels.shapes import SHAPES, ModelShape
from server.engine import peers
from server.engine.adapters import EngineAdapters
from server.engine.bench_measure import serve
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.grammar_bank import open_bank
from server.engine.reads import start_loader
from server.engine.runner import Runner, choose_device, choose_dtype
from server.engine.workload import Lengths, SyntheticAdapters, Traffic, Workload, make_workload, write_config
from server.model.config import ModelConfig

BLOCK_SIZE = 16
GATES = "routing.token_router:TokenGateFactory"
"""A name, which the engine looks up: it knows no kind of router."""


@dataclass(frozen=True)
class Options:
    """Settings of a benchmark. `traffic` are labels of `workload.Traffic`; `longest` bounds prompts and outputs each.

    `seconds` is how long requests arrive in `latency` and `many_adapters`; `context` the mean in `decode`.
    """

    model: str = "8b"
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    repeats: int = 2
    traffic: tuple[str, ...] = ("0", "1", "8", "64", "mix3")
    gated: str = "top2of28"
    rows: tuple[int, ...] = (1, 8, 64)
    requests: int = 256
    concurrency: int = 64
    shortest: int = 8
    longest: int = 512
    context: int = 400
    steps: int = 64
    warm: int = 10
    profiled: int = 20
    rank: int = 16
    targets: tuple[str, ...] = TARGETS
    seconds: float = 15.0
    loads: tuple[float, ...] = (0.25, 0.5, 0.75)
    many: int = 1000
    device_adapters: int = 128
    max_batch_tokens: int | None = None
    backend: str = "auto"
    cuda_graphs: str = "capture"


@dataclass(frozen=True)
class Setup:
    """An engine: its rows, the adapters that fit its device pages, and the host's adapters.

    `targets` None are those of the options.
    """

    rows: int
    adapters: int
    targets: tuple[str, ...] | None = None
    num_sets: int = 1
    automatic: bool = False


@dataclass(eq=False)
class Session:
    """A random model and at most one engine over it at a time, kept as long as the same one is asked for."""

    options: Options
    say: Callable[[str], None]
    clock: Callable[[], float] = time.perf_counter
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shape: ModelShape = SHAPES[self.options.model]
        self._folder = tempfile.TemporaryDirectory()
        write_config(self.shape, self.folder)
        self.model = ModelConfig.from_folder(self._folder.name)
        self.device = choose_device(self.options.device)
        self.dtype = choose_dtype(self.options.dtype, self.device, self.model)
        self._setup: Setup | None = None
        self._engine: Engine | None = None
        self.adapters: SyntheticAdapters

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        self._folder.cleanup()

    @property
    def folder(self) -> Path:
        """Where the model is."""
        return Path(self._folder.name)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "cpu"

    @property
    def most_adapters(self) -> int:
        """Adapters of the traffic with most of them: as many have pages on the device."""
        return max(Traffic.parse(label).adapters for label in self.options.traffic)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of any scenario."""
        options = self.options
        decoded = options.warm + options.steps + options.profiled
        return min(self.shape.max_length, max(2 * options.longest, 3 * options.context // 2 + decoded + 64))

    def engine(self, setup: Setup) -> Engine:
        """The engine of `setup`, and its adapters in `self.adapters`."""
        if self._engine is None or self._setup != setup:
            self.close()
            started = self.clock()
            self._engine, self._setup = self._build(setup), setup
            self.say(f"engine of {setup.rows} rows and {setup.adapters} adapters: {self.clock() - started:.1f} s")
        return self._engine

    def close(self) -> None:
        """Give the engine's memory back."""
        self._engine = self._setup = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def workload(self, name: str, traffic: Traffic, lengths: Lengths, arrivals: list[float] | None = None) -> Workload:
        seed = self.options.seed
        mixes = traffic.mixes(len(lengths.prompts), self.adapters, seed)
        return make_workload(
            f"{name}-{traffic.label}",
            lengths,
            mixes,
            self.adapters,
            vocab_size=self.shape.vocab_size,
            seed=seed,
            arrivals=arrivals,
            num_adapters=traffic.adapters,
            gates=traffic.gates(self.adapters),
        )

    def lengths(self, count: int) -> Lengths:
        """Uniform lengths; those of the peers' workload have the peers' number of tokens."""
        options, standard = self.options, Options()
        same = (count, options.shortest, options.longest) == (standard.requests, standard.shortest, standard.longest)
        return Lengths.uniform(count, options.shortest, options.longest, options.seed, peers.TOTALS if same else None)

    def page_memory(self, adapters: int) -> int:
        """Bytes of the device pages of so many adapters in every group, at least one page."""
        pages = max(1, adapters * -(-self.options.rank // PAGE_RANK))
        return pages * sum(page_bytes(self.model.linear_shape, group, self.dtype.itemsize) for group in GROUPS)

    def kv_memory(self, rows: int) -> int:
        """Bytes of the KV of `rows` sequences of the greatest length: no run of ours preempts."""
        token = 2 * self.shape.num_layers * self.shape.num_kv_heads * self.shape.head_dim * self.dtype.itemsize
        return (rows + 1) * -(-self.longest // BLOCK_SIZE) * BLOCK_SIZE * token

    def _build(self, setup: Setup) -> Engine:
        options = self.options
        config = EngineConfig(
            self._folder.name,
            device=options.device,
            dtype=options.dtype,
            max_num_seqs=setup.rows,
            max_batch_tokens=max(options.max_batch_tokens or EngineConfig.max_batch_tokens, setup.rows),
            max_model_len=None if setup.automatic else self.longest,
            kv_memory=None if setup.automatic else self.kv_memory(setup.rows),
            page_memory=None if setup.automatic else self.page_memory(setup.adapters),
            block_size=BLOCK_SIZE,
            prefix_cache=False,
            backend=options.backend,
            load_format="random",
            cuda_graphs=options.cuda_graphs,
            seed=options.seed,
            gates=GATES if any(Traffic.parse(label).top_k for label in options.traffic) else None,
        )
        runner = Runner(config)
        self.adapters = SyntheticAdapters(
            self.model.linear_shape,
            rank=options.rank,
            targets=setup.targets or options.targets,
            dtype=self.dtype,
            seed=options.seed,
            num_sets=setup.num_sets,
            pinned=self.cuda,
        )
        host = HostTier(self.adapters.num_bytes * (max(setup.adapters, options.many) + 1))
        loader = start_loader(config.load_threads, runner.device)
        adapters = EngineAdapters(host, runner.pool, loader, self.adapters.read, self.clock)
        gates = runner.gate_bank(loader, random_gates=self.most_adapters)
        return Engine(config, runner, adapters, self.clock, gates, grammars=open_bank(config, runner.model))

    def saturating_rate(self, engine: Engine, traffic: Traffic) -> float:
        """Requests a second that `throughput` served; measured now, with half the requests, where that has not run."""
        if traffic.label not in self.rates:
            lengths = self.lengths(max(8, self.options.requests // 2))
            serve(engine, self.warm_up(traffic), self.clock)
            served = serve(engine, self.workload("saturate", traffic, lengths), self.clock)
            self.rates[traffic.label] = len(lengths.prompts) / served.elapsed
        return self.rates[traffic.label]

    def warm_up(self, traffic: Traffic) -> Workload:
        """Short answers to the first requests: adapters go to the device, kernels and graphs come into being."""
        lengths = self.lengths(self.options.requests).cut(self.options.concurrency, 48)
        return self.workload("warm", traffic, lengths)
