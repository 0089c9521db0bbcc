"""The engine: requests in, one step at a time, outputs out. For use in-process; `loop.py` gives it a process.

engine = Engine.from_config(EngineConfig(model="path/to/folder"))
engine.add_request(Request("r1", prompt=(1, 2, 3), params=SamplingParams(max_tokens=8)))
while engine.has_work:
    for output in engine.step():
        ...
"""

import time
from collections.abc import Callable, Iterable

from adapters_store.tiers import HostTier, folder_reader
from server.engine.adapters import EngineAdapters
from server.engine.blocks import BlockPool
from server.engine.config import EngineConfig, EngineInfo, EngineStats, RequestError
from server.engine.runner import Launched, Runner
from server.engine.sampler import stop_ids
from server.engine.scheduler import Chunk, Scheduler
from server.engine.sequence import NOT_FINITE, FinishReason, Output, Request, Sequence, Timings, TokenLogprobs

Clock = Callable[[], float]


class Engine:
    """Continuous batching over one model. Not thread-safe. `waited`: seconds spent waiting for the device."""

    def __init__(self, config: EngineConfig, runner: Runner, adapters: EngineAdapters, clock: Clock) -> None:
        self.config = config
        self.runner = runner
        self.adapters = adapters
        self.clock = clock
        self.eos_token_ids = frozenset(runner.model.eos_token_ids)
        blocks = BlockPool(runner.num_blocks, config.block_size, config.prefix_cache)
        self.scheduler = Scheduler(
            blocks,
            adapters,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            clock=clock,
        )
        self.waited = 0.0
        self._sequences: dict[str, Sequence] = {}
        self._endings: list[Output] = []
        self._steps: list[tuple[float, int]] = []
        self._launched: Launched | None = None

    @classmethod
    def from_config(cls, config: EngineConfig, clock: Clock = time.monotonic) -> "Engine":
        """Load the model and allocate its memory. Raises ModelError with one clear sentence if that cannot be done."""
        runner = Runner(config)
        host = HostTier(config.host_memory, folder_reader(runner.model.linear_shape))
        return cls(config, runner, EngineAdapters(host, runner.pool, clock), clock)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._endings or self._launched)

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises RequestError for what can never be served, AdapterError for an adapter that cannot be read.
        """
        if request.id in self._sequences:
            raise RequestError(f"request {request.id} is already running", param="id")
        self._check_tokens(request)
        if request.mix.entries:
            self.adapters.check(request)
        sequence = Sequence.of(request, arrival=self.clock())
        self._sequences[request.id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown or ended ones are left alone. Its ending comes with the next step."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)
            self._endings.append(Output(request_id, finish_reason=FinishReason.ABORT))

    def step(self) -> list[Output]:
        """Schedule, build, run, commit. Returns what became of every sequence that moved or ended.

        Where the device allows, the step that is committed is the one launched by the call before: the host prepares a
        step while the device runs another.
        """
        started = self.clock()
        plan = self.scheduler.schedule()
        outputs, self._endings = self._endings, []
        for sequence, reason in plan.failed:
            self._end(sequence)
            outputs.append(Output(sequence.request.id, finish_reason=FinishReason.ERROR, error=reason))
        launched = self._launch(plan.chunks) if plan.chunks else None
        if self.runner.lookahead:
            launched, self._launched = self._launched, launched
        if launched is not None:
            outputs += self._commit(launched)
            self._steps.append((self.clock() - started, sum(chunk.num_tokens for chunk in launched.chunks)))
        return outputs

    def info(self) -> EngineInfo:
        runner = self.runner
        return EngineInfo(
            model_fingerprint=runner.model.fingerprint(),
            max_model_len=runner.max_model_len,
            num_kv_blocks=runner.num_blocks,
            block_size=self.config.block_size,
            num_pages=runner.pool.num_pages,
            vocab_size=runner.model.vocab_size,
            eos_token_ids=tuple(sorted(self.eos_token_ids)),
            device=str(runner.device),
            dtype=str(runner.dtype).removeprefix("torch."),
            memory={
                "weights": runner.weight_bytes,
                "kv": runner.kv_bytes,
                "pages": runner.pool.num_bytes,
                "workspace": runner.workspace_bytes,
            },
        )

    def stats(self) -> EngineStats:
        """A snapshot; the steps and reads it reports are forgotten."""
        scheduler, pool = self.scheduler, self.runner.pool
        steps, self._steps = tuple(self._steps), []
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_used_blocks=scheduler.blocks.num_used,
            kv_blocks=scheduler.blocks.num_blocks,
            pages=pool.pages_by_state(),
            prefix_queries=scheduler.blocks.queries,
            prefix_hits=scheduler.blocks.hits,
            preemptions=scheduler.preemptions,
            adapter_loads=pool.counters.loads,
            adapter_evictions=pool.counters.evictions,
            adapter_reads=self.adapters.take_read_seconds(),
            host_evictions=self.adapters.host.counters.evictions,
            adapters_host=len(self.adapters.host),
            adapters_device=len(pool.residents),
            running_adapters=_digests(scheduler.running),
            waiting_adapters=_digests(scheduler.waiting),
            steps=steps,
        )

    def check_integrity(self) -> None:
        """Raise unless every pool accounts for all it owns."""
        self.scheduler.check_integrity()
        self.runner.pool.check_integrity()
        self.adapters.host.check_integrity()

    def _check_tokens(self, request: Request) -> None:
        vocabulary, longest = self.runner.model.vocab_size, self.runner.max_model_len
        if not request.prompt:
            raise RequestError("the prompt is empty, expected at least one token", param="prompt")
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise RequestError(f"the prompt has token ids outside 0..{vocabulary - 1}", param="prompt")
        for param, ids in (
            ("logit_bias", request.params.logit_bias),
            ("stop_token_ids", request.params.stop_token_ids),
        ):
            if not all(0 <= token < vocabulary for token in ids):
                raise RequestError(f"{param} has token ids outside 0..{vocabulary - 1}", param=param)
        if request.params.max_tokens < 1:
            raise RequestError(f"max_tokens is {request.params.max_tokens}, expected at least 1", param="max_tokens")
        if len(request.prompt) + request.params.max_tokens > longest:
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.params.max_tokens}, together"
                f" more than the context of {longest} tokens",
                param="prompt",
                code="context_length_exceeded",
            )

    def _launch(self, chunks: list[Chunk]) -> Launched:
        launched = self.runner.launch(chunks, self.eos_token_ids)
        for chunk in chunks:
            self.scheduler.advance(chunk)
        return launched

    def _commit(self, launched: Launched) -> list[Output]:
        """Take over what a step has yielded. Sequences that ended while it was under way are left out."""
        started = self.clock()
        tokens, logprobs = launched.wait()
        self.waited += self.clock() - started
        outputs: list[Output] = []
        sampled = iter(zip(tokens, logprobs, strict=True))
        for chunk in launched.chunks:
            token, logprob = next(sampled) if chunk.samples else (None, None)
            sequence = chunk.sequence
            if self._sequences.get(sequence.request.id) is not sequence:
                continue
            if chunk.samples and token is None:
                self._end(sequence, forget=True)
                outputs.append(_not_finite(sequence))
                continue
            self.scheduler.commit(chunk, token)
            if token is not None:
                outputs.append(self._output(sequence, token, logprob))
        return outputs

    def _output(self, sequence: Sequence, token: int, logprob: TokenLogprobs | None) -> Output:
        """What the client learns of a new token. A stop token ends the request and is not part of its text."""
        params = sequence.request.params
        stopped = token in stop_ids(params, self.eos_token_ids)
        reason = FinishReason.STOP if stopped else None
        if reason is None and sequence.num_output >= params.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._end(sequence)
        first = sequence.num_output == 1
        return Output(
            sequence.request.id,
            tokens=() if stopped else (token,),
            logprobs=() if stopped or logprob is None else (logprob,),
            finish_reason=reason,
            timings=self._timings(sequence) if first else None,
            cached_tokens=sequence.num_cached if first else 0,
        )

    def _timings(self, sequence: Sequence) -> Timings:
        scheduled = sequence.first_scheduled if sequence.first_scheduled is not None else sequence.arrival
        return Timings(queue=scheduled - sequence.arrival, prefill=self.clock() - scheduled)

    def _end(self, sequence: Sequence, *, forget: bool = False) -> None:
        del self._sequences[sequence.request.id]
        self.scheduler.remove(sequence, forget=forget)


def _not_finite(sequence: Sequence) -> Output:
    return Output(sequence.request.id, finish_reason=FinishReason.ERROR, error=NOT_FINITE)


def _digests(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({digest for sequence in sequences for digest in sequence.request.mix.digests}))
