"""One soak: tenants, traffic, faults, and the checks behind them."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from loadtests.process import KEY, ServerProcess
from loadtests.soak.adapter_faults import AdapterFaults
from loadtests.soak.answers import Answers
from loadtests.soak.checks import check_answers, check_bill, check_leases, until_idle
from loadtests.soak.client_faults import ClientFaults
from loadtests.soak.engine_faults import STALL_SECONDS, EngineFaults
from loadtests.soak.faults import Fault, Injector, Report
from loadtests.soak.key_faults import Keys, bearer
from loadtests.soak.leaks import Sample, grown
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
    """A soak of the model in a folder, with `adapters` by name to be there before it begins."""

    def __init__(self, place: Place, model: Path, adapters: Mapping[str, Path], plan: Plan) -> None:
        self._place = place
        self._model = model
        self._adapters = adapters
        self._plan = plan
        self._report = Report()
        self._seen = Seen()
        self._told = Told()
        self._samples: list[Sample] = []

    async def run(self) -> Json:
        """The document; `broken` is empty if everything held."""
        with self._server() as server:
            async with AsyncExitStack() as stack:
                admin = await stack.enter_async_context(client(server.url, bearer(KEY)))
                adapters, answers = await self._traffic(server, admin, stack)
            await self._finish(server)
        with self._server() as server:  # what was told is there for those who come after
            async with client(server.url, bearer(KEY)) as admin, client(server.url, self._owner) as owner:
                adapters.use(admin, owner)
                await adapters.verify()
                await check_answers(owner, self._told, self._model.name, answers, self._seen)
                await adapters.clean()
        return self._document()

    def _server(self) -> ServerProcess:
        options = ("--max-model-len", "512", "--encoder", "none", "--kv-memory", "256MiB", "--page-memory", "64MiB")
        stalls = ("--stall-timeout", str(STALL_SECONDS)) if self._has_time else ()
        return self._place.server(self._model, *options, *stalls)

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
        stop = asyncio.Event()
        traffic = [
            Client(http, keys[tenant], TENANTS[tenant], world, self._plan.seed + place).run(stop)
            for tenant, http in clients.items()
            for place in range(self._plan.clients)
        ]
        rows = self._rows(server, admin, faults, keys["hasty"])
        injecting = [injector.run(self._plan.fault_seconds, stop) for injector in rows]
        tasks = [asyncio.create_task(each) for each in (*traffic, Stranger(stranger, self._told, self._seen).run(stop))]
        tasks += [asyncio.create_task(each) for each in injecting]
        await self._watch(server.pid, tasks)
        stop.set()
        await asyncio.gather(*tasks)
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
        return [Injector(row, self._report, seed + number) for number, row in enumerate(kinds)]

    async def _watch(self, pid: int, tasks: Sequence["asyncio.Task[None]"]) -> None:
        """Until the time is over, or a task failed."""
        deadline = time.monotonic() + 60 * self._plan.minutes
        while time.monotonic() < deadline and not any(task.done() for task in tasks):
            self._samples.append(Sample.of(pid))
            await asyncio.sleep(min(SAMPLE_SECONDS, self._plan.minutes))
        self._samples.append(Sample.of(pid))

    async def _finish(self, server: ServerProcess) -> None:
        """Nobody asks any more, and no client is connected but this one."""
        async with client(server.url, bearer(KEY)) as admin:
            await until_idle(admin, self._seen)
            self._engines.check()
            await check_leases(admin, (*TENANTS, "default"), self._told, self._seen)
            await check_bill(admin, "patient", self._seen)
        self._seen.broken += grown(self._samples)

    async def _tenant(self, admin: httpx.AsyncClient, tenant: str) -> Keys:
        made = await admin.post("/admin/v1/tenants", json={"id": tenant, "quotas": QUOTAS.get(tenant, {})})
        made.raise_for_status()
        keys = Keys(admin, tenant, self._seen)
        await keys.make()
        return keys

    def _document(self) -> Json:
        report, seen = self._report, self._seen
        first, last = self._samples[0], self._samples[-1]
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
            "memory_mb": [round(each.memory / 2**20) for each in (first, last)],
            "descriptors": [first.descriptors, last.descriptors],
            "threads": [first.threads, last.threads],
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
