"""One server's metrics out of those of its processes: counts are summed, states are told once."""

import asyncio
from collections.abc import Iterable, Sequence

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from server.siblings import Siblings

TOPIC = "metrics"
ANSWER_SECONDS = 2.0
"""A process that takes longer counts with what it told last."""
COUNTED_BY_ENGINES = frozenset(
    {
        "loramux_adapter_evictions",
        "loramux_adapter_load_seconds",
        "loramux_adapter_loads",
        "loramux_batch_rows",
        "loramux_memory_shortages",
        "loramux_preemptions",
        "loramux_prefix_cache_hits",
        "loramux_prefix_cache_queries",
        "loramux_step_seconds",
    }
)
"""What engines count and every process hears of: the parent's number is the one that counts."""
USES = "vllm:lora_requests_info"
"""Every front end knows the names of its own requests' adapters."""
USE_LABELS = ("running_lora_adapters", "waiting_lora_adapters")

Key = tuple[str, tuple[tuple[str, str], ...]]
"""Name and sorted labels of a sample."""


class Sample(msgspec.Struct, array_like=True):
    """One line of the exposition."""

    name: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, array_like=True):
    """A metric with all its labels."""

    name: str
    kind: str
    text: str
    samples: list[Sample]


class Snapshot(msgspec.Struct, array_like=True):
    """All metrics of one process. The parent's tell of engines, those of front ends of requests."""

    is_parent: bool
    families: list[Family]


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Snapshot).decode


class Summed(CollectorRegistry):
    """What `/metrics` writes: the sum of these snapshots."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        super().__init__()
        self._families = summed(snapshots)

    def collect(self) -> Iterable[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.text, family.kind)
            for sample in family.samples:
                metric.add_sample(sample.name, sample.labels, sample.value)
            yield metric


async def all_processes(registry: CollectorRegistry, siblings: Siblings) -> CollectorRegistry:
    """What this process has counted, with what all others have."""
    if siblings.are_none:
        return registry
    mine = await asyncio.to_thread(_snapshot_bytes, registry)
    answers = await siblings.ask(TOPIC, mine, ANSWER_SECONDS)
    return await asyncio.to_thread(_sum_of, [mine, *answers])


def answer_others(registry: CollectorRegistry, siblings: Siblings) -> None:
    """Tell other processes what this one has counted whenever they ask."""

    async def tell(_: bytes) -> bytes:
        return await asyncio.to_thread(_snapshot_bytes, registry)

    siblings.on(TOPIC, tell)


def _snapshot_bytes(registry: CollectorRegistry) -> bytes:
    return encode(snapshot(registry))


def _sum_of(parts: Sequence[bytes]) -> "Summed":
    return Summed([decode(part) for part in parts if part])


def snapshot(registry: CollectorRegistry, *, is_parent: bool = False) -> Snapshot:
    """What a process has counted so far."""
    return Snapshot(
        is_parent,
        [
            Family(
                metric.name,
                metric.type,
                metric.documentation,
                [Sample(each.name, dict(each.labels), each.value) for each in metric.samples],
            )
            for metric in registry.collect()
        ],
    )


def summed(snapshots: Sequence[Snapshot]) -> list[Family]:
    """By name and labels. States (gauges) are the parent's, and where it knows none the largest of the front ends'."""
    families: dict[str, Family] = {}
    values: dict[str, dict[Key, float]] = {}
    for one in sorted(snapshots, key=lambda each: not each.is_parent):  # the parent's first
        for family in one.families:
            families.setdefault(family.name, family)
            mine = values.setdefault(family.name, {})
            if one.is_parent or family.name not in COUNTED_BY_ENGINES:
                _add(family, mine, is_parent=one.is_parent)
    told = {key for one in snapshots if one.is_parent for key in _states(one)}
    for one in snapshots:
        for (name, key), value in () if one.is_parent else _states(one).items():
            if (name, key) not in told:
                values[name][key] = max(values[name].get(key, value), value)
    uses = [family for one in snapshots for family in one.families if family.name == USES]
    return [
        _united(uses) if name == USES else Family(name, family.kind, family.text, _samples(values[name]))
        for name, family in families.items()
    ]


def counts_alone(one: Snapshot) -> Snapshot:
    """What stays of a process that has ended: it has no state any more."""
    families = [family for family in one.families if family.kind != "gauge"]
    return Snapshot(one.is_parent, families)


def _add(family: Family, values: dict[Key, float], *, is_parent: bool) -> None:
    if family.kind == "gauge" and not is_parent:
        return
    for sample in family.samples:
        key = _key(sample)
        if sample.name.endswith("_created"):
            values[key] = min(values.get(key, sample.value), sample.value)
        else:
            values[key] = values.get(key, 0.0) + sample.value


def _states(one: Snapshot) -> dict[tuple[str, Key], float]:
    gauges = (family for family in one.families if family.kind == "gauge")
    return {(family.name, _key(sample)): sample.value for family in gauges for sample in family.samples}


def _united(families: Sequence[Family]) -> Family:
    """One line whose lists have everybody's names."""
    samples = [sample for family in families for sample in family.samples]
    merged: dict[str, str] = {}
    for sample in samples:
        for label, text in sample.labels.items():
            names = {*merged.get(label, "").split(","), *text.split(",")} - {""}
            merged[label] = ",".join(sorted(names)) if label in USE_LABELS else text
    latest = [Sample(USES, merged, max(sample.value for sample in samples))] if samples else []
    return Family(USES, "gauge", families[0].text, latest)


def _key(sample: Sample) -> Key:
    return sample.name, tuple(sorted(sample.labels.items()))


def _samples(values: dict[Key, float]) -> list[Sample]:
    return [Sample(name, dict(labels), value) for (name, labels), value in values.items()]
