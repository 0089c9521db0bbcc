"""One choice: one request to the engine, and how its tokens become pieces of text."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from routing.router import Route
from server.chat import ChatTokenizer
from server.engine.client import EngineUnavailable
from server.engine.config import EngineInfo, RequestError
from server.engine.prompt_routers import Decided
from server.engine.sequence import NOT_FINITE, FinishReason, Output, Request, Timings, TokenLogprobs
from server.errors import BadRequest, DeadlinePassed, ServerError, Unavailable
from server.journal import Ending
from server.metrics import Metrics
from server.routed_tokens import RoutedTokens
from server.stops import StopStrings

logger = logging.getLogger(__name__)


class OutputNotFinite(BadRequest):
    """The weights asked for more than numbers can hold, as the engine found out by computing it."""

    code = "output_not_finite"


class Engine(Protocol):
    """What the front end needs of an engine client."""

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def alive(self) -> bool: ...

    def submit(self, request: Request) -> AsyncGenerator[Output, None]: ...

    def abort(self, request_id: str) -> None: ...


@dataclass(frozen=True)
class ScoredToken:
    """A token by its bytes, which may be a part of a character, with log-probabilities in nats.

    `offset` counts the characters of the choice's text before it.
    """

    data: bytes
    offset: int
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Piece:
    """New text of one choice. `tokens` are those whose text is out, if log-probabilities were asked for.

    The first piece brings `prompt_scores`, of the prompt's tokens from the second one on, if these were asked for.
    """

    index: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_scores: tuple[TokenLogprobs, ...] = ()


@dataclass
class _Unsaid:
    """A scored token whose text, from its offset to `stop`, is not out yet."""

    token: ScoredToken
    stop: int


@dataclass(frozen=True)
class ChoiceServices:
    """What every choice works with. `clock` counts seconds."""

    engine: Engine
    tokenizer: ChatTokenizer
    metrics: Metrics
    clock: Callable[[], float]


class Choice:
    """One of the `n` answers to one prompt. `leader` is the first choice of the same prompt, None for that one itself.

    With `waits` a choice lets its leader go ahead: after the leader's first token the prompt is in the prefix cache,
    and n choices compute it once instead of n times. `arrival` is the HTTP request's, by the services' clock. One that
    `explains` remembers who led each of its tokens. The special tokens `shown` are text.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        route: Route,
        stops: StopStrings,
        services: ChoiceServices,
        arrival: float,
        leader: "Choice | None" = None,
        waits: bool = False,
        explains: bool = False,
        shown: Collection[str] = (),
    ) -> None:
        self.index = index
        self.request = request
        self.leader = leader
        self.num_tokens = 0
        self.cached_tokens = 0
        self.prompt_scores: tuple[TokenLogprobs, ...] = ()
        self.pooled: np.ndarray | None = None
        """The sum of the prompt's last hidden states (hidden,) float32, of a request that is pooled."""
        self.routed = RoutedTokens(explains)
        self.decided: Decided | None = None
        self._route = route
        self._stops = stops
        self._services = services
        self._arrival = arrival
        self._waits = waits
        self._has_started = asyncio.Event()
        self._detokenizer = services.tokenizer.detokenizer(request.prompt, shown)
        self._decoded = 0  # characters decoded
        self._said = 0  # characters given out
        self._has_spoken = False
        self._unsaid: deque[_Unsaid] = deque()
        self._timings: Timings | None = None
        self._preempted: tuple[float, ...] = ()
        self._submitted: float | None = None
        self._first_time: float | None = None
        self._last_time = 0.0
        self.ending: Ending | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Submit, stream, and account for the ending, whichever it is. Closing this early aborts the request.

        Raises BadRequest for what the engine refuses, Unavailable when there is no engine or it ends the request,
        DeadlinePassed where the request's time is over before its first token.
        """
        ending, code = FinishReason.ABORT, None
        self._services.metrics.begin(self._route)
        try:
            if self._waits and self.leader is not None:
                await self.leader._has_started.wait()
            self._submitted = self._services.clock()
            async with aclosing(self._services.engine.submit(self._in_time())) as outputs:
                async for output in outputs:
                    self.prompt_scores += output.prompt_logprobs
                    if output.pooled:
                        part = np.frombuffer(output.pooled, np.float32)
                        self.pooled = part if self.pooled is None else self.pooled + part
                    if not output.tokens and output.finish_reason is None:
                        continue  # a part of the prompt is scored or pooled
                    piece = self._take(output)
                    if piece.finish_reason is not None:
                        is_late = output.finish_reason is FinishReason.TIMEOUT
                        ending = FinishReason.TIMEOUT if is_late else piece.finish_reason
                    if piece.text or piece.finish_reason is not None:
                        yield piece
                    if piece.finish_reason is not None:
                        break  # leaving closes the stream: after a stop string this aborts in the engine
        except (EngineUnavailable, RequestError, ServerError) as error:
            ending = FinishReason.TIMEOUT if isinstance(error, DeadlinePassed) else FinishReason.ERROR
            told = _client_error(error)
            code = told.code
            raise told from error
        finally:
            self._has_started.set()
            self._account(ending, code)

    def _in_time(self) -> Request:
        """The request with what is left of its time. Raises DeadlinePassed."""
        if self.request.timeout is None:
            return self.request
        left = self._arrival + self.request.timeout - self._services.clock()
        if left <= 0:
            raise DeadlinePassed
        return replace(self.request, timeout=left)

    def _take(self, output: Output) -> Piece:
        if output.timings is not None:
            self._note_timings(output.timings)
        if output.finish_reason is FinishReason.ABORT:
            raise Unavailable("the server is shutting down", code="draining")
        if output.finish_reason is FinishReason.ERROR:
            if output.error == NOT_FINITE:
                raise OutputNotFinite(NOT_FINITE, param="lora.adapters")
            logger.error("the engine ended a request: %s", output.error)
            raise Unavailable("the engine could not finish this request; please retry", code="engine_error")
        is_late = output.finish_reason is FinishReason.TIMEOUT
        if is_late and not self.num_tokens:
            raise DeadlinePassed
        self._note_time(output)
        self.decided = output.decided or self.decided
        text = self._feed(output)
        reason = FinishReason.STOP if self._stops.hit is not None else output.finish_reason
        reason = FinishReason.LENGTH if is_late else reason
        if reason is not None and self._stops.hit is None:
            text += self._stops.feed(self._detokenizer.flush())
            text += self._stops.flush()
            reason = FinishReason.STOP if self._stops.hit is not None else reason
        self._said += len(text)
        tokens = self._release(ended=reason is not None) if text or reason is not None else ()
        is_first, self._has_spoken = not self._has_spoken, self._has_spoken or bool(text)
        scores = (self.leader or self).prompt_scores if is_first else ()
        return Piece(self.index, text, tokens, reason, scores)

    def _feed(self, output: Output) -> str:
        """The text that a step adds. Tokens after a stop string are neither counted nor kept."""
        text = ""
        for position, token in enumerate(output.tokens):
            start, piece = self._decoded, self._detokenizer.feed(token)
            self.num_tokens += 1
            self._decoded += len(piece)
            if output.shares:
                self.routed.add(piece, output.shares)
            if position < len(output.logprobs):
                scored = self._scored(token, start, output.logprobs[position])
                self._unsaid.append(_Unsaid(scored, self._decoded))
            # Stop strings count from the first token after min_tokens, as stop tokens do.
            text += piece if self.num_tokens <= self.request.params.min_tokens else self._stops.feed(piece)
            if self._stops.hit is not None:
                break
        return text

    def _scored(self, token: int, offset: int, logprobs: TokenLogprobs) -> ScoredToken:
        name = self._services.tokenizer.token_bytes
        top = tuple((name(other), value) for other, value in logprobs.top)
        return ScoredToken(name(token), offset, logprobs.logprob, top)

    def _release(self, ended: bool) -> tuple[ScoredToken, ...]:
        """The scored tokens whose text is out; at the end also those whose text a stop string cut short."""
        released = []
        while self._unsaid:
            head = self._unsaid[0]
            # a token without text of its own, as the first bytes of a character have none, begins where the text stops
            is_out = ended or head.stop <= self._said
            if not is_out or (self._stops.hit is not None and head.token.offset >= self._said):
                break
            released.append(self._unsaid.popleft().token)
        return tuple(released)

    def _note_time(self, output: Output) -> None:
        now = self._services.clock()
        if self._first_time is None:
            self._first_time = now
            self.cached_tokens = output.cached_tokens
            self._has_started.set()
        else:
            self._services.metrics.gap(self.request.tenant, self._route, now - self._last_time)
        self._last_time = now

    def _note_timings(self, timings: Timings) -> None:
        """The engine's spans of time end when it tells them, which is about now."""
        now = self._services.clock()
        self._timings = self._timings or timings
        self._preempted = tuple(now - ago - self._arrival for ago in timings.preempted)

    def _account(self, reason: FinishReason, code: str | None) -> None:
        now, timings, first = self._services.clock(), self._timings, self._first_time
        self.ending = Ending(
            tenant=self.request.tenant,
            route=self._route,
            finish_reason=reason,
            prompt_tokens=len(self.request.prompt) if self.leader is None else 0,
            generation_tokens=self.num_tokens,
            e2e=now - self._arrival,
            first_token=first - self._arrival if first is not None else None,
            queue=timings.queue if timings is not None else None,
            prefill=timings.prefill if timings is not None else None,
            decode=now - first if first is not None else None,
            submitted=self._submitted - self._arrival if self._submitted is not None else None,
            loading=timings.loading if timings is not None else None,
            preempted=self._preempted,
            cached_tokens=self.cached_tokens if self.leader is None else 0,
            error=code,
        )
        self._services.metrics.end(self.ending)


def _client_error(error: EngineUnavailable | RequestError | ServerError) -> ServerError:
    if isinstance(error, ServerError):
        return error
    if isinstance(error, EngineUnavailable):
        return Unavailable("the engine is being restarted; please retry", code="engine_unavailable")
    if error.code == "router_unavailable":
        logger.error("a router cannot be read: %s", error)
        return Unavailable("the router of this request cannot be read at the moment", code="router_unavailable")
    if error.code == "adapter_unavailable":
        logger.error("an adapter cannot be read: %s", error)
        return Unavailable("an adapter of this request cannot be read at the moment", code="adapter_unavailable")
    if error.code == "constraint_unavailable":
        logger.error("a constraint cannot be compiled: %s", error)
        return Unavailable("the constraint of this request cannot be compiled at the moment", code=error.code)
    return BadRequest(str(error), param=error.param, code=error.code)
