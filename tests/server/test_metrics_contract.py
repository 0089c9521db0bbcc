"""What Prometheus and the gateways of Kubernetes find at /metrics, in every state of the server."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import Harness
from prometheus_client.parser import text_string_to_metric_families

from adapters_store.registry import Resolved
from adapters_store.types import Composition, Mix
from routing.router import Route, RoutedAdapter
from server.engine.config import EngineStats
from server.journal import Ending
from server.metrics import Metrics
from server.opening import watch_engine

BOTH = {"tenant", "adapter"}
CONTRACT: Mapping[str, set[str]] = {
    "loramux_requests_running": {"engine"},
    "loramux_requests_waiting": {"engine"},
    "loramux_request_success_total": BOTH | {"finish_reason"},
    "loramux_time_to_first_token_seconds_bucket": BOTH | {"le"},
    "loramux_inter_token_latency_seconds_bucket": BOTH | {"le"},
    "loramux_e2e_request_latency_seconds_bucket": BOTH | {"le"},
    "loramux_queue_time_seconds_bucket": BOTH | {"le"},
    "loramux_prefill_time_seconds_bucket": BOTH | {"le"},
    "loramux_decode_time_seconds_bucket": BOTH | {"le"},
    "loramux_prompt_tokens_total": BOTH,
    "loramux_generation_tokens_total": BOTH,
    "loramux_prefix_cache_queries_total": set(),
    "loramux_prefix_cache_hits_total": set(),
    "loramux_kv_cache_usage_ratio": {"engine"},
    "loramux_preemptions_total": set(),
    "loramux_step_seconds_bucket": {"le"},
    "loramux_batch_rows_bucket": {"le"},
    "loramux_route_seconds_bucket": {"router", "le"},
    "loramux_route_total": {"router", "outcome"},
    "loramux_route_cache_hits_total": set(),
    "loramux_adapter_loads_total": {"from", "to"},
    "loramux_adapter_load_seconds_bucket": {"le"},
    "loramux_adapter_evictions_total": {"tier"},
    "loramux_adapters": {"tier"},
    "loramux_rank_pages": {"state"},
    "loramux_quota_rejections_total": {"tenant", "kind"},
    "loramux_http_requests_total": {"method", "endpoint", "status"},
    "vllm:lora_requests_info": {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
    "vllm:num_requests_running": {"engine"},
    "vllm:num_requests_waiting": {"engine"},
    "vllm:kv_cache_usage_perc": {"engine"},
}
"""Labels by sample."""
STATS = EngineStats(
    running=3,
    waiting=2,
    kv_used_blocks=3,
    kv_blocks=4,
    pages={"free": 5, "used": 3},
    adapter_loads=1,
    adapter_reads=(0.1,),
    running_adapters=("digest-b", "digest-a"),
    waiting_adapters=("digest-c",),
    steps=((0.1, 2),),
)


def route_of(name: str) -> Route:
    adapter = RoutedAdapter(Resolved("default", name, f"digest-{name}", True, "config", "weights"), 1.0)
    return Route("explicit", (adapter,), Composition.MIXTURE, Mix(), 0.001, cached=True)


@dataclass(frozen=True)
class Gateway:
    """What an endpoint picker reads: single series, and of the adapters' the one with the latest value."""

    running: float
    waiting: float
    kv_usage: float
    max_lora: int
    running_adapters: list[str]
    waiting_adapters: list[str]


def scrape(text: str) -> Gateway:
    samples: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)

    def single(name: str) -> float:
        (sample,) = samples[name]
        return float(sample.value)

    info = max(samples["vllm:lora_requests_info"], key=lambda sample: sample.value).labels
    return Gateway(
        single("vllm:num_requests_running"),
        single("vllm:num_requests_waiting"),
        single("vllm:kv_cache_usage_perc"),
        int(info["max_lora"]),
        [name for name in info["running_lora_adapters"].split(",") if name],
        [name for name in info["waiting_lora_adapters"].split(",") if name],
    )


class Watched:
    """A harness whose fake engines report to its metrics as real ones do."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.metrics = harness.services.metrics
        self.engine = SimpleNamespace(alive=True, on_stats=None)
        self.engine.members = [self.engine]
        self.now = 1.0

    def start(self) -> None:
        watch_engine(self.engine, self.metrics, self.clock)  # type: ignore[arg-type]

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    async def scraped(self) -> Gateway:
        async with self.harness.client() as client:
            return scrape((await client.get("/metrics")).text)


@pytest.fixture
def watched(make_harness: Callable[..., Harness]) -> Watched:
    watched = Watched(make_harness(max_num_seqs=8))
    watched.start()
    return watched


IDLE = Gateway(0, 0, 0.0, 8, [], [])


async def test_before_the_first_request_and_when_idle(watched: Watched) -> None:
    assert await watched.scraped() == IDLE
    watched.engine.on_stats(0, EngineStats(kv_blocks=4))
    assert await watched.scraped() == IDLE


async def test_with_a_queue_and_after_the_engines_death(watched: Watched) -> None:
    for name in "abc":
        watched.metrics.begin(route_of(name))
    watched.engine.on_stats(0, STATS)
    assert await watched.scraped() == Gateway(3, 2, 0.75, 8, ["a", "b"], ["c"])
    watched.engine.alive = False
    watched.engine.on_stats(0, EngineStats())  # as the client reports it
    for name in "abc":
        watched.metrics.end(Ending("default", route_of(name), "error", 1, 0, 1.0))
    assert await watched.scraped() == IDLE
    value = watched.metrics.registry.get_sample_value
    assert value("loramux_rank_pages", {"state": "used"}) == 0
    assert value("loramux_requests_running", {"engine": "0"}) == 0
    watched.metrics.begin(route_of("a"))
    watched.engine.on_stats(0, EngineStats(running=1, kv_used_blocks=1, kv_blocks=4, running_adapters=("digest-a",)))
    assert await watched.scraped() == Gateway(1, 0, 0.25, 8, ["a"], [])


async def test_while_draining(watched: Watched) -> None:
    watched.metrics.begin(route_of("a"))
    watched.engine.on_stats(0, EngineStats(running=1, kv_used_blocks=2, kv_blocks=4, running_adapters=("digest-a",)))
    watched.harness.services.generator.is_draining = True
    async with watched.harness.client() as client:
        refused = await client.post("/v1/completions", json={"model": "sql", "prompt": "Hi"})
        assert refused.status_code == 503
    assert await watched.scraped() == Gateway(1, 0, 0.5, 8, ["a"], [])
    labels = {"method": "POST", "endpoint": "/v1/completions", "status": "503"}
    assert watched.metrics.registry.get_sample_value("loramux_http_requests_total", labels) == 1


async def test_lists_of_adapters_are_bounded(watched: Watched) -> None:
    for number in range(300):
        watched.metrics.begin(route_of(f"adapter-{number:03}"))
    digests = tuple(f"digest-adapter-{number:03}" for number in range(300))
    watched.engine.on_stats(0, EngineStats(running=300, running_adapters=digests, waiting_adapters=digests))
    found = await watched.scraped()
    assert found.running_adapters == [f"adapter-{number:03}" for number in range(8)]
    assert len(found.waiting_adapters) == 8


def test_everything_that_is_promised() -> None:
    metrics = Metrics()
    route = route_of("sql")
    metrics.begin(route)
    metrics.routed(route, "acme")
    metrics.gap("acme", route, 0.1)
    metrics.quota_rejected("acme", "requests")
    metrics.registered(1)
    metrics.answered("GET", "/v1/models", 200)
    metrics.engine(STATS, 1.0)
    metrics.end(Ending("acme", route, "stop", 1, 1, 1.0, 0.1, 0.1, 0.1, 0.1))
    found = {
        sample.name: set(sample.labels)
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name in CONTRACT
    }
    assert found == CONTRACT
