"""What is counted, and under which labels."""

from dataclasses import replace

from adapters_store.registry import Resolved
from adapters_store.types import Composition, Mix
from routing.router import Route, RoutedAdapter
from server.engine.config import EngineStats
from server.journal import Ending
from server.labels import OTHER, TopLabels
from server.metrics import Metrics


def route_of(*names: str) -> Route:
    named = [Resolved("default", name, f"digest-{name}", True, "config", "weights") for name in names]
    adapters = tuple(RoutedAdapter(each, 1.0) for each in named)
    return Route("explicit" if names else None, adapters, Composition.MIXTURE, Mix(), seconds=0.001)


def ending_of(route: Route, reason: str = "stop") -> Ending:
    return Ending("default", route, reason, prompt_tokens=3, generation_tokens=5, e2e=0.5, first_token=0.1, decode=0.4)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    found: float | None = metrics.registry.get_sample_value(name, labels)
    return found


def serve(metrics: Metrics, route: Route, reason: str = "stop") -> None:
    metrics.routed(route, "default")
    metrics.begin(route)
    metrics.end(ending_of(route, reason))


def test_requests_by_adapter() -> None:
    metrics = Metrics()
    for route in (route_of(), route_of("sql"), route_of("sql"), route_of("b", "a")):
        serve(metrics, route)
    serve(metrics, route_of("sql"), "abort")
    success = "loramux_request_success_total"
    assert value(metrics, success, tenant="default", adapter="base", finish_reason="stop") == 1
    assert value(metrics, success, tenant="default", adapter="sql", finish_reason="stop") == 2
    assert value(metrics, success, tenant="default", adapter="sql", finish_reason="abort") == 1
    assert value(metrics, success, tenant="default", adapter="a+b", finish_reason="stop") == 1
    assert value(metrics, "loramux_prompt_tokens_total", tenant="default", adapter="sql") == 9
    assert value(metrics, "loramux_generation_tokens_total", tenant="default", adapter="base") == 5
    first = "loramux_time_to_first_token_seconds"
    assert value(metrics, f"{first}_count", tenant="default", adapter="sql") == 3
    assert value(metrics, f"{first}_bucket", tenant="default", adapter="base", le="0.08") == 0
    assert value(metrics, f"{first}_bucket", tenant="default", adapter="base", le="0.1") == 1
    assert value(metrics, "loramux_queue_time_seconds_count", tenant="default", adapter="sql") is None
    assert value(metrics, "loramux_route_total", router="explicit", outcome="routed") == 4
    assert value(metrics, "loramux_route_total", router="base", outcome="base") == 1


def test_engine_counters_survive_a_restart_of_the_engine() -> None:
    metrics = Metrics()
    metrics.engine(EngineStats(prefix_queries=10, prefix_hits=4, adapter_loads=2, steps=((0.01, 3), (0.2, 40))), 1.0)
    metrics.engine(
        EngineStats(adapter_reads=(0.5, 0.25), host_evictions=3, prefix_queries=10, prefix_hits=4, adapter_loads=2), 1.5
    )
    metrics.engine(EngineStats(prefix_queries=15, prefix_hits=4, adapter_loads=2), 2.0)
    metrics.engine(EngineStats(), 3.0)
    metrics.engine(EngineStats(prefix_queries=7, preemptions=1, adapter_evictions=1), 4.0)
    assert value(metrics, "loramux_prefix_cache_queries_total") == 22
    assert value(metrics, "loramux_prefix_cache_hits_total") == 4
    assert value(metrics, "loramux_preemptions_total") == 1
    assert value(metrics, "loramux_adapter_loads_total", **{"from": "host", "to": "device"}) == 2
    assert value(metrics, "loramux_adapter_loads_total", **{"from": "disk", "to": "host"}) == 2
    assert value(metrics, "loramux_adapter_load_seconds_sum") == 0.75
    assert value(metrics, "loramux_adapter_evictions_total", tier="host") == 3
    assert value(metrics, "loramux_adapter_evictions_total", tier="device") == 1
    assert value(metrics, "loramux_step_seconds_count") == 2
    assert value(metrics, "loramux_batch_rows_sum") == 43


def test_engine_gauges() -> None:
    metrics = Metrics()
    metrics.registered(9)
    stats = EngineStats(
        running=3, waiting=2, kv_used_blocks=1, kv_blocks=4, pages={"free": 5}, adapters_host=7, adapters_device=6
    )
    metrics.engine(stats, 1.0)
    for name in ("loramux_requests_running", "vllm:num_requests_running"):
        assert value(metrics, name, engine="0") == 3
    for name in ("loramux_requests_waiting", "vllm:num_requests_waiting"):
        assert value(metrics, name, engine="0") == 2
    for name in ("loramux_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"):
        assert value(metrics, name, engine="0") == 0.25
    assert value(metrics, "loramux_rank_pages", state="free") == 5
    assert [value(metrics, "loramux_adapters", tier=tier) for tier in ("disk", "host", "device")] == [9, 7, 6]


def test_several_engines_are_one_to_gateways_and_counted_together() -> None:
    metrics = Metrics(max_num_seqs=16)
    metrics.begin(route_of("a", "b"))
    first = EngineStats(running=3, kv_used_blocks=6, kv_blocks=8, pages={"free": 5}, adapters_device=1, preemptions=2)
    second = EngineStats(waiting=4, kv_used_blocks=2, kv_blocks=8, pages={"free": 2}, adapters_device=2, preemptions=1)
    metrics.engine(replace(first, running_adapters=("digest-a",)), 1.0, "0")
    metrics.engine(replace(second, running_adapters=("digest-b",), waiting_adapters=("digest-a",)), 2.0, "1")
    assert [value(metrics, "loramux_requests_running", engine=name) for name in "01"] == [3, 0]
    assert [value(metrics, "loramux_kv_cache_usage_ratio", engine=name) for name in "01"] == [0.75, 0.25]
    for name, number in (("num_requests_running", 3), ("num_requests_waiting", 4), ("kv_cache_usage_perc", 0.5)):
        assert value(metrics, f"vllm:{name}", engine="0") == number
        assert value(metrics, f"vllm:{name}", engine="1") is None
    info = "vllm:lora_requests_info"
    assert value(metrics, info, max_lora="16", running_lora_adapters="a,b", waiting_lora_adapters="a") == 2.0
    assert value(metrics, "loramux_rank_pages", state="free") == 7
    assert value(metrics, "loramux_adapters", tier="device") == 3
    metrics.engine(EngineStats(), 3.0, "0")  # it died, and starts to count anew
    metrics.engine(EngineStats(preemptions=1), 4.0, "0")
    assert value(metrics, "loramux_preemptions_total") == 4
    assert value(metrics, "loramux_adapters", tier="device") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc", engine="0") == 0.25


def test_whether_engines_live_is_asked_when_metrics_are_read() -> None:
    metrics, living = Metrics(), {"0", "1"}
    for name in "01":
        metrics.watch(name, lambda name=name: name in living)
    assert [value(metrics, "loramux_engine_up", engine=name) for name in "01"] == [1, 1]
    living.remove("0")
    assert [value(metrics, "loramux_engine_up", engine=name) for name in "01"] == [0, 1]
    metrics.moved()
    assert value(metrics, "loramux_requests_moved_total") == 1


def test_gateways_see_the_names_of_adapters_in_use() -> None:
    metrics = Metrics(max_num_seqs=8)
    mix = route_of("b", "a")
    metrics.begin(mix)
    metrics.engine(EngineStats(running_adapters=("digest-b", "digest-a"), waiting_adapters=("digest-gone",)), 17.0)
    info = "vllm:lora_requests_info"
    assert value(metrics, info, max_lora="8", running_lora_adapters="a,b", waiting_lora_adapters="") == 17.0
    metrics.end(ending_of(mix))
    metrics.engine(EngineStats(running_adapters=("digest-b",)), 18.0)
    assert value(metrics, info, max_lora="8", running_lora_adapters="a,b", waiting_lora_adapters="") is None
    assert value(metrics, info, max_lora="8", running_lora_adapters="", waiting_lora_adapters="") == 18.0


def test_adapter_labels_are_bounded() -> None:
    metrics = Metrics(max_adapters=3)
    for number in range(50):
        serve(metrics, route_of(f"adapter-{number}"))
    labels = {
        sample.labels["adapter"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if "adapter" in sample.labels
    }
    assert len(labels) == 4
    assert OTHER in labels
    total = sum(
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "loramux_request_success_total"
    )
    assert total == 50


def test_the_most_used_get_labels() -> None:
    metrics = Metrics(max_adapters=2)
    for name in ("one", "two", "one"):
        serve(metrics, route_of(name))
    for _ in range(3):
        serve(metrics, route_of("star"))
    success = "loramux_request_success_total"
    assert value(metrics, success, tenant="default", adapter="star", finish_reason="stop") == 2
    assert value(metrics, success, tenant="default", adapter="two", finish_reason="stop") is None
    assert value(metrics, success, tenant="default", adapter="one", finish_reason="stop") == 2


def test_counted_names_are_bounded() -> None:
    dropped: list[str] = []
    labels: TopLabels[str] = TopLabels(2, dropped.append)
    for number in range(1000):
        labels.use(f"name-{number}")
        labels.use("often")
    assert len(labels._uses) <= 20
    assert "often" in labels


def test_long_mixes_have_short_labels() -> None:
    assert route_of(*(f"adapter-{number}" for number in range(100))).label == "100 adapters"


def test_gaps_follow_labels_that_come_and_go() -> None:
    """An adapter that lost its label is counted under the common one, and not forgotten when it has one again."""
    metrics = Metrics(max_adapters=1)
    count = "loramux_inter_token_latency_seconds_count"
    serve(metrics, route_of("one"))
    metrics.gap("default", route_of("one"), 0.1)
    assert value(metrics, count, tenant="default", adapter="one") == 1
    for _ in range(2):
        serve(metrics, route_of("star"))
    metrics.gap("default", route_of("one"), 0.1)
    metrics.gap("default", route_of("star"), 0.1)
    assert value(metrics, count, tenant="default", adapter="one") is None
    assert value(metrics, count, tenant="default", adapter="other") == 1
    assert value(metrics, count, tenant="default", adapter="star") == 1
    for _ in range(4):
        serve(metrics, route_of("one"))
    metrics.gap("default", route_of("one"), 0.1)
    assert value(metrics, count, tenant="default", adapter="one") == 1
    assert value(metrics, count, tenant="default", adapter="star") is None
