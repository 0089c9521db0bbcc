"""Labels stay few, whatever names come, and the most used have them."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from adapters_store.registry import Resolved
from adapters_store.types import Composition, Mix
from routing.router import Route, RoutedAdapter
from server.journal import Ending
from server.labels import LEAD, OTHER, PAIRS, RequestLabels, TopLabels
from server.loop_histogram import LoopHistogram
from server.metrics import GAP, Metrics

LIMIT = 20


def route_of(*names: str) -> Route:
    named = [Resolved("default", name, f"digest-{name}", True, "config", "weights") for name in names]
    return Route("explicit", tuple(RoutedAdapter(each, 1.0) for each in named), Composition.MIXTURE, Mix(), 0.001)


def serve(metrics: Metrics, tenant: str, route: Route, tokens: int = 3) -> None:
    metrics.routed(route, tenant)
    metrics.begin(route)
    for _ in range(tokens - 1):
        metrics.gap(tenant, route, 0.01)
    metrics.end(Ending(tenant, route, "stop", 2, tokens, 0.5, 0.1, 0.1, 0.1, 0.1))


def pairs(metrics: Metrics) -> Counter[tuple[str, str]]:
    """Series by tenant and adapter, as Prometheus reads them."""
    text = generate_latest(metrics.registry).decode()
    found: Counter[tuple[str, str]] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "adapter" in sample.labels:
                found[sample.labels["tenant"], sample.labels["adapter"]] += 1
    return found


def families(metrics: Metrics) -> set[str]:
    return {family.name for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())}


def total(metrics: Metrics, name: str) -> float:
    samples = (sample for family in metrics.registry.collect() for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == name)


@pytest.mark.parametrize("tenants", [1, 300])
def test_hundreds_of_adapters_and_tenants(tenants: int) -> None:
    """Also in another order, and with a few that are asked for again and again."""
    metrics = Metrics(max_adapters=LIMIT)
    for number in range(600):
        serve(metrics, f"tenant-{number % tenants}", route_of(f"adapter-{number * 7 % 600}"))
        serve(metrics, "often", route_of(f"star-{number % 3}"))
    found = pairs(metrics)
    adapters = {adapter for _, adapter in found}
    assert adapters <= {f"adapter-{number}" for number in range(600)} | {OTHER, "star-0", "star-1", "star-2"}
    assert len(adapters) <= LIMIT + 1
    assert len(found) <= PAIRS * LIMIT + len(adapters)
    assert {("often", f"star-{number}") for number in range(3)} <= found.keys()
    assert 1100 <= total(metrics, "loramux_request_success_total") <= 1200  # who loses a label loses its count


def test_an_adapter_of_a_thousand_tenants_is_one() -> None:
    metrics = Metrics(max_adapters=LIMIT)
    for number in range(1000):
        serve(metrics, f"tenant-{number}", route_of("public"))
    found = pairs(metrics)
    assert {adapter for _, adapter in found} == {"public"}
    assert (OTHER, "public") in found
    assert len(found) == PAIRS * LIMIT + 1
    assert total(metrics, "loramux_inter_token_latency_seconds_count") == 2000


def test_refused_tenants_are_few() -> None:
    metrics = Metrics(max_adapters=LIMIT)
    for number in range(500):
        metrics.quota_rejected(f"tenant-{number}", "requests")
        metrics.embedded(f"tenant-{number}", 5)
        metrics.quota_rejected("flood", "tokens")
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    refused = [sample for sample in samples if sample.name == "loramux_quota_rejections_total"]
    assert len(refused) <= LIMIT + 1
    assert max(refused, key=lambda sample: sample.value).labels == {"tenant": "flood", "kind": "tokens"}
    assert len([sample for sample in samples if sample.name == "loramux_embedding_tokens_total"]) <= LIMIT + 1


@pytest.mark.parametrize("name", ['a"} 1\nloramux_x 1', "\\", "a\nb", "é" * 100, "{}", "other", "base", ""])
def test_hostile_names_stay_names(name: str) -> None:
    metrics = Metrics(max_adapters=LIMIT)
    serve(metrics, name, route_of(name))
    metrics.answered(name, "/v1/models", 200)
    metrics.answered("GET", None, 404)
    plain = Metrics(max_adapters=LIMIT)
    serve(plain, "acme", route_of("sql"))
    plain.answered("GET", "/v1/models", 200)
    assert families(metrics) == families(plain)
    assert {tenant for tenant, _ in pairs(metrics)} == {name}
    methods = {sample.labels["method"] for sample in metrics._http_requests.collect()[0].samples}
    assert methods == {OTHER, "GET"}


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("rstuvwxyz")), max_size=200))
def test_whatever_comes(uses: list[tuple[str, str]]) -> None:
    dropped: list[dict[str, str]] = []
    labels = RequestLabels(2, dropped.append)
    live: set[tuple[str, str]] = set()
    for tenant, adapter in uses:
        labels.use(tenant, adapter)
        live.add(labels.of(tenant, adapter))
        for gone in dropped:
            live = {pair for pair in live if not _fits(pair, gone)}
        dropped.clear()
        assert len({pair[1] for pair in live}) <= 2 + 1
        assert len(live) <= PAIRS * 2 + 3
        assert labels.of(tenant, adapter) in {(tenant, adapter), (OTHER, adapter), (tenant, OTHER), (OTHER, OTHER)}


def _fits(pair: tuple[str, str], gone: dict[str, str]) -> bool:
    return pair[1] == gone.get("adapter", pair[1]) and pair[0] == gone.get("tenant", pair[0])


@given(st.lists(st.sampled_from("abcdef"), max_size=120))
def test_a_label_is_taken_only_by_one_that_leads(names: list[str]) -> None:
    uses: Counter[str] = Counter()
    dropped: list[str] = []
    labels: TopLabels[str] = TopLabels(3, dropped.append)
    for name in names:
        before = {other for other in "abcdef" if other in labels}
        uses[name] += 1
        labels.use(name)
        for gone in dropped:
            assert gone in before
            assert uses[name] >= LEAD * uses[gone]
            assert uses[gone] == min(uses[other] for other in before)
        if name not in labels:
            assert uses[name] < LEAD * min(uses[other] for other in before)
        dropped.clear()


@given(st.lists(st.floats(0, 20), max_size=50))
def test_the_histogram_exports_what_the_librarys_own_does(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = LoopHistogram("x_seconds", "Text.", GAP, ["tenant", "adapter"], ours)
    reference = Histogram("x_seconds", "Text.", ["tenant", "adapter"], registry=theirs, buckets=GAP)
    for value in values:
        histogram.observe(histogram.series(("acme", "sql")), value)
        reference.labels("acme", "sql").observe(value)
    lines = [
        [line for line in generate_latest(each).decode().splitlines() if "_created" not in line]
        for each in (ours, theirs)
    ]
    assert lines[0] == lines[1]


def test_pairs_of_an_adapter_without_a_label_make_room() -> None:
    labels = RequestLabels(1, lambda _: None)
    for _ in range(2):
        labels.use("acme", "old")
    for _ in range(4):
        labels.use("corp", "new")
    assert labels.of("acme", "old") == (OTHER, OTHER)
    assert labels.of("corp", "new") == ("corp", "new")
