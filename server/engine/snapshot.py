"""What an engine says of itself: what it was made with, and how it stands now."""

from collections.abc import Iterable
from itertools import chain

from server.engine.adapters import EngineAdapters
from server.engine.config import EngineInfo, EngineStats
from server.engine.intake import Intake
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence


def engine_info(runner: Runner, block_size: int) -> EngineInfo:
    """Sizes, device and memory, none of which change."""
    return EngineInfo(
        model_fingerprint=runner.model.fingerprint(),
        max_model_len=runner.max_model_len,
        num_kv_blocks=runner.num_blocks,
        block_size=block_size,
        num_pages=runner.pool.num_pages,
        vocab_size=runner.model.vocab_size,
        eos_token_ids=tuple(sorted(set(runner.model.eos_token_ids))),
        device=str(runner.device),
        dtype=str(runner.dtype).removeprefix("torch."),
        memory={
            "weights": runner.weight_bytes,
            "kv": runner.kv_bytes,
            "pages": runner.pool.num_bytes,
            "gates": 0 if runner.slots is None else runner.slots.num_bytes,
            "workspace": runner.workspace_bytes,
        },
    )


def engine_stats(
    scheduler: Scheduler, intake: Intake, adapters: EngineAdapters, steps: tuple[tuple[float, int], ...]
) -> EngineStats:
    """A snapshot with these `steps`; the reads of adapters that it reports are forgotten."""
    pool, host = adapters.pool, adapters.host
    return EngineStats(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting) + len(intake.waiting),
        kv_used_blocks=scheduler.blocks.num_used,
        kv_blocks=scheduler.blocks.num_blocks,
        pages=pool.pages_by_state(),
        prefix_queries=scheduler.blocks.queries,
        prefix_hits=scheduler.blocks.hits,
        preemptions=scheduler.preemptions,
        adapter_loads=pool.counters.loads,
        adapter_evictions=pool.counters.evictions,
        adapter_reads=adapters.take_read_seconds(),
        host_evictions=host.counters.evictions,
        host_bytes=host.num_bytes,
        host_budget=host.budget_bytes,
        host_shrinks=host.counters.shrinks,
        adapters_host=len(host),
        adapters_device=len(pool.residents),
        running_adapters=_digests(scheduler.running),
        waiting_adapters=_digests(chain(scheduler.waiting, intake.waiting)),
        steps=steps,
    )


def _digests(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({digest for sequence in sequences for digest in sequence.request.mix.digests}))
