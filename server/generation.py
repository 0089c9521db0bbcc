"""The biography of a request: template -> route -> lease -> submit -> stream -> account.

A route handler starts a `Generation` and iterates over its pieces. Whatever happens on the way, the adapters' lease is
released once, each choice is accounted for once, and closing the iteration ends the work in the engine.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

from adapters_store.blobs import BlobError
from adapters_store.registry import RegistryError
from adapters_store.store import AdapterStore, UnknownAdapter
from adapters_store.types import BASE
from routing.router import Route, RouteError, Routers
from server.ask import Ask
from server.cache_key import cache_key
from server.chat import ChatTokenizer
from server.choice import Choice, ChoiceServices, OutputNotFinite, Piece
from server.engine.config import EngineInfo
from server.engine.sequence import Request
from server.errors import BadRequest, DeadlinePassed, NotFound, ServerError, Unavailable, refusal
from server.interleave import interleave
from server.prompt_decisions import with_decision
from server.prompts import PromptReader
from server.quotas import Meter, QuotaGate
from server.routed_tokens import with_shares
from server.stops import StopStrings
from server.usage import UsageLedger

SEEDS = 1 << 63


@dataclass(frozen=True)
class Usage:
    """Tokens of one HTTP request. A prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generator:
    """Starts generations. `new_id` and `new_seed` never repeat themselves; a seed is below 2**63.

    A request gets at most `most_scores` log-probabilities of prompt tokens; at most `most_waiting` requests wait for
    their first token at a time.
    """

    def __init__(
        self,
        services: ChoiceServices,
        store: AdapterStore,
        routers: Routers,
        quotas: QuotaGate,
        ledger: UsageLedger,
        new_id: Callable[[], str],
        new_seed: Callable[[], int],
        most_scores: int,
        most_waiting: int,
    ) -> None:
        self.services = services
        self.store = store
        self.routers = routers
        self.quotas = quotas
        self.ledger = ledger
        self.new_id = new_id
        self.new_seed = new_seed
        self.most_scores = most_scores
        self.most_waiting = most_waiting
        self.is_draining = False
        self.running: set[Generation] = set()
        self.waiting: set[Generation] = set()

    def start(self, ask: Ask) -> "Generation":
        """A generation, of which nothing has happened yet.

        Raises Unavailable when the server is shutting down, and when too many requests wait already: an answer that
        nobody waits for any more costs the same as one that is read.
        """
        if self.is_draining:
            raise Unavailable("the server is shutting down", code="draining")
        if len(self.waiting) >= self.most_waiting:
            raise Unavailable(f"the queue is full: {self.most_waiting} requests wait already", code="queue_full")
        return Generation(self, ask)

    def end_all(self) -> None:
        """End what runs: every stream gets an error."""
        for generation in self.running:
            for choice in generation.choices:
                self.services.engine.abort(choice.request.id)


class Generation:
    """One HTTP request. `route` and `prompts` (token ids) are there from the first piece on."""

    def __init__(self, generator: Generator, ask: Ask) -> None:
        self.id = generator.new_id()
        self.route: Route | None = None
        self.prompts: tuple[tuple[int, ...], ...] = ()
        self.choices: tuple[Choice, ...] = ()
        self._generator = generator
        tokenizer = generator.services.tokenizer
        self._ask = ask.of_form(tokenizer.tool_form, tokenizer.special_markers)
        self._arrival = generator.services.clock()
        self._charged: Counter[int] = Counter()  # tokens by choice
        self._is_counted = False  # the decision of a prompt-level router

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(len(prompt) for prompt in self.prompts),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=sum(choice.cached_tokens for choice in self.choices if choice.leader is None),
        )

    @property
    def settled(self) -> Route | None:
        """The route once it is known: a prompt-level router decides in the engine, before the first token."""
        if self.route is None or self.route.prompt_router is None:
            return self.route
        decided = next((choice.decided for choice in self.choices if choice.decided is not None), None)
        return None if decided is None else with_decision(self.route, decided)

    @property
    def routed(self) -> Route | None:
        """The route, as far as it is known, and of a token-level router the shares of its adapters so far."""
        route = self.settled or self.route
        return None if route is None else with_shares(route, [choice.routed for choice in self.choices])

    @property
    def explains(self) -> bool:
        """Whether the client wants to know why."""
        return self._ask.query.options.explain

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self._generator.services.tokenizer

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt of a choice."""
        return self.choices[index].request.prompt

    @property
    def arrival(self) -> float:
        """When it came, by the services' clock."""
        return self._arrival

    @property
    def has_started(self) -> bool:
        """Whether it has got its first token."""
        return any(choice.num_tokens for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The life of the request. To be iterated once, and closed. Raises ServerError."""
        with self._running(), self._generator.quotas.admit(self._ask.tenant.id, self._ask.sequences) as meter:
            info = self._engine_info()
            async with self._in_time():
                self.prompts = await self._reader(info).read()
            with self._accounted(meter):
                async with self._in_time():
                    self.route = await self._decide()
                async with self._lease(self.route) as paths:
                    self.choices = self._make_choices(info, self.route, paths)
                    async with aclosing(interleave([choice.pieces() for choice in self.choices])) as pieces:
                        async for piece in pieces:
                            self._generator.waiting.discard(self)
                            self._charge(meter, self.choices[piece.index])
                            self._count_decision()
                            yield piece

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._generator.running.add(self)
        self._generator.waiting.add(self)
        try:
            yield
        finally:
            self._generator.running.discard(self)
            self._generator.waiting.discard(self)

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """What is done before the engine has the request, and watches its time. Raises DeadlinePassed."""
        left = None
        if self._ask.timeout is not None:
            left = self._arrival + self._ask.timeout - self._generator.services.clock()
        try:
            async with asyncio.timeout(left) as scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlinePassed from None

    @contextmanager
    def _accounted(self, meter: Meter) -> Iterator[None]:
        """The tokens of all prompts are reserved, and what was used is counted at the end, whichever it is.

        A prompt that the engine refused, or lost before the first token of an answer, costs nothing; what it refused
        is not a use either.
        """
        prompt_tokens, has_failed, is_refused = sum(map(len, self.prompts)), False, False
        meter.reserve(prompt_tokens)
        try:
            yield
        except OutputNotFinite:
            raise  # it was computed
        except ServerError as error:
            has_failed, is_refused = True, isinstance(error, BadRequest)
            raise
        finally:
            for choice in self.choices:
                self._charge(meter, choice)
            generated = self._charged.total()
            if not self.choices or (has_failed and not generated):
                meter.give_back(prompt_tokens)
                prompt_tokens = 0
            if self.route is not None and self.choices and (generated or not is_refused):
                route = self.settled or self.route
                self._generator.ledger.count(self._ask.tenant.id, route, prompt_tokens, generated)

    def _charge(self, meter: Meter, choice: Choice) -> None:
        """The tokens that a choice has got since last time."""
        new = choice.num_tokens - self._charged[choice.index]
        if new:
            self._charged[choice.index] += new
            meter.charge(new)

    @asynccontextmanager
    async def _lease(self, route: Route) -> AsyncIterator[Mapping[str, str]]:
        """Folders of the route's adapters by digest, which stay in place meanwhile."""
        try:
            async with self._in_time():
                lease = await self._generator.store.lease(self._ask.tenant.id, route.resolved)
        except UnknownAdapter as error:  # deleted since it was routed to
            raise NotFound(
                f"the adapter {error.name!r} does not exist", param="model", code="model_not_found"
            ) from error
        except BlobError as error:
            raise refusal(error) from error
        try:
            yield lease.paths
        finally:
            self._generator.store.release(lease)

    def _engine_info(self) -> EngineInfo:
        engine = self._generator.services.engine
        info = engine.info
        if info is None or not engine.alive:
            raise Unavailable("the engine is being restarted; please retry", code="engine_unavailable")
        return info

    def _reader(self, info: EngineInfo) -> PromptReader:
        return PromptReader(self._ask, self.tokenizer, info, self._generator.most_scores)

    async def _decide(self) -> Route:
        metrics, query, name = self._generator.services.metrics, self._ask.query, "none"
        try:
            router = self._generator.routers.select(query)
            name = router.name
            if query.is_automatic:
                query = replace(query, text=await self._ask.query_text(self._generator.services.tokenizer))
            route = self._generator.routers.warned(await router.route(query))
        except RouteError as error:
            metrics.route_failed(name)
            raise route_error(error) from error
        except RegistryError as error:
            metrics.route_failed(name)
            raise refusal(error) from error
        if route.prompt_router is None:
            metrics.routed(route)
        return route

    def _count_decision(self) -> None:
        """Of a router that decides in the engine, once that is known."""
        route = self.settled
        if route is not None and route.decided is not None and not self._is_counted:
            self._is_counted = True
            self._generator.services.metrics.routed(route)

    def _make_choices(self, info: EngineInfo, route: Route, paths: Mapping[str, str]) -> tuple[Choice, ...]:
        """`n` choices a prompt, numbered through. A prompt of several blocks is computed by its first choice alone."""
        ask, generator = self._ask, self._generator
        seed = generator.new_seed() if ask.seed is None else ask.seed
        known = route.mix if route.prompt_router is None else BASE  # the engine adds what is decided there
        key = cache_key(info.model_fingerprint, known, ask.tenant.salt)
        shown = self.tokenizer.tool_form.markers if ask.tools is not None else frozenset()
        choices: list[Choice] = []
        for prompt in self.prompts:
            leader: Choice | None = None
            length = info.max_model_len - len(prompt) if ask.max_tokens is None else ask.max_tokens
            params = replace(ask.params, max_tokens=length)
            for number in range(ask.n):
                request = Request(
                    id=f"{self.id}-{len(choices)}",
                    prompt=prompt,
                    params=replace(params, seed=(seed + number) % SEEDS),
                    mix=route.mix,
                    paths=paths,
                    cache_key=key,
                    tenant=ask.tenant.id,
                    weight=ask.tenant.weight,
                    gates=route.gates,
                    prompt_router=route.prompt_router,
                    timeout=ask.timeout,
                    priority=ask.priority,
                )
                stops = StopStrings(ask.stop)
                waits = leader is not None and (len(prompt) > info.block_size or ask.params.prompt_logprobs is not None)
                choice = Choice(
                    len(choices),
                    request,
                    route,
                    stops,
                    generator.services,
                    self._arrival,
                    leader,
                    waits,
                    ask.query.options.explain,
                    shown,
                )
                leader, params = leader or choice, replace(params, prompt_logprobs=None)
                choices.append(choice)
        return tuple(choices)


def route_error(error: RouteError) -> ServerError:
    if error.code == "router_unavailable":
        return Unavailable(str(error), code=error.code)
    is_unknown = error.code.endswith("_not_found")
    return (NotFound if is_unknown else BadRequest)(str(error), param=error.param, code=error.code)
