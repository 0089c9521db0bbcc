"""One request inside the engine: its tokens, what has been computed of them, and the memory it holds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from adapters_store.page_lease import PageLease
from adapters_store.types import BASE, Mix
from server.engine.constraint import Constraint
from server.engine.decisions import Decision
from server.engine.gates import Gates, GateUse
from server.engine.matching import Matching
from server.engine.prompt_routers import Decided, PromptPass, PromptRouter, PromptUse

NOT_FINITE = "the model's output is not finite: the adapters of this request, or their weights, are too large"
"""The error of a request whose logits overflowed."""

ENGINE_LOST = "engine_lost"
"""The error code of a request that was in flight when its engine died, or was ended."""


class FinishReason(StrEnum):
    """The ending of a request. Every request has exactly one."""

    STOP = "stop"
    LENGTH = "length"
    TIMEOUT = "timeout"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults sample from the model's own distribution.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. `seed` and the index of the token within the output
    determine its random number, whatever shares the batch. `logprobs` is the number of most likely tokens reported at
    each step, beside the chosen one; None reports nothing. `prompt_logprobs` is the same for the prompt, from its
    second token on. With a `constraint` only tokens that it allows are chosen. max_tokens 0 computes the prompt alone.
    `pooled` asks for the sum of the prompt's last hidden states, and excludes `prompt_logprobs`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    pooled: bool = False
    constraint: Constraint | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_host_token(self) -> bool:
        """Whether a token must be known to the host before the next one can be sampled, as counting penalties need."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


@dataclass(frozen=True)
class Request:
    """What the engine is asked for. `paths` gives the local folder of every adapter of the mix, by digest.

    `cache_key`, the mix and `gates` root the prefix-cache hash chain: the KV of one such set is never read under
    another. `gates` weigh the adapters of the mix anew for every token; a `prompt_router` chooses among them once, and
    what it chose belongs to the root as well. `weight` (> 0) is the share that is due to `tenant`, relative to those of
    others. `timeout`: seconds after its arrival when it ends, whatever it has by then.
    The smaller its `priority`, the earlier it starts among the waiting requests of its tenant (fairness.py). `log`:
    under which names the log knows whom it comes from.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    mix: Mix = BASE
    paths: Mapping[str, str] = field(default_factory=dict)
    cache_key: bytes = b""
    tenant: str = "default"
    weight: float = 1.0
    gates: GateUse | None = None
    timeout: float | None = None
    priority: int = 0
    prompt_router: PromptUse | None = None
    log: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of tenant {self.tenant!r} is {self.weight}, expected a number above 0")

    @property
    def log_fields(self) -> Mapping[str, str]:
        """What a line of the log about it says besides."""
        return {**self.log, "tenant": self.tenant, "generation": self.id}

    @property
    def cache_root(self) -> bytes:
        """Root of the hash chain: with the mix and the gates, so that no caller can forget them."""
        root = self.cache_key + self.mix.digest.encode() if self.mix.entries else self.cache_key
        return root if self.gates is None else root + self.gates.key


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (nats) of one token under the model's unmodified distribution.

    `rank` is told of prompt tokens only: 1 is the most likely token.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds from arrival in the engine to first scheduling, and from there to the first token; None: not yet.

    `loading` is the part of `queue` in which adapters, routers or a grammar were not there yet. `preempted`: how long
    before the output that tells this, each time, the request lost its place. These are spans of time and no points,
    since two processes need not have one clock.
    """

    queue: float
    prefill: float | None
    loading: float = 0.0
    preempted: tuple[float, ...] = ()


@dataclass(frozen=True)
class Output:
    """What one step produced for one request. The one with a `finish_reason` is the last.

    `timings` and `cached_tokens` (prompt tokens taken from the prefix cache) come with the first token; `timings` also
    with the end if there was no token, and once more if the request was preempted since. `error_param`
    and `error_code` tell of a request that could not be taken after all, in the terms of `RequestError`, or that its
    engine is lost. With a
    token-level router, `shares` are the weights of its gates' rows for the token, on average over all gates; what a
    prompt-level one `decided` comes with the first token.
    `prompt_logprobs` belong to the prompt's next tokens, in order and each once, beginning with the second; the last
    of them come with the first token or before it. `pooled` is the sum of the last hidden states of some of the
    prompt's rows, each once: fp32[hidden] in native byte order.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_param: str | None = None
    error_code: str | None = None
    timings: Timings | None = None
    cached_tokens: int = 0
    shares: tuple[float, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    decided: Decided | None = None
    pooled: bytes = b""


@dataclass(eq=False)
class Sequence:
    """A request while the engine works on it: `asked` as it came, `request` as it is computed by now.

    These two differ in their mix if a router chooses from the prompt: one that reads the base model does so as a row of
    it, and what is chosen may be fewer adapters than were offered. Until there is a `decision`, `reading` has what the
    router has seen of the prompt, and nothing is sampled; one that chooses layer by layer has taken the prompt through
    `layers_done` of them.

    `num_computed` tokens have their KV in `blocks`, or will have it when the launched steps are done; each step brings
    it closer to `len(sequence)`. `num_pending` tokens (0 or 1) are sampled, but not known to the host yet: the last
    launched step writes them as its row `sampled_row`. Waiting sequences hold neither blocks nor rank pages.
    `num_unscored` rows at the end of the prompt are still to tell how likely the tokens behind them were, or to be
    pooled; those before have told, or will have when the launched steps are done.
    """

    asked: Request
    request: Request
    tokens: list[int]
    arrival: float = 0.0
    num_computed: int = 0
    num_pending: int = 0
    sampled_row: int = 0
    blocks: list[int] = field(default_factory=list)
    lease: PageLease | None = None
    gates: Gates | None = None
    gate_slot: int = -1
    router: PromptRouter | None = None
    reading: PromptPass | None = None
    decision: Decision | None = None
    matching: Matching | None = None
    layers_done: int = 0
    num_cached: int | None = None
    num_hashed_blocks: int = 0
    num_unscored: int = 0
    num_charged: int = 0
    parent_hash: bytes = b""
    skipped_steps: int = 0
    queued: float | None = None
    first_scheduled: float | None = None
    first_token: float | None = None
    preempted: list[float] = field(default_factory=list)
    kept_until: int = 0  # tokens it must have before another tenant's may take its place

    @classmethod
    def of(cls, request: Request, arrival: float = 0.0) -> "Sequence":
        unscored = 0 if request.params.prompt_logprobs is None else len(request.prompt) - 1
        unscored = len(request.prompt) if request.params.pooled else unscored
        return cls(
            asked=request,
            request=request,
            tokens=list(request.prompt),
            arrival=arrival,
            parent_hash=request.cache_root,
            num_unscored=unscored,
        )

    def __len__(self) -> int:
        return len(self.tokens) + self.num_pending

    @property
    def cache_root(self) -> bytes:
        """Root of the hash chain of its blocks as it is computed now."""
        root = self.request.cache_root
        return root if self.decision is None else root + self.decision.key

    @property
    def undecided(self) -> bool:
        """Whether a router has still to choose."""
        return self.asked.prompt_router is not None and self.decision is None

    @property
    def layered(self) -> bool:
        """Whether a router has still to choose for it layer by layer."""
        use = self.asked.prompt_router
        return use is not None and use.layered and self.decision is None

    @property
    def num_layers_left(self) -> int:
        """Layers that a layered prompt has still to be taken through."""
        return self.router.depth - self.layers_done if self.layered and self.router is not None else 0

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        """Output tokens that the host knows."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_sampled(self) -> int:
        """Output tokens that are sampled: the index of the next one."""
        return self.num_output + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return len(self) - self.num_computed

    @property
    def num_telling(self) -> int:
        """The prompt's rows that tell something, if it is asked for: the last one knows no token behind it."""
        return self.num_prompt if self.request.params.pooled else self.num_prompt - 1

    @property
    def first_unscored(self) -> int:
        """The first of the prompt's rows that are still to be scored or pooled, if any are."""
        return self.num_telling - self.num_unscored

    @property
    def num_reusable(self) -> int:
        """How many of its first tokens may come from the prefix cache.

        What is not computed cannot be scored, nor read by a router that reads all of the prompt.
        """
        if self.undecided:
            return len(self.tokens) if self.router is not None and self.router.last_only else 0
        return self.first_unscored if self.num_unscored else len(self.tokens)

    @property
    def ready(self) -> bool:
        """Whether another step can be launched, also before the pending token is known if there is one.

        A constrained row runs ahead like any other: only choosing its token waits for the token before. One whose mask
        takes too long for that waits for it here, so that others need not.
        """
        params, matching = self.request.params, self.matching
        if matching is not None and not matching.ready:
            return False
        waits = params.needs_host_token or (matching is not None and matching.slow)
        return not self.num_pending or not (waits or self.num_sampled >= params.max_tokens)

    def timings(self, now: float) -> Timings:
        """What has become of it by this time, by the clock of its `arrival`."""
        scheduled = now if self.first_scheduled is None else self.first_scheduled
        token = now if self.first_token is None else self.first_token
        return Timings(
            queue=scheduled - self.arrival,
            prefill=None if self.first_scheduled is None else token - scheduled,
            loading=min(now if self.queued is None else self.queued, scheduled) - self.arrival,
            preempted=tuple(now - then for then in self.preempted),
        )

    def forget_computed(self) -> None:
        """Back to nothing computed, as preemption by recompute needs. Blocks and lease must have been given back."""
        self.num_computed = 0
        self.num_hashed_blocks = 0
        self.parent_hash = self.cache_root
        self.reading = None
        self.layers_done = 0
