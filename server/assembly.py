"""The composition root: which service knows which others."""

import secrets
import time
import uuid
from collections.abc import Callable

from adapters_store.store import AdapterStore
from routing.encoder import EncoderProcess
from routing.router import ExplicitRouter, Routers
from server.accounts import AccountService
from server.catalog import Catalog, policies
from server.chat import ChatTokenizer
from server.choice import ChoiceServices
from server.choices import SEEDS
from server.config import ServeSettings, Settings
from server.deps import Services, ServingEngine
from server.generation import Generator
from server.key_ring import KeyRing
from server.leases_elsewhere import LeasesElsewhere
from server.lender import Lender
from server.metrics import Metrics
from server.metrics_sum import answer_others
from server.observer import Observer, Tracer
from server.part import Part
from server.process_state import Processes
from server.quotas import QuotaGate
from server.router_setup import embedder_of, router_service
from server.tenants import Keys, Tenants
from server.usage import UsageLedger
from server.waiting import Waiting


def assemble(
    settings: Settings,
    served_name: str,
    engine: ServingEngine,
    store: AdapterStore,
    tokenizer: ChatTokenizer,
    fingerprint: str,
    process: EncoderProcess | None = None,
    absent: str = "it has no encoder",
    tracer: Tracer | None = None,
    part: Part | None = None,
    now: Callable[[], float] = time.time,
) -> Services:
    """The services around an engine, a store and a tokenizer.

    `fingerprint` is the base model's; `absent` says why there is no encoder `process`. Without a `tracer` nothing is
    traced. `now` gives seconds since the epoch.
    """
    serve, part = settings.serve, part or Part()
    metrics = Metrics(serve.metrics_max_adapters, serve.max_num_seqs * serve.engines)
    metrics.registered(store.registry.count())
    tenants, ring = Tenants(), KeyRing()
    accounts = AccountService(store.registry.accounts, tenants, ring, secrets.token_bytes)
    quotas = QuotaGate(tenants, time.perf_counter, metrics.quota_rejected, _lender(store, serve, part))
    usage = UsageLedger(store.registry, now, uuid.uuid4().hex)
    catalog = Catalog(store, engine, policies(settings), time.monotonic, settings.limits.uploads)
    catalog.on_rejection = metrics.quota_rejected
    usage.on_use = catalog.residency.used
    explicit = ExplicitRouter(store, served_name, time.perf_counter)
    routers = Routers(explicit, default=serve.default_router, absent=absent)
    service = router_service(settings, store, routers, process, fingerprint)
    catalog.on_change = service.follow
    generator = Generator(
        ChoiceServices(engine, tokenizer, metrics, time.perf_counter),
        store,
        routers,
        quotas,
        usage,
        new_id=lambda: uuid.uuid4().hex,
        new_seed=lambda: secrets.randbelow(SEEDS),
        most_scores=settings.limits.prompt_logprobs,
        waiting=Waiting(serve.max_waiting, time.perf_counter, part.slot),
        log_prompts=serve.log_prompts,
        fetches=part.fetches,
    )
    accounts.load()
    answer_others(metrics.registry, part.siblings)
    store.share_with(LeasesElsewhere(part.siblings, store))
    return Services(
        served_name=served_name,
        engine=engine,
        store=store,
        catalog=catalog,
        routers=service,
        tokenizer=tokenizer,
        embedder=embedder_of(settings, process),
        generator=generator,
        metrics=metrics,
        keys=_keys(serve, ring, tenants),
        accounts=accounts,
        quotas=quotas,
        usage=usage,
        siblings=part.siblings,
        processes=Processes(part.siblings, generator, lambda: catalog.slots.taken),
        limits=settings.limits,
        http=settings.http,
        metrics_public=serve.metrics_public,
        observer=Observer(metrics, time.perf_counter, tracer),
        now=now,
        started=now(),
    )


def _lender(store: AdapterStore, serve: ServeSettings, part: Part) -> Lender | None:
    """None where all quotas are this process's own."""
    if not part.shares_registry(serve):
        return None
    return Lender(store.registry.budgets(part.name), time.monotonic, serve.frontends)


def _keys(serve: ServeSettings, ring: KeyRing, tenants: Tenants) -> Keys:
    return Keys(
        [key.get_secret_value() for key in serve.api_key],
        serve.admin_key.get_secret_value() if serve.admin_key is not None else None,
        serve.metrics_key.get_secret_value() if serve.metrics_key is not None else None,
        ring,
        tenants,
    )
