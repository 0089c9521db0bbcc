"""One soak: tenants, traffic, faults, and the checks behind them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from loadtests.process import KEY, ServerProcess
from loadtests.soak.adapter_faults import AdapterFaults
from loadtests.soak.answers import Answers
from loadtests.soak.checks import check_answers, check_bill, check_leases, check_rest, until_idle
from loadtests.soak.client_faults import ClientFaults
from loadtests.soak.engine_faults import STALL_SECONDS, EngineFaults
from loadtests.soak.faults import Fault, Injector, Report
from loadtests.soak.key_faults import Keys, bearer
from loadtests.soak.leaks import Sample, grown, growth
from loadtests.soak.places import Place
from loadtests.soak.seen import Seen
from loadtests.soak.told import Told
from loadtests.soak.traffic import Client, Manners, Stranger, World

Json = dict[str, Any]

TENANTS = {
    "patient": Manners(billed=True, sees_private=True),
    "hasty": Manners(leaves=True, is_slow=True),
    "limited": Manners(limited=True),
}
"""Private adapters are the patient one's; the hasty one's keys are replaced. A stranger looks for what is others'."""
QUOTAS = {"limited": {"requests_per_second": 2, "concurrency": 2, "tokens_per_minute": 3000}}
SAMPLE_SECONDS = 2.0
TOLD_SECONDS = 30.0
"""Between two lines about how far it is."""
STUCK_MINUTES = 4.0
"""A stuck engine takes half a minute, which shorter runs do not have."""


@dataclass(frozen=True)
class Plan:
    """What was asked for. `clients` of each tenant; `fault_seconds`: between two faults of a row, on average."""

    minutes: float
    clients: int
    fault_seconds: float
    seed: int


class Soak:
    """A soak of the model in a folder, with `adapters` by name to be there before it begins.

    `say` gets a sentence now and then about how far it is. `logs` are those of the servers that have ended.
    """

    def __init__(
        self, place: Place, model: Path, adapters: Mapping[str, Path], plan: Plan, say: Callable[[str], object]
    ) -> None:
        self.logs: list[str] = []
        self._place = place
        self._model = model
        self._adapters = adapters
        self._plan = plan
        self._say = say
        self._report = Report()
        self._seen = Seen()
        self._told = Told()
        self._samples: list[Sample] = []
        self._at_rest: list[Sample] = []

    async def run(self) -> Json:
        """The document; `broken` is empty if everything held. What fails on the way is told there, too."""
        adapters = answers = None
        with self._seen.telling("the first server"), self._server() as server:
            async with AsyncExitStack() as stack:
                admin = await stack.enter_async_context(client(server.url, bearer(KEY)))
                adapters, answers = await self._traffic(server, admin, stack)
            await self._finish(server)
        if adapters is not None and answers is not None:
            with self._seen.telling("the second server"), self._server() as server:
                await self._look_again(server, adapters, answers)
        return self._document()

    @contextmanager
    def _server(self) -> Iterator[ServerProcess]:
        options = ("--max-model-len", "512", "--encoder", "none", "--kv-memory", "256MiB", "--page-memory", "64MiB")
        stalls = ("--stall-timeout", str(STALL_SECONDS)) if self._has_time else ()
        server = self._place.server(self._model, *options, *stalls)
        try:
            with server:
                yield server
        finally:
            self.logs.append(server.log)
        if server.exit_code:
            self._seen.breaks(f"the front end ended with code {server.exit_code}")

    @property
    def _has_time(self) -> bool:
        """For an engine that gets stuck."""
        return self._plan.minutes >= STUCK_MINUTES

    async def _traffic(
        self, server: ServerProcess, admin: httpx.AsyncClient, stack: AsyncExitStack
    ) -> tuple[AdapterFaults, Answers]:
        """Everything that goes on beside each other, until its time is over."""
        keys = {tenant: await self._tenant(admin, tenant) for tenant in (*TENANTS, "stranger")}
        self._owner = bearer(keys["patient"].current)
        clients = {tenant: await stack.enter_async_context(client(server.url, {})) for tenant in TENANTS}
        owner = await stack.enter_async_context(client(server.url, self._owner))
        stranger = await stack.enter_async_context(client(server.url, bearer(keys["stranger"].current)))
        digests = {name: await register(admin, name, folder) for name, folder in self._adapters.items()}
        answers = await Answers.ask(admin, self._model.name, digests)
        world = World(self._model.name, tuple(digests), self._told, answers, self._seen)
        for name, digest in digests.items():
            self._told.possible[name] = frozenset((digest,))
        by_digest = {digest: self._adapters[name] for name, digest in digests.items()}
        faults = AdapterFaults(admin, owner, by_digest, self._told, self._seen, self._plan.seed, frozenset(digests))
        self._at_rest.append(Sample.of(server.pid))
        stop = asyncio.Event()
        traffic = [
            Client(http, keys[tenant], TENANTS[tenant], world, f"{self._plan.seed} {tenant} {place}").run(stop)
            for tenant, http in clients.items()
            for place in range(self._plan.clients)
        ]
        rows = self._rows(server, admin, faults, keys["hasty"])
        injecting = [injector.run(self._plan.fault_seconds, stop) for injector in rows]
        tasks = [*traffic, Stranger(stranger, self._told, self._seen).run(stop), *injecting]
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(task)
            with self._seen.telling("the watch over the front end"):
                await self._watch(server)
            stop.set()
        return faults, answers

    def _rows(
        self, server: ServerProcess, admin: httpx.AsyncClient, adapters: AdapterFaults, keys: Keys
    ) -> list[Injector]:
        """Faults of different rows meet each other."""
        seed, model = self._plan.seed, self._model.name
        self._engines = EngineFaults(server.pid, admin, model, self._report, self._seen)
        kinds: list[dict[str, tuple[float, Fault]]] = [
            self._engines.kinds(stuck=self._has_time),
            self._place.faults(server.pid, seed).kinds(),
            {**adapters.kinds(), "key replaced": (1.0, keys.rotate)},
            ClientFaults(server.url, KEY, model, self._seen, seed).kinds(),
        ]
        return [Injector(row, self._report, self._seen, seed + number) for number, row in enumerate(kinds)]

    async def _watch(self, server: ServerProcess) -> None:
        """Until the time is over, or the front end is."""
        started = told = time.monotonic()
        while (now := time.monotonic()) < started + 60 * self._plan.minutes:
            if server.exit_code is not None:
                self._seen.breaks(f"the front end ended with code {server.exit_code} in the middle")
                return
            with suppress(OSError):  # it has just ended: its code is there in a moment
                self._samples.append(Sample.of(server.pid))
            if now - told >= TOLD_SECONDS:
                told = now
                self._tell(now - started)
            await asyncio.sleep(min(SAMPLE_SECONDS, self._plan.minutes))

    def _tell(self, seconds: float) -> None:
        seen, faults = self._seen, self._report.number
        self._say(f"{seconds:.0f} s: {seen.requests} requests, {faults} faults, {len(seen.broken)} broken")

    async def _finish(self, server: ServerProcess) -> None:
        """Nobody asks any more, and no client is connected but this one."""
        self._say("the time is over: what is left behind?")
        self._seen.broken += grown(self._samples)
        async with client(server.url, bearer(KEY)) as admin:
            with self._seen.telling("the wait for the last request"):
                await until_idle(admin, self._seen)
            with self._seen.telling("the look at what the front end holds"):
                self._at_rest.append(await check_rest(server.pid, self._at_rest[0], self._seen))
            with self._seen.telling("the look at engines"):
                self._engines.check()
            with self._seen.telling("the look at leases"):
                await check_leases(admin, (*TENANTS, "default"), self._told, self._seen)
            with self._seen.telling("the look at the ledger"):
                await check_bill(admin, "patient", self._seen)

    async def _look_again(self, server: ServerProcess, adapters: AdapterFaults, answers: Answers) -> None:
        """What was told is there for those who come after."""
        async with client(server.url, bearer(KEY)) as admin, client(server.url, self._owner) as owner:
            adapters.use(admin, owner)
            with self._seen.telling("the look at what was told"):
                await adapters.verify()
            with self._seen.telling("the look at the ledger after a restart"):
                await check_bill(admin, "patient", self._seen)
            with self._seen.telling("the look at answers after a restart"):
                await check_answers(owner, self._told, self._model.name, answers, self._seen)
            with self._seen.telling("the end of all adapters"):
                await adapters.clean()

    async def _tenant(self, admin: httpx.AsyncClient, tenant: str) -> Keys:
        made = await admin.post("/admin/v1/tenants", json={"id": tenant, "quotas": QUOTAS.get(tenant, {})})
        made.raise_for_status()
        keys = Keys(admin, tenant, self._seen)
        if not await keys.make():
            raise RuntimeError(f"no key can be made for {tenant}")
        return keys

    def _document(self) -> Json:
        report, seen = self._report, self._seen
        recoveries = sorted(report.recoveries)
        return {
            "minutes": self._plan.minutes,
            "seed": self._plan.seed,
            "place": self._place.name,
            "left_out": [*self._place.left_out, *(() if self._has_time else ("engine stuck: too short",))],
            "requests": seen.requests,
            "compared_answers": seen.compared,
            "billed_tokens": seen.prompt_tokens + seen.tokens,
            "endings": dict(sorted(seen.endings.items())),
            "faults": report.number,
            "outcomes": {name: dict(found) for name, found in sorted(report.outcomes.items())},
            "recovery_seconds": {
                "number": len(recoveries),
                "median": round(median(recoveries), 2) if recoveries else None,
                "worst": round(recoveries[-1], 2) if recoveries else None,
            },
            "memory_mb": [round(each.memory / 2**20) for each in self._at_rest],
            "descriptors": [each.descriptors for each in self._at_rest],
            "threads": [each.threads for each in self._at_rest],
            "growth": {name: round(more) for name, more in growth(self._samples).items()},
            "broken": seen.broken,
        }


@asynccontextmanager
async def client(url: str, headers: Mapping[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """Patient enough for everything that is done to the server."""
    # None are kept: whoever sends on one that the server is just closing sees it break.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits) as opened:
        yield opened


async def register(admin: httpx.AsyncClient, name: str, folder: Path) -> str:
    """A public adapter: its digest."""
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    answer = await admin.post("/admin/v1/adapters", data={"name": name, "public": "true"}, files=files)
    digest: str = answer.raise_for_status().json()["digest"]
    return digest
