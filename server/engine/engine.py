"""The engine: requests in, one step at a time, outputs out. For use in-process; `loop.py` gives it a process.

engine = Engine.from_config(EngineConfig(model="path/to/folder"))
engine.add_request(Request("r1", prompt=(1, 2, 3), params=SamplingParams(max_tokens=8)))
while engine.has_work:
    for output in engine.step():
        ...
"""

import time
from collections.abc import Callable
from dataclasses import replace

from adapters_store.tiers import HostTier, folder_reader
from server.engine.adapters import EngineAdapters
from server.engine.arrivals import Arrivals
from server.engine.blocks import BlockPool
from server.engine.checks import check_prompt_router, check_tokens
from server.engine.config import EngineConfig, EngineInfo, EngineStats, RequestError
from server.engine.deadlines import Deadlines
from server.engine.deciding import Deciding
from server.engine.decisions import Decision
from server.engine.endings import ended, failed, not_finite
from server.engine.gate_bank import GateBank
from server.engine.grammar_bank import GrammarBank, open_bank
from server.engine.intake import Intake
from server.engine.masks import MaskThreads, constrained, mask_threads, moves, no_mask
from server.engine.plan import Plan
from server.engine.prompt_routers import PromptRouter, Verdict
from server.engine.reads import page_check, start_loader
from server.engine.router_bank import RouterBank
from server.engine.runner import Launched, Runner
from server.engine.sampler import stop_ids
from server.engine.scheduler import Scheduler
from server.engine.sequence import FinishReason, Output, Request, Sequence, TokenLogprobs
from server.engine.snapshot import engine_info, engine_stats

Clock = Callable[[], float]

LOADING_SECONDS = 1e-3
"""How long a step waits for adapters under way when it can do nothing else."""
MASK_SECONDS = 0.02
"""What a step counts as, at most, where waiting for a mask is compared with giving up: see `MaskThreads.outwait`. A row
without a mask yields no token and is computed anew."""


class Engine:
    """Continuous batching over one model. Not thread-safe. `waited`: seconds spent waiting for the device.

    Without `gates` requests with token-level routers are refused, without `routers` those with prompt-level ones,
    without `grammars` constrained ones.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        adapters: EngineAdapters,
        clock: Clock,
        gates: GateBank | None = None,
        routers: RouterBank[PromptRouter] | None = None,
        grammars: GrammarBank | None = None,
    ) -> None:
        self.config = config
        self.runner = runner
        self.adapters = adapters
        self.arrivals = Arrivals(adapters, gates, routers, grammars)
        self.deciding = Deciding()
        self.masks = MaskThreads(mask_threads(config), pinned=runner.device.type == "cuda")
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
        self.intake = Intake(self.arrivals, self.deciding, self.scheduler)
        self.waited = 0.0
        self._sequences: dict[str, Sequence] = {}
        self._endings: list[Output] = []
        self._deadlines = Deadlines()
        self._steps: list[tuple[float, int]] = []
        self._step_seconds = MASK_SECONDS
        self._launched: Launched | None = None

    @classmethod
    def from_config(cls, config: EngineConfig, clock: Clock = time.monotonic) -> "Engine":
        """Load the model and allocate its memory. Raises ModelError with one clear sentence if that cannot be done."""
        runner = Runner(config)
        pinned = runner.device.type == "cuda"
        check = page_check(runner.pool.num_pages)
        read = folder_reader(runner.model.linear_shape, runner.dtype, pinned=pinned, check=check)
        host, loader = HostTier(config.host_memory), start_loader(config.load_threads, runner.device)
        gates = runner.gate_bank(loader)
        routers = RouterBank(loader, runner.prompt_routers.read) if runner.prompt_routers is not None else None
        adapters = EngineAdapters(host, runner.pool, loader, read, clock)
        return cls(config, runner, adapters, clock, gates, routers, open_bank(config, runner.model))

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._endings or self._launched)

    def add_request(self, request: Request) -> None:
        """Queue a request, once its adapters and gates are read and its constraint is compiled, which begins now.

        Raises RequestError for what can never be served. What is known only later ends the request with an error in a
        step: one of them cannot be read or compiled, or together the adapters are too large.
        """
        if request.id in self._sequences:
            raise RequestError(f"request {request.id} is already running", param="id")
        check_tokens(request, self.runner.model.vocab_size, self.runner.max_model_len)
        check_prompt_router(request, self.arrivals.routers is not None, self.config.max_layered_tokens)
        sequence = Sequence.of(request, arrival=self.clock())
        self.intake.add(sequence)
        self._sequences[request.id] = sequence
        if request.timeout is not None:
            self._deadlines.add(sequence, request.timeout)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown or ended ones are left alone. Its ending comes with the next step."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)
            self._endings.append(ended(request_id, FinishReason.ABORT))

    def step(self) -> list[Output]:
        """Schedule, build, run, commit. Returns what became of every sequence that moved or ended.

        Where the device allows, the step that is committed is the one launched by the call before: the host prepares a
        step while the device runs another. A step waits for adapters, for a millisecond, only if it can do nothing
        else. Constrained rows of a step launched ahead get their tokens at the beginning of the next call: until then
        the device runs the model, and threads compute the masks.
        """
        started = self.clock()
        for sequence in self._deadlines.expired(started):
            self._end(sequence)
            self._endings.append(ended(sequence.request.id, FinishReason.TIMEOUT, sequence.timings(started)))
        self._move_adapters()
        if self._launched is not None and self._launched.sampled is None:
            self._choose(self._launched)
        plan = self.scheduler.schedule()
        for sequence, error in plan.failed:
            self._fail(sequence, error)
        outputs, self._endings = self._endings, []
        if not plan.chunks and plan.layers is None and not outputs and self._launched is None:
            self._wait()
            return []
        if self._launched is not None and constrained(self._launched.chunks) and self._launched.ended:
            self._advance_masks(self._launched)  # the device is idle: threads compute while the next step is launched
        launched = self._launch(plan) if plan.chunks or plan.layers is not None else None
        if self.runner.lookahead:
            launched, self._launched = self._launched, launched
        if launched is not None:
            outputs += self._commit(launched)
            seconds = self.clock() - started
            self._steps.append((seconds, sum(chunk.num_tokens for chunk in launched.chunks)))
            self._step_seconds = min(MASK_SECONDS, seconds - self.masks.idled)
        return outputs

    def info(self) -> EngineInfo:
        return engine_info(self.runner, self.config.block_size)

    def stats(self) -> EngineStats:
        """A snapshot; the steps and reads it reports are forgotten."""
        steps, self._steps = tuple(self._steps), []
        return engine_stats(self.scheduler, self.intake, self.adapters, steps)

    def close(self) -> None:
        """Stop all threads. An engine that is dropped without it leaves none behind for long either."""
        self.adapters.close()
        self.arrivals.close()
        self.masks.close()

    def check_integrity(self) -> None:
        """Raise unless every pool accounts for all it owns."""
        self.scheduler.check_integrity()
        self.adapters.check_integrity()
        self.intake.check_integrity()
        if len(self._deadlines) != sum(s.request.timeout is not None for s in self._sequences.values()):
            raise RuntimeError("deadlines are kept of other sequences than those that have one")

    def _move_adapters(self) -> None:
        """Let what is being loaded go on, and queue the requests whose adapters and routers have all been read."""
        for sequence, error in self.intake.poll(idle=not self._sequences):
            self._fail(sequence, error)

    def _launch(self, plan: Plan) -> Launched:
        waits = any(chunk.sequence.num_pending for chunk, _ in constrained(plan.chunks))
        launched = self.runner.launch(plan.chunks, plan.layers)
        for chunk in plan.chunks:
            self.scheduler.advance(chunk)
        if plan.layers is not None:
            self.scheduler.advance_layers(plan.layers)
        if not waits:
            self._choose(launched)
        return launched

    def _choose(self, launched: Launched) -> None:
        """Choose the tokens of the last launch, when all tokens before them are known."""
        for chunk, matching in self.masks.settle(launched.chunks, launched.running, self._step_seconds):
            if matching.behind:
                launched.late.add(chunk.sequence)
                self.scheduler.retract(chunk)
            elif matching.error is not None:
                self._fail(chunk.sequence, no_mask(chunk.sequence, matching))
        self.runner.choose(launched, self.eos_token_ids)

    def _wait(self) -> None:
        """For what the requests wait for, a millisecond at most."""
        matchings = [sequence.matching for sequence in self.scheduler.running if sequence.matching is not None]
        if any(matching.pending for matching in matchings):
            self.masks.wait(matchings, LOADING_SECONDS)
        else:
            self.arrivals.wait(LOADING_SECONDS)

    def _commit(self, launched: Launched) -> list[Output]:
        """Take over what a step has yielded. Sequences that ended while it was under way are left out."""
        started = self.clock()
        tokens, logprobs = launched.wait()
        self.waited += self.clock() - started
        outputs: list[Output] = []
        self._advance_masks(launched)
        sampled = iter(zip(tokens, logprobs, strict=True))
        prompt_logprobs, pools = launched.prompt_logprobs(), launched.pools()
        for index, (chunk, shares) in enumerate(zip(launched.chunks, launched.shares(), strict=True)):
            token, logprob = next(sampled) if chunk.samples else (None, None)
            sequence = chunk.sequence
            if self._sequences.get(sequence.request.id) is not sequence:
                continue
            scored, pooled = prompt_logprobs.get(index, ()), pools.get(index, b"")
            late = sequence in launched.late
            token = None if late else token
            if (chunk.samples and token is None and not late) or scored is None or pooled is None:
                self._end(sequence, forget=True)
                outputs.append(not_finite(sequence.request.id))
                continue
            self.scheduler.commit(chunk, token)
            if token is not None:
                output = self._output(sequence, token, logprob, shares, scored)
                outputs.append(replace(output, pooled=pooled) if pooled else output)
            elif scored or pooled:
                outputs.append(Output(sequence.request.id, prompt_logprobs=scored, pooled=pooled))
        for sequence, verdict in launched.verdicts:
            if self._sequences.get(sequence.request.id) is sequence and sequence.undecided:
                self._decide(sequence, verdict)
        return outputs

    def _advance_masks(self, launched: Launched) -> None:
        """Begin to compute the masks behind a step's tokens, once. Sequences that ended meanwhile are left out."""
        if launched.advanced:
            return
        launched.advanced = True
        tokens, _ = launched.wait()
        found = zip((chunk.sequence for chunk in launched.chunks if chunk.samples), tokens, strict=True)
        on_time = ((sequence, token) for sequence, token in found if sequence not in launched.late)
        self.masks.advance(moves(pair for pair in on_time if self._sequences.get(pair[0].request.id) is pair[0]))

    def _decide(self, sequence: Sequence, verdict: Verdict) -> None:
        """A router has decided for the prompt of a sequence that has not ended."""
        use, started = sequence.asked.prompt_router, sequence.first_scheduled
        assert use is not None
        assert started is not None
        decision = Decision.of(use, sequence.asked.mix, verdict, self.clock() - started)
        if decision is None:
            self._end(sequence, forget=True)
            self._endings.append(not_finite(sequence.request.id))
            return
        self.intake.decide(sequence, decision)

    def _output(
        self,
        sequence: Sequence,
        token: int,
        logprob: TokenLogprobs | None,
        shares: tuple[float, ...],
        scored: tuple[TokenLogprobs, ...],
    ) -> Output:
        """What the client learns of a new token. A stop token ends the request and is not part of its text."""
        params = sequence.request.params
        wanted = params.max_tokens > 0
        stopped = wanted and token in stop_ids(params, self.eos_token_ids)
        reason = FinishReason.STOP if stopped else None
        if reason is None and sequence.num_output >= params.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._end(sequence)
        first, said, told = sequence.num_output == 1, wanted and not stopped, None
        if first or (reason is not None and sequence.preempted):
            now = self.clock()
            sequence.first_token = now if first else sequence.first_token
            told = sequence.timings(now)
        return Output(
            sequence.request.id,
            tokens=(token,) if said else (),
            logprobs=(logprob,) if said and logprob is not None else (),
            finish_reason=reason,
            timings=told,
            cached_tokens=(sequence.num_cached or 0) if first else 0,
            shares=shares if said else (),
            prompt_logprobs=scored,
            decided=sequence.decision.told if first and sequence.decision is not None else None,
        )

    def _fail(self, sequence: Sequence, error: RequestError) -> None:
        self._end(sequence)
        self._endings.append(failed(sequence.request.id, error))

    def _end(self, sequence: Sequence, *, forget: bool = False) -> None:
        del self._sequences[sequence.request.id]
        self._deadlines.remove(sequence)
        self.intake.remove(sequence, forget=forget)
