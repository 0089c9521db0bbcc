"""The model with its memory: launches steps, and gives back the tokens that they yield."""

import logging
import time
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field
from functools import partial

import torch

from adapters_store.loader import Loader
from adapters_store.pages import plan_pages
from adapters_store.pool import PagePool
from kernels.ops import select_ops
from server.engine.config import MOST_BATCH_TOKENS, EngineConfig
from server.engine.gate_bank import GateBank
from server.engine.gate_slots import GateSlots
from server.engine.gates import Shares, SlotMemory, gate_factory
from server.engine.layered import LayeredPrompt, prompt_parts
from server.engine.memory import gate_shape, plan_memory
from server.engine.plan import Chunk, LayerRun
from server.engine.pooling import Pooled
from server.engine.prompt_reading import verdicts
from server.engine.prompt_routers import Verdict, prompt_router_factory
from server.engine.sampler import Sampled, sample
from server.engine.scoring import Scores
from server.engine.sequence import Sequence, TokenLogprobs
from server.engine.steps import Computed, EagerSteps, Steps
from server.model.config import ModelConfig, ModelError
from server.model.decoder import Decoder, KvCache
from server.model.weights import load_weights, random_weights

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOAD_FORMATS = ("safetensors", "random")
GRAPH_MODES = ("capture", "lazy", "eager")


@dataclass(eq=False)
class Launched:
    """A step under way: its chunks, what is computed of them, and, once that is chosen, copies to the host.

    `sequences` are those whose chunk yields a token, `indices` that token's place in the output. Those that are `late`
    yield none after all, since their masks were not there. `advanced`: the masks behind its tokens are being computed.
    `found`: what `wait` has read.
    """

    chunks: list[Chunk]
    computed: Computed
    sequences: list[Sequence]
    indices: list[int]
    verdicts: ReadOnlyList[tuple[Sequence, Verdict]]
    late: set[Sequence] = field(default_factory=set)
    advanced: bool = False
    computing: torch.cuda.Event | None = None
    sampled: Sampled | None = None
    done: torch.cuda.Event | None = None
    routed: Shares | None = None
    scores: Scores | None = None
    pooled: Pooled | None = None
    found: tuple[list[int | None], list[TokenLogprobs | None]] | None = None

    def running(self) -> bool:
        """Whether the device still runs the model. Known of steps with constrained rows."""
        return self.computing is not None and not self.computing.query()

    @property
    def ended(self) -> bool:
        """Whether its tokens, which have been chosen, can be read without waiting."""
        return self.done is None or self.done.query()

    def wait(self) -> tuple[list[int | None], list[TokenLogprobs | None]]:
        """The tokens and log-probabilities of the chunks that yield one, when the step is done."""
        assert self.sampled is not None, "the tokens have not been chosen"
        if self.found is None:
            if self.done is not None:
                self.done.synchronize()
            self.found = self.sampled.read()
        return self.found

    def shares(self) -> list[tuple[float, ...]]:
        """`Output.shares` by chunk, after `wait`."""
        return [()] * len(self.chunks) if self.routed is None else self.routed.read()

    def prompt_logprobs(self) -> dict[int, tuple[TokenLogprobs, ...] | None]:
        """`Output.prompt_logprobs` by the index of a chunk that has some, after `wait`; None: not finite."""
        return {} if self.scores is None else self.scores.read()

    def pools(self) -> dict[int, bytes | None]:
        """`Output.pooled` by the index of a chunk that has some, after `wait`; None: not finite."""
        return {} if self.pooled is None else self.pooled.read()


class Runner:
    """Weights, KV cache and rank pages on one device, each as large as planned, and the steps that use them."""

    def __init__(self, config: EngineConfig) -> None:
        if not config.max_num_seqs <= config.max_batch_tokens <= MOST_BATCH_TOKENS:
            raise ModelError(
                f"max_batch_tokens is {config.max_batch_tokens}, expected max_num_seqs ({config.max_num_seqs}) to"
                f" {MOST_BATCH_TOKENS}"
            )
        self.model = ModelConfig.from_folder(config.model)
        self.device = choose_device(config.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = choose_dtype(config.dtype, self.device, self.model)
        started = time.perf_counter()
        self.decoder = self._load(config)
        logger.info(
            "%s GB of weights on %s in %.1f s",
            _gigabytes(self.weight_bytes),
            self.device,
            time.perf_counter() - started,
        )
        plan = plan_memory(config, self.model, self.device, self.dtype)
        self.max_model_len = self._max_model_len(config)
        self.num_blocks = plan.kv // self.block_bytes(config.block_size)
        longest = -(-self.max_model_len // config.block_size)
        if self.num_blocks < longest:
            needed = longest * self.block_bytes(config.block_size)
            raise ModelError(
                f"{plan.kv:,} bytes of KV memory hold {self.num_blocks * config.block_size} tokens, fewer than the"
                f" context of {self.max_model_len}: give at least {needed:,} bytes or a smaller max_model_len"
            )
        shape = self.model.linear_shape
        num_pages = plan_pages(shape, plan.pages, self.dtype.itemsize)
        self.pool = PagePool(shape, num_pages, self.device, self.dtype)
        self.kv_cache = self._allocate_kv(config.block_size)
        self.workspace_bytes = plan.workspace
        self.gates = gate_factory(config.gates, shape, self.device, self.dtype) if config.gates else None
        self.slots = self._make_slots(config)
        self.prompt_routers = (
            prompt_router_factory(config.prompt_routers, shape, self.device, self.dtype)
            if config.prompt_routers
            else None
        )
        logger.info(
            "%s GB for the keys and values of %d tokens, %s GB for %d rank pages of every group of linears",
            *(_gigabytes(self.kv_bytes), self.num_blocks * config.block_size),
            *(_gigabytes(self.pool.num_bytes), min(self.pool.num_pages.values())),
        )
        self.steps = self._make_steps(config)
        self.part_tokens = config.max_batch_tokens
        self._layered: tuple[Sequence, LayeredPrompt] | None = None  # between two of its layers
        none = torch.empty(0, self.model.vocab_size, device=self.device)
        self._nothing = Computed(none, torch.empty(0, dtype=torch.int64, device=self.device), None)

    @property
    def lookahead(self) -> bool:
        return self.steps.lookahead

    def launch(self, chunks: list[Chunk], layers: LayerRun | None = None) -> Launched:
        """Start a step, which `choose` completes. With `lookahead`, the next one may be launched as soon as that is
        done, before its tokens have been waited for."""
        decided = [] if layers is None else self._run_layers(layers)
        computed = self.steps.launch(chunks) if chunks else self._nothing
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        indices = [sequence.num_sampled for sequence in sequences]
        launched = Launched(chunks, computed, sequences, indices, [*decided, *verdicts(chunks)])
        if self.device.type == "cuda" and any(sequence.matching is not None for sequence in sequences):
            launched.computing = torch.cuda.Event()
            launched.computing.record()
        for row, sequence in enumerate(sequences):
            sequence.sampled_row = row
        return launched

    def choose(self, launched: Launched, eos_token_ids: frozenset[int]) -> None:
        """Choose the tokens of the last launch, of which nothing else has been chosen."""
        logits, greedy, routed, scores, pooled = launched.computed
        sampled = sample(logits, launched.sequences, eos_token_ids, greedy, launched.indices, self.decoder.ops)
        if sampled.tokens is not greedy:
            self.steps.remember(sampled.tokens)
        if self.device.type == "cuda":
            sampled = sampled.to_host()
            routed = None if routed is None else routed.to_host()
            scores = None if scores is None else scores.to_host()
            pooled = None if pooled is None else pooled.to_host()
            launched.verdicts = [(sequence, verdict.to_host()) for sequence, verdict in launched.verdicts]
            launched.done = torch.cuda.Event()
            launched.done.record()
        launched.sampled, launched.routed, launched.scores, launched.pooled = sampled, routed, scores, pooled

    def _run_layers(self, layers: LayerRun) -> list[tuple[Sequence, Verdict]]:
        sequence = layers.sequence
        if not layers.start:
            parts = self.steps.batches(prompt_parts(sequence, self.part_tokens))
            self._layered = sequence, LayeredPrompt(sequence, self.decoder, parts)
        assert self._layered is not None
        owner, prompt = self._layered
        assert owner is sequence, "another prompt is between its layers"
        verdict = prompt.run(layers, self.kv_cache, self.pool.tensors)
        if verdict is None:
            return []
        self._layered = None
        return [(sequence, verdict)]

    def block_bytes(self, block_size: int) -> int:
        """Bytes of keys and values of one block over all layers."""
        per_token = 2 * self.model.num_layers * self.model.num_kv_heads * self.model.head_dim
        return block_size * per_token * self.dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.kv_cache)

    def _load(self, config: EngineConfig) -> Decoder:
        backend = None if config.backend == "auto" else config.backend
        try:
            ops = select_ops(self.device, backend)
        except ValueError as error:
            raise ModelError(str(error)) from None
        if config.load_format not in LOAD_FORMATS:
            raise ModelError(f"load_format is {config.load_format!r}, expected one of {', '.join(LOAD_FORMATS)}")
        if config.load_format == "random":
            weights = random_weights(self.model, self.device, self.dtype, config.seed)
        else:
            weights = load_weights(config.model, self.model, self.device, self.dtype)
        self.weight_bytes = weights.num_bytes
        return Decoder(self.model, weights, ops)

    def gate_bank(self, loader: Loader, random_gates: int = 0) -> GateBank | None:
        """Where requests find the gates of their routers; None for an engine that has none.

        random_gates: for measuring, every router has so many, of random numbers.
        """
        factory = self.gates
        if factory is None or (self.slots is None and self.decoder.ops.captures):
            return None
        read = factory.read if self.slots is None else factory.read_for_slots
        if random_gates:
            read = partial(factory.random, random_gates)
        return GateBank(loader, read, slots=None if self.slots is None else GateSlots(self.slots))

    def _make_slots(self, config: EngineConfig) -> SlotMemory | None:
        slots = gate_shape(config)
        if self.gates is None or slots is None or not self.decoder.ops.captures:
            return None
        return self.gates.slots(slots)

    def _make_steps(self, config: EngineConfig) -> Steps:
        """Graphs for the Triton backend, which a plain CPU never imports; else one step after the other."""
        if config.cuda_graphs not in GRAPH_MODES:
            raise ModelError(f"cuda_graphs is {config.cuda_graphs!r}, expected one of {', '.join(GRAPH_MODES)}")
        pages = self.pool.tensors
        if not self.decoder.ops.captures:
            return EagerSteps(self.decoder, self.kv_cache, pages, config.block_size, self.gates)
        from server.engine.capacity import Capacities
        from server.engine.graphs import GraphSteps

        slots = None if self.slots is None else self.slots.shape
        capacities = Capacities(config.max_num_seqs, config.max_batch_tokens, slots)
        steps = GraphSteps(
            self.decoder,
            self.kv_cache,
            pages,
            capacities,
            block_size=config.block_size,
            max_model_len=self.max_model_len,
            use_graphs=config.cuda_graphs != "eager" and self.device.type == "cuda",
            gates=self.slots,
        )
        if steps.use_graphs and config.cuda_graphs == "capture":
            started = time.perf_counter()
            captured = steps.capture_common()
            logger.info("%d CUDA graphs captured in %.1f s", captured, time.perf_counter() - started)
        return steps

    def _allocate_kv(self, block_size: int) -> KvCache:
        shape = (self.num_blocks, block_size, self.model.num_kv_heads, self.model.head_dim)

        def cache() -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return [(cache(), cache()) for _ in range(self.model.num_layers)]

    def _max_model_len(self, config: EngineConfig) -> int:
        longest = self.model.max_position_embeddings
        if config.max_model_len is None:
            return longest
        if not 1 <= config.max_model_len <= longest:
            raise ModelError(f"max_model_len is {config.max_model_len}, but the model's context is {longest} tokens")
        return config.max_model_len


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}"


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA when there is a GPU; `auto:1` and `cuda:1` name which. Raises ModelError for what is not there."""
    kind, _, number = name.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind != "cuda":
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise ModelError(f"device {name} was asked for, but no CUDA device is available")
    if number and int(number) >= torch.cuda.device_count():
        raise ModelError(f"GPU {number} was asked for, but there are {torch.cuda.device_count()}, counted from 0")
    return torch.device("cuda", int(number) if number else torch.cuda.current_device())


def choose_dtype(name: str, device: torch.device, model: ModelConfig) -> torch.dtype:
    """`auto`: float32 on a CPU, else the checkpoint's own (bfloat16 for float16). Raises ModelError for others."""
    if name == "auto":
        name = "float32" if device.type == "cpu" or model.dtype == "float32" else "bfloat16"
    if name not in DTYPES:
        raise ModelError(f"dtype {name} is not supported, expected one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]
