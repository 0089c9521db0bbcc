"""The biography of a request: template -> route -> lease -> submit -> stream -> account.

A route handler starts a `Generation` and iterates over its pieces. Whatever happens on the way, the adapters' lease is
released once, each choice is accounted for once, and closing the iteration ends the work in the engine.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

from adapters_store.blobs import BlobError
from adapters_store.registry import RegistryError
from adapters_store.store import AdapterStore, UnknownAdapter
from routing.router import Route, RouteError, Routers
from server.ask import Ask
from server.bill import Bill
from server.chat import ChatTokenizer
from server.choice import Choice, ChoiceServices, Piece
from server.choices import Order
from server.engine.config import EngineInfo
from server.errors import BadRequest, DeadlinePassed, NotFound, ServerError, Unavailable, refusal
from server.interleave import interleave
from server.journal import Phase, current, log_names
from server.prompt_decisions import with_decision
from server.prompt_log import log_prompt
from server.prompts import PromptReader
from server.quotas import QuotaGate
from server.routed_tokens import with_shares
from server.usage import UsageLedger
from server.waiting import Waiting


@dataclass(frozen=True)
class Usage:
    """Tokens of one HTTP request. A prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generator:
    """Starts generations. `new_id` and `new_seed` never repeat themselves; a seed is below 2**63.

    A request gets at most `most_scores` log-probabilities of prompt tokens. With `fetches` this process makes the
    folders of adapters that engines read; without, engines make their own, by digest.
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
        waiting: Waiting,
        log_prompts: bool = False,
        fetches: bool = True,
    ) -> None:
        self.services = services
        self.fetches = fetches
        self.store = store
        self.routers = routers
        self.quotas = quotas
        self.ledger = ledger
        self.new_id = new_id
        self.new_seed = new_seed
        self.most_scores = most_scores
        self.waiting = waiting
        self.log_prompts = log_prompts
        self.is_draining = False
        self.running: set[Generation] = set()

    def start(self, ask: Ask) -> "Generation":
        """A generation, of which nothing has happened yet.

        Raises Unavailable when the server is shutting down, and what `Waiting.check` raises.
        """
        if self.is_draining:
            raise Unavailable("the server is shutting down", code="draining")
        self.waiting.check(ask.tenant, ask.timeout, is_urgent=ask.priority < 0)
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
        self._is_counted = False  # the decision of a prompt-level router
        self._waits = True
        self._journal = current()
        if self._journal is not None:
            self._journal.asked = ask.noted(self.id, self._arrival)

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
    def known(self) -> Route | None:
        """The route as far as it is known."""
        return self.settled or self.route

    @property
    def routed(self) -> Route | None:
        """The same, and of a token-level router the shares of its adapters so far."""
        route = self.known
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
        tenant = self._ask.tenant.id
        quotas, sequences = self._generator.quotas, self._ask.sequences
        await quotas.fund(tenant, tokens=1, sequences=sequences)
        with self._running(), quotas.admit(tenant, sequences) as meter:
            info = self._engine_info()
            if self._generator.log_prompts:
                log_prompt(self._ask)
            async with self._in_time("prompt"):
                self.prompts = await self._reader(info).read()
                await quotas.fund(tenant, tokens=sum(map(len, self.prompts)))
            bill = Bill(meter, self._generator.ledger, tenant)
            with bill.open(self, sum(map(len, self.prompts))):
                async with self._in_time("route"):
                    self.route = await self._decide()
                async with self._lease(self.route) as paths:
                    self.choices = self._make_choices(info, self.route, paths)
                    async with aclosing(interleave([choice.pieces() for choice in self.choices])) as pieces:
                        async for piece in pieces:
                            self._end_wait(started=True)
                            bill.charge(self.choices[piece.index])
                            self._note_decision()
                            yield piece

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._generator.running.add(self)
        self._generator.waiting.enter(self._ask.tenant)
        try:
            yield
        finally:
            self._generator.running.discard(self)
            self._end_wait(started=False)
            self._write_down()

    def _end_wait(self, *, started: bool) -> None:
        """Its first piece has come, or it has ended without one."""
        if self._waits:
            self._waits = False
            self._generator.waiting.leave(self._ask.tenant, started=started)

    def _write_down(self) -> None:
        """What has become of it, into the journal of the HTTP request that it belongs to."""
        if self._journal is not None:
            self._journal.route = self.routed
            self._journal.endings += [choice.ending for choice in self.choices if choice.ending is not None]

    @asynccontextmanager
    async def _in_time(self, phase: str) -> AsyncIterator[None]:
        """What is done before the engine has the request, and watches its time. Raises DeadlinePassed."""
        clock = self._generator.services.clock
        started, error = clock(), None
        left = None if self._ask.timeout is None else self._arrival + self._ask.timeout - started
        try:
            async with asyncio.timeout(left) as scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            error = DeadlinePassed.code
            raise DeadlinePassed from None
        except ServerError as caught:
            error = caught.code
            raise
        finally:
            if self._journal is not None:
                self._journal.phases.append(Phase(phase, started, clock(), error))

    @asynccontextmanager
    async def _lease(self, route: Route) -> AsyncIterator[Mapping[str, str]]:
        """Folders of the route's adapters by digest, which stay in place meanwhile."""
        try:
            async with self._in_time("lease"):
                generator, tenant = self._generator, self._ask.tenant.id
                lease = await generator.store.lease(tenant, route.resolved, fetch=generator.fetches)
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
            metrics.routed(route, query.tenant)
        if self._journal is not None:
            self._journal.route = route
        return route

    def _note_decision(self) -> None:
        """Of a router that decides in the engine, once that is known."""
        route = self.settled if not self._is_counted else None
        if route is not None and route.decided is not None:
            self._is_counted = True
            self._generator.services.metrics.routed(route, self._ask.tenant.id)

    def _make_choices(self, info: EngineInfo, route: Route, paths: Mapping[str, str]) -> tuple[Choice, ...]:
        ask, generator = self._ask, self._generator
        seed = generator.new_seed() if ask.seed is None else ask.seed
        order = Order(self.id, ask, route, paths, self.prompts, self._arrival, seed, log_names(self._journal))
        return order.choices(generator.services, info)


def route_error(error: RouteError) -> ServerError:
    if error.code == "router_unavailable":
        return Unavailable(str(error), code=error.code)
    is_unknown = error.code.endswith("_not_found")
    return (NotFound if is_unknown else BadRequest)(str(error), param=error.param, code=error.code)
