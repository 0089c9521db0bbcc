"""An engine without a model."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from server.engine.client import EngineUnavailable
from server.engine.config import EngineInfo, EngineStats, RequestError
from server.engine.prompt_routers import Decided
from server.engine.sequence import FinishReason, Output, Request, Timings, TokenLogprobs

CONTEXT = 256
BLOCK = 16
REPLY = "Hello world, this is a fine answer."


def pooled_row(token: int) -> np.ndarray:
    """The last hidden state that the fake engine has for a token, wherever it stands."""
    return np.float32([1, token, token % 7])


class FakeEngine:
    """Answers every request with scripted tokens; remembers what it was asked for, and how each stream ended.

    While `gate` is cleared each request waits before its output number `hold_at`. `kill` ends what runs, as a dying
    process does. `decided` is what prompt-level routers decide.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.decided: Decided | None = None
        self.info: EngineInfo | None = EngineInfo(
            model_fingerprint="f" * 64,
            max_model_len=CONTEXT,
            num_kv_blocks=64,
            block_size=BLOCK,
            num_pages={"qkv": 8},
            vocab_size=len(tokenizer),
            eos_token_ids=(tokenizer.eos_token_id,),
            device="cpu",
            dtype="float32",
            memory={},
        )
        self.others: list[FakeEngine] = []
        self.alive = True
        self.stalled = False
        self.stats = EngineStats()
        self.requests: list[Request] = []
        self.ended: dict[str, str] = {}
        self.refusal: RequestError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.hold_at = 0
        self.num_waiting = 0
        self.pinned: dict[str, str] = {}
        self.evicted: list[str] = []
        self.prefetched: dict[str, str] = {}
        self.residency: dict[str, str] = {}
        self.most_pins = 2
        self.on_residency: Callable[[str, str], None] | None = None
        self._tokenizer = tokenizer
        self._script: Callable[[Request], Sequence[int]] | None = None
        self._dead: set[str] = set()
        self._aborted: set[str] = set()

    @property
    def members(self) -> "tuple[FakeEngine, ...]":
        return (self, *self.others)

    def say(self, text: str) -> None:
        """Answer with these words from now on, one token a step."""
        tokens = self.encode(text)
        self._script = lambda _: tokens

    def answer(self, script: Callable[[Request], Sequence[int]]) -> None:
        self._script = script

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def kill(self) -> None:
        self.alive = False
        self._dead = {request.id for request in self.requests} - self.ended.keys()
        self.gate.set()

    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)
        self.gate.set()

    async def pin(self, digest: str, path: str) -> bool:
        if digest not in self.pinned and len(self.pinned) >= self.most_pins:
            return False
        self.pinned[digest] = path
        self.move(digest, "device")
        return True

    def unpin(self, digest: str) -> None:
        self.pinned.pop(digest, None)

    def prefetch(self, paths: dict[str, str]) -> None:
        for digest, path in paths.items():
            self.prefetched[digest] = path
            self.move(digest, "host")

    async def prefetch_now(self, digest: str, path: str) -> str:
        self.prefetched[digest] = path
        self.move(digest, "device")
        return "device"

    def evict(self, digest: str) -> None:
        self.evicted.append(digest)
        self.move(digest, "disk")

    def move(self, digest: str, tier: str) -> None:
        """The adapter is now in this tier."""
        self.residency[digest] = tier
        if self.on_residency is not None:
            self.on_residency(digest, tier)

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        if not self.alive:
            raise EngineUnavailable("no engine at ipc:///tmp/secret")
        self.requests.append(request)
        if self.refusal is not None:
            self.ended[request.id] = "refused"
            raise self.refusal
        ending = "closed"
        try:
            async for output in self._outputs(request):
                if output.finish_reason is not None:
                    ending = output.finish_reason.value
                yield output
        finally:
            self.ended[request.id] = ending

    async def _outputs(self, request: Request) -> AsyncIterator[Output]:
        tokens = list(self._script(request) if self._script is not None else self.encode(REPLY))
        tokens = tokens[: request.params.max_tokens]
        scores = self._prompt_scores(request)
        if len(scores) > 1:
            yield Output(request.id, prompt_logprobs=scores[:1])
        if request.params.pooled:
            await self.gate.wait()
            for token in request.prompt:
                yield Output(request.id, pooled=pooled_row(token).tobytes())
        if not tokens:
            yield Output(request.id, finish_reason=FinishReason.LENGTH, prompt_logprobs=scores[bool(scores[1:]) :])
        for index, token in enumerate(tokens):
            if index >= self.hold_at:
                self.num_waiting += 1
                await self.gate.wait()
                self.num_waiting -= 1
            await asyncio.sleep(0)
            if request.id in self._dead:
                yield Output(request.id, finish_reason=FinishReason.ERROR, error="died with /secret/path")
                return
            if request.id in self._aborted:
                yield Output(request.id, finish_reason=FinishReason.ABORT)
                return
            is_last = index == len(tokens) - 1
            is_full = len(tokens) == request.params.max_tokens
            first = index == 0
            yield Output(
                request.id,
                tokens=(token,),
                logprobs=(self._logprobs(token, request.params.logprobs),)
                if request.params.logprobs is not None
                else (),
                finish_reason=(FinishReason.LENGTH if is_full else FinishReason.STOP) if is_last else None,
                timings=Timings(queue=0.001, prefill=0.002) if first else None,
                cached_tokens=BLOCK if first and len(request.prompt) > BLOCK else 0,
                shares=self._shares(request, index),
                prompt_logprobs=scores[bool(scores[1:]) :] if first else (),
                decided=self.decided if first and request.prompt_router is not None else None,
            )

    def _prompt_scores(self, request: Request) -> tuple[TokenLogprobs, ...]:
        """Of the token at place i: -i / 4, rank 3; and tokens 20, 21 and so on as the most likely ones."""
        most = request.params.prompt_logprobs
        if most is None:
            return ()
        top = tuple((20 + rank, -0.5 - rank) for rank in range(most))
        return tuple(TokenLogprobs(-place / 4, top, 3) for place in range(1, len(request.prompt)))

    def _shares(self, request: Request, index: int) -> tuple[float, ...]:
        """Three quarters for one of the rows that may be used, in turn, and a quarter for the last of them."""
        if request.gates is None:
            return ()
        rows = [row for row, may in enumerate(request.gates.allowed) if may]
        shares = [0.0] * len(request.gates.allowed)
        shares[rows[index % len(rows)]] += 0.75
        shares[rows[-1]] += 0.25
        return tuple(shares)

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        return TokenLogprobs(-0.5, tuple(((token + rank) % 300, -0.5 - rank) for rank in range(count)))
