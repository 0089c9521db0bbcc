"""What the server counts, for Prometheus. Seconds and bytes; one registry per application."""

import collections
from collections.abc import Callable, Collection, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from routing.router import Route
from server.engine.config import EngineStats
from server.journal import Ending
from server.labels import OTHER, RequestLabels
from server.loop_histogram import LoopHistogram

ENGINE = "0"
"""Of metrics by engine. To gateways the server is one engine, whatever is behind it: they read a single series."""
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
LATENCY = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
GAP = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
MOST_KNOWN = 10_000
"""Tenants with their mixes whose place in the histogram of gaps is remembered."""
STEP = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SCORE = tuple(step / 20 for step in range(1, 20))
ROUTE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)


class Metrics:
    """All metrics of one application."""

    def __init__(self, max_adapters: int = 100, max_num_seqs: int = 64) -> None:
        """`max_num_seqs` of all engines together."""
        self.registry = CollectorRegistry()
        self._max_num_seqs = max_num_seqs
        self._names: dict[str, str] = {}
        self._active: collections.Counter[str] = collections.Counter()
        self._stats: dict[str, EngineStats] = {}
        self._page_states: set[str] = set()
        self._lora_labels: tuple[str, str, str] | None = None
        self._gap_series: dict[tuple[str, str], list[float]] = {}
        self._labels = RequestLabels(max_adapters, self._drop)
        self._make_request_metrics()
        self._make_engine_metrics()

    def begin(self, route: Route) -> None:
        """A choice starts. Digests of its adapters have a name while it lasts."""
        for adapter in route.adapters:
            self._active[adapter.digest] += 1
            self._names[adapter.digest] = adapter.name

    def gap(self, tenant: str, route: Route, seconds: float) -> None:
        """One came between two tokens, as it does for every token: what it is counted under is looked up once."""
        key = tenant, route.label
        series = self._gap_series.get(key)
        if series is None:
            if len(self._gap_series) >= MOST_KNOWN:
                self._gap_series.clear()
            series = self._gap_series[key] = self._gaps.series(self._labels.of(*key))
        self._gaps.observe(series, seconds)

    def end(self, ending: Ending) -> None:
        """A choice that began has ended."""
        for adapter in ending.route.adapters:
            self._active[adapter.digest] -= 1
            if not self._active[adapter.digest]:
                del self._active[adapter.digest], self._names[adapter.digest]
        labels = self._labels.of(ending.tenant, ending.route.label)
        self._successes.labels(*labels, ending.finish_reason).inc()
        self._prompt_tokens.labels(*labels).inc(ending.prompt_tokens)
        self._generation_tokens.labels(*labels).inc(ending.generation_tokens)
        for histogram, seconds in (
            (self._first_token, ending.first_token),
            (self._e2e, ending.e2e),
            (self._queue, ending.queue),
            (self._prefill, ending.prefill),
            (self._decode, ending.decode),
        ):
            if seconds is not None:
                histogram.labels(*labels).observe(seconds)

    def routed(self, route: Route, tenant: str) -> None:
        """A decision was made for a tenant: one use of its mix."""
        self._labels.use(tenant, route.label)
        self._gap_series.pop((tenant, route.label), None)  # it may have a label of its own from now on
        router = route.router or "base"
        self._route_seconds.labels(router).observe(route.seconds)
        self._routes.labels(router, "base" if router == "base" else route.outcome.value).inc()
        if route.cached:
            self._route_cache_hits.inc()
        if route.best is not None:
            self._similarities.labels(router).observe(route.best)

    def route_failed(self, router: str) -> None:
        self._routes.labels(router, "error").inc()

    def embedded(self, tenant: str, tokens: int) -> None:
        """A request for embeddings was answered."""
        self._embedding_tokens.labels(self._labels.tenant(tenant)).inc(tokens)

    def quota_rejected(self, tenant: str, kind: str) -> None:
        """A request was refused; `kind` is `requests`, `concurrency`, `tokens`, `adapters` or `bytes`."""
        self._quota_rejections.labels(self._labels.tenant(tenant), kind).inc()

    def answered(self, method: str, endpoint: str | None, status: int) -> None:
        """An HTTP request has ended. `endpoint` is the path with names for what varies in it, None if there is none."""
        method = method if method in METHODS else OTHER
        self._http_requests.labels(method, endpoint or OTHER, str(status)).inc()

    def engine(self, stats: EngineStats, now: float, engine: str = ENGINE) -> None:
        """An engine's latest snapshot. `now` is in seconds since the epoch."""
        before = self._stats.get(engine, EngineStats())
        self._stats[engine] = stats
        self._running.labels(engine).set(stats.running)
        self._waiting.labels(engine).set(stats.waiting)
        self._kv_usage.labels(engine).set(_kv_usage([stats]))
        self._all_engines(now)
        self._prefix_queries.inc(_grown(before.prefix_queries, stats.prefix_queries))
        self._prefix_hits.inc(_grown(before.prefix_hits, stats.prefix_hits))
        self._preemptions.inc(_grown(before.preemptions, stats.preemptions))
        self._loads.labels("host", "device").inc(_grown(before.adapter_loads, stats.adapter_loads))
        for seconds in stats.adapter_reads:
            self._loads.labels("disk", "host").inc()
            self._load_time.observe(seconds)
        self._evictions.labels("host").inc(_grown(before.host_evictions, stats.host_evictions))
        self._evictions.labels("device").inc(_grown(before.adapter_evictions, stats.adapter_evictions))
        self._host_memory.labels(engine, "used").set(stats.host_bytes)
        self._host_memory.labels(engine, "allowed").set(stats.host_budget)
        self._shrinks.inc(_grown(before.host_shrinks, stats.host_shrinks))
        for seconds, rows in stats.steps:
            self._step_seconds.observe(seconds)
            self._batch_rows.observe(rows)

    def _all_engines(self, now: float) -> None:
        """What is one number, however many engines there are. An adapter in several of them counts in each."""
        every = self._stats.values()
        self._running_vllm.labels(ENGINE).set(sum(stats.running for stats in every))
        self._waiting_vllm.labels(ENGINE).set(sum(stats.waiting for stats in every))
        self._kv_usage_vllm.labels(ENGINE).set(_kv_usage(every))
        self._adapters.labels("host").set(sum(stats.adapters_host for stats in every))
        self._adapters.labels("device").set(sum(stats.adapters_device for stats in every))
        self._page_states |= {state for stats in every for state in stats.pages}
        for state in self._page_states:  # also what an engine had that is no more
            self._pages.labels(state).set(sum(stats.pages.get(state, 0) for stats in every))
        running = self._join(digest for stats in every for digest in stats.running_adapters)
        waiting = self._join(digest for stats in every for digest in stats.waiting_adapters)
        shown, self._lora_labels = self._lora_labels, (str(self._max_num_seqs), running, waiting)
        self._lora_info.labels(*self._lora_labels).set(now)
        if (
            shown is not None and shown != self._lora_labels
        ):  # after it, so that no scrape finds none; the latest value counts
            self._lora_info.remove(*shown)

    def moved(self) -> None:
        """A request whose engine died before its first token goes on in another one."""
        self._moves.inc()

    def watch(self, engine: str, is_alive: Callable[[], bool]) -> None:
        """Whether the engine lives is asked whenever metrics are read."""
        self._up.labels(engine).set_function(lambda: float(is_alive()))

    def registered(self, adapters: int) -> None:
        """How many adapters are on disk."""
        self._adapters.labels("disk").set(adapters)

    def _join(self, digests: Iterable[str]) -> str:
        """Names of the adapters in use, as gateways know them; a request that has ended meanwhile is left out."""
        names = {self._names[digest] for digest in digests if digest in self._names}
        return ",".join(sorted(names)[: self._max_num_seqs])

    def _make_request_metrics(self) -> None:
        both = ["tenant", "adapter"]
        self._successes = self._counter("loramux_request_success", "Requests by ending.", [*both, "finish_reason"])
        self._prompt_tokens = self._counter("loramux_prompt_tokens", "Prompt tokens of ended requests.", both)
        self._generation_tokens = self._counter("loramux_generation_tokens", "Tokens generated.", both)
        self._first_token = self._histogram("loramux_time_to_first_token_seconds", "From arrival.", LATENCY, both)
        name = "loramux_inter_token_latency_seconds"
        self._gaps = LoopHistogram(name, "Between two tokens.", GAP, both, self.registry)
        self._e2e = self._histogram("loramux_e2e_request_latency_seconds", "From arrival to the end.", LATENCY, both)
        self._queue = self._histogram("loramux_queue_time_seconds", "Waiting in the engine.", LATENCY, both)
        self._prefill = self._histogram("loramux_prefill_time_seconds", "Scheduling to first token.", LATENCY, both)
        self._decode = self._histogram("loramux_decode_time_seconds", "From the first token to the end.", LATENCY, both)
        self._route_seconds = self._histogram("loramux_route_seconds", "Choosing adapters.", ROUTE, ["router"])
        self._routes = self._counter("loramux_route", "Decisions by outcome.", ["router", "outcome"])
        self._route_cache_hits = self._counter("loramux_route_cache_hits", "Decisions that were made before.")
        self._similarities = self._histogram(
            "loramux_route_similarity", "Score of the best candidate, chosen or not: shows drift.", SCORE, ["router"]
        )
        self._quota_rejections = self._counter("loramux_quota_rejections", "Requests refused.", ["tenant", "kind"])
        self._http_requests = self._counter(
            "loramux_http_requests", "HTTP requests by how they were answered.", ["method", "endpoint", "status"]
        )
        self._embedding_tokens = self._counter("loramux_embedding_tokens", "Tokens embedded.", ["tenant"])
        self._by_adapter = (
            self._successes,
            self._prompt_tokens,
            self._generation_tokens,
            self._first_token,
            self._e2e,
            self._queue,
            self._prefill,
            self._decode,
        )

    def _make_engine_metrics(self) -> None:
        self._up = self._gauge(
            "loramux_engine_up", "1 while the engine takes requests, 0 while it restarts.", ["engine"]
        )
        self._moves = self._counter("loramux_requests_moved", "Requests that another engine took over from a dead one.")
        self._running = self._gauge("loramux_requests_running", "Sequences in the batch.", ["engine"])
        self._waiting = self._gauge("loramux_requests_waiting", "Sequences in the queue.", ["engine"])
        self._kv_usage = self._gauge("loramux_kv_cache_usage_ratio", "Share of KV blocks in use.", ["engine"])
        self._adapters = self._gauge("loramux_adapters", "Adapters in each tier.", ["tier"])
        self._pages = self._gauge("loramux_rank_pages", "Rank pages by state.", ["state"])
        self._prefix_queries = self._counter("loramux_prefix_cache_queries", "Prompt tokens looked up.")
        self._prefix_hits = self._counter("loramux_prefix_cache_hits", "Prompt tokens found.")
        self._preemptions = self._counter("loramux_preemptions", "Sequences that had to start again.")
        self._loads = self._counter("loramux_adapter_loads", "Adapters moved up.", ["from", "to"])
        self._load_time = self._histogram("loramux_adapter_load_seconds", "Reading an adapter from disk.", STEP)
        self._evictions = self._counter("loramux_adapter_evictions", "Adapters dropped from a tier.", ["tier"])
        self._host_memory = self._gauge(
            "loramux_host_memory_bytes", "Adapters in host memory, and how much they may take.", ["engine", "of"]
        )
        self._shrinks = self._counter("loramux_memory_shortages", "Caches were dropped because memory was short.")
        self._step_seconds = self._histogram("loramux_step_seconds", "One forward pass with its scheduling.", STEP)
        self._batch_rows = self._histogram("loramux_batch_rows", "Token rows of a step.", ROWS)
        self._running_vllm = self._gauge("vllm:num_requests_running", "As loramux_requests_running.", ["engine"])
        self._waiting_vllm = self._gauge("vllm:num_requests_waiting", "As loramux_requests_waiting.", ["engine"])
        self._kv_usage_vllm = self._gauge("vllm:kv_cache_usage_perc", "As loramux_kv_cache_usage_ratio.", ["engine"])
        self._lora_info = self._gauge(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time of this report.",
            ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, text, tuple(labels), registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(name, text, tuple(labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], labels: Iterable[str] = ()) -> Histogram:
        return Histogram(name, text, tuple(labels), registry=self.registry, buckets=tuple(buckets))

    def _drop(self, labels: dict[str, str]) -> None:
        """Remove the series of what lost its label."""
        by_tenant = (self._quota_rejections, self._embedding_tokens)
        for metric in by_tenant if labels.keys() == {"tenant"} else self._by_adapter:
            metric.remove_by_labels(labels)
        if "adapter" in labels:
            self._gaps.remove(labels)
            self._gap_series.clear()


def _kv_usage(engines: Collection[EngineStats]) -> float:
    """Share of their KV blocks that is in use. An engine that is down has none."""
    blocks = sum(stats.kv_blocks for stats in engines)
    return sum(stats.kv_used_blocks for stats in engines) / blocks if blocks else 0.0


def _grown(before: int, now: int) -> int:
    """Growth of a counter that starts again at 0 with a new engine."""
    return now - before if now >= before else now
