"""The metrics of several processes are those of one server."""

from dataclasses import fields

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from adapters_store.types import BASE, Composition
from routing.router import Route
from server.engine.config import EngineStats
from server.frontends.tally import Tally
from server.metrics import Ending, Metrics
from server.metrics_sum import COUNTED_BY_ENGINES, Summed, decode, encode, snapshot

STATS = EngineStats(
    running=3,
    waiting=2,
    kv_used_blocks=5,
    kv_blocks=10,
    pages={"used": 4},
    prefix_queries=7,
    prefix_hits=3,
    preemptions=1,
    adapter_loads=2,
    adapter_evictions=1,
    adapter_reads=(0.5,),
    host_evictions=1,
    host_shrinks=1,
    steps=((0.01, 4),),
)


def ended(metrics: Metrics, tokens: int) -> None:
    route = Route(None, (), Composition.MIXTURE, BASE)
    metrics.begin(route)
    metrics.end(Ending("acme", route, "stop", 5, tokens, 0.2, 0.1))


def lines(parts: list[bytes]) -> dict[str, float]:
    text = generate_latest(Summed([decode(part) for part in parts])).decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_requests_add_up_and_engines_are_told_once() -> None:
    parent, fronts = Metrics(), [Metrics(), Metrics()]
    for metrics in (parent, *fronts):
        metrics.engine(STATS, 100.0)
    for number, metrics in enumerate(fronts):
        metrics.registered(9)
        ended(metrics, 10 + number)
    parts = [encode(snapshot(metrics.registry)) for metrics in fronts]
    found = lines([*parts, encode(snapshot(parent.registry, is_parent=True))])
    assert found["loramux_generation_tokens_total"] == 21
    assert found["loramux_e2e_request_latency_seconds_count"] == 2
    assert found["loramux_e2e_request_latency_seconds_sum"] == 0.4
    assert found["loramux_requests_running"] == found["vllm:num_requests_running"] == 3
    assert found["loramux_requests_waiting"] == 2
    assert found["loramux_kv_cache_usage_ratio"] == 0.5
    assert found["loramux_rank_pages"] == 4
    assert found["loramux_adapters"] == 9
    assert found["loramux_prefix_cache_queries_total"] == 7
    assert found["loramux_step_seconds_count"] == 1


def test_what_engines_count_is_what_the_list_says() -> None:
    """A counter that `Metrics.engine` begins to use and the list does not have would be multiplied."""
    quiet = EngineStats()
    states = ("adapters_host", "adapters_device", "host_by", "host_bu", "running_", "waiting_")
    names = [each.name for each in fields(quiet) if not each.name.startswith(states)]
    assert all(getattr(STATS, name) != getattr(quiet, name) for name in names), "the sample has to count everything"
    metrics = Metrics()
    before = {family.name: family for family in snapshot(metrics.registry).families}
    metrics.engine(STATS, 100.0)
    changed = {
        family.name
        for family in snapshot(metrics.registry).families
        if family.kind != "gauge" and family.samples != before[family.name].samples
    }
    assert changed == COUNTED_BY_ENGINES


def test_adapters_in_use_are_those_of_all() -> None:
    fronts = [Metrics(), Metrics()]
    for metrics, name in zip(fronts, ("german", "sql"), strict=True):
        metrics._names["d" + name] = name
        metrics.engine(EngineStats(running_adapters=("dgerman", "dsql")), 50.0)
    text = generate_latest(Summed([snapshot(metrics.registry) for metrics in fronts])).decode()
    (line,) = [line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert 'running_lora_adapters="german,sql"' in line


def test_nothing_is_lost_with_a_process() -> None:
    """The sum does not fall when a front end dies, nor when it is too late to answer."""
    tally = Tally(Metrics().registry)
    first, second, third = Metrics(), Metrics(), Metrics()
    ended(first, 10)
    ended(second, 20)
    mine = encode(snapshot(first.registry))
    tally.note("0.1", mine)
    tally.note("1.1", encode(snapshot(second.registry)))
    assert lines([mine, *tally.others("0.1")])["loramux_generation_tokens_total"] == 30
    tally.gone("1.1")
    ended(third, 1)
    tally.note("1.2", encode(snapshot(third.registry)))
    found = lines([mine, *tally.others("0.1")])
    assert found["loramux_generation_tokens_total"] == 31
