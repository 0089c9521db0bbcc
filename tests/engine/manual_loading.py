"""The whole engine but for the model, with a loader that works when the test says so.

Steps check that the pages of each of their rows hold what the row's mix is by definition.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from adapters_store.pages import PackedAdapter
from adapters_store.pool import PagePool
from adapters_store.tiers import HostTier
from adapters_store.types import BASE, AdapterError, Mix
from server.engine.adapters import EngineAdapters
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.plan import Chunk
from server.engine.reads import page_check
from server.engine.sequence import Output, Request, SamplingParams, Sequence, TokenLogprobs
from tests.adapters_store.library import LIBRARY, PACKED, check_content, make_pool
from tests.panic import Panic

BYTES = max(packed.num_bytes for packed in PACKED.values())
"""Of the largest adapter of the library."""

PATHS = {digest: f"folder/{digest}" for digest in LIBRARY}


@dataclass(eq=False)
class ManualLoader:
    """Does a piece of work when `run` is called, and reports it in the next poll."""

    tasks: list[tuple[Callable[[], Any], Callable[[Any], None]]] = field(default_factory=list)
    finished: list[tuple[Any, Callable[[Any], None]]] = field(default_factory=list)
    urgent: int = 0

    @property
    def pending(self) -> int:
        return len(self.tasks) + len(self.finished)

    def submit(self, work: Callable[[], Any], done: Callable[[Any], None], *, urgent: bool = False) -> None:
        self.urgent += urgent
        self.tasks.append((work, done))

    def run(self, index: int = 0) -> None:
        work, done = self.tasks.pop(index)
        try:
            result = work()
        except Exception as error:
            result = error
        self.finished.append((result, done))

    def poll(self) -> None:
        while self.finished:
            result, done = self.finished.pop(0)
            done(result)

    def wait(self, _: float) -> None:
        """Nothing happens by itself."""

    def close(self, _: float) -> None:
        self.tasks.clear()
        self.finished.clear()


class Disk:
    """Reads adapters of the library, counting; those in `broken` cannot be read, those in `panics` are too much for the
    library that reads. `packed` in this order."""

    def __init__(self, num_pages: Mapping[str, int]) -> None:
        self.reads: Counter[str] = Counter()
        self.packed: list[str] = []
        self.broken: set[str] = set()
        self.panics: set[str] = set()
        self.check = page_check(num_pages)

    def __call__(self, digest: str, path: str) -> PackedAdapter:
        assert path == PATHS[digest]
        self.reads[digest] += 1
        if digest in self.broken:
            raise AdapterError("adapter_corrupt", f"adapter {digest} is damaged")
        if digest in self.panics:
            raise Panic(f"at adapter {digest}")
        self.check(PACKED[digest].group_ranks)
        self.packed.append(digest)
        return PACKED[digest]


@dataclass
class FakeLaunch:
    chunks: list[Chunk]
    verdicts: tuple[()] = ()
    sampled: bool | None = None
    late: frozenset[Sequence] = frozenset()
    advanced: bool = False

    def running(self) -> bool:
        return False

    def wait(self) -> tuple[list[int | None], list[None]]:
        count = sum(chunk.samples for chunk in self.chunks)
        return [5] * count, [None] * count

    def shares(self) -> list[tuple[float, ...]]:
        return [()] * len(self.chunks)

    def prompt_logprobs(self) -> dict[int, tuple[TokenLogprobs, ...]]:
        return {}

    def pools(self) -> dict[int, bytes | None]:
        return {}


class FakeRunner:
    """A model that always says 5."""

    def __init__(self, pool: PagePool, num_blocks: int, lookahead: bool) -> None:
        self.model = SimpleNamespace(eos_token_ids=(0,), vocab_size=100)
        self.pool = pool
        self.num_blocks = num_blocks
        self.lookahead = lookahead
        self.device = torch.device("cpu")
        self.gates = None
        self.max_model_len = 256

    def launch(self, chunks: list[Chunk], layers: None = None) -> FakeLaunch:
        assert layers is None
        for row, chunk in enumerate(chunks):
            lease, mix = chunk.sequence.lease, chunk.sequence.request.mix
            assert (lease is not None) == bool(mix.entries)
            if lease is not None:
                assert lease.mix == mix
                assert not lease.released
                check_content(self.pool, lease)
            chunk.sequence.sampled_row = row
        return FakeLaunch(chunks)

    def choose(self, launched: FakeLaunch, _: frozenset[int]) -> None:
        launched.sampled = True


class Loading:
    """An engine, its loader and its disk; every step is checked, and every output kept by request."""

    def __init__(
        self,
        num_pages: Mapping[str, int] | int = 9,
        *,
        host_bytes: int = 20 * BYTES,
        num_blocks: int = 64,
        lookahead: bool = False,
        max_num_seqs: int = 5,
    ) -> None:
        self.loader, self.pool = ManualLoader(), make_pool(num_pages)  # type: ignore[arg-type]
        self.disk = Disk(self.pool.num_pages)
        self.host = HostTier(host_bytes)
        self.adapters = EngineAdapters(self.host, self.pool, self.loader, self.disk, lambda: 0.0)
        runner: Any = FakeRunner(self.pool, num_blocks, lookahead)
        config = EngineConfig("", max_num_seqs=max_num_seqs, max_batch_tokens=16, block_size=4)
        self.engine = Engine(config, runner, self.adapters, lambda: 0.0)
        self.outputs: dict[str, list[Output]] = {}
        self.residency: dict[str, str] = {}

    def add(self, name: str, mix: Mix = BASE, *, prompt: int = 3, max_tokens: int = 2, tenant: str = "t") -> None:
        """Raises RequestError as the engine does."""
        paths = {digest: PATHS[digest] for digest in mix.digests}
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        key = mix.digest.encode()
        self.engine.add_request(Request(name, tuple(range(1, 1 + prompt)), params, mix, paths, key, tenant))
        self.outputs[name] = []

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for output in self.engine.step():
                own = self.outputs[output.request_id]
                assert not (own and own[-1].finish_reason), "an output after the ending"
                own.append(output)
            self.check()

    def work(self) -> None:
        """Do all that is under way, which is reported by the next step."""
        while self.loader.tasks:
            self.loader.run()

    def until_running(self, name: str) -> None:
        """Work and step until a request has its first token."""
        while not self.outputs[name]:
            self.work()
            self.step()

    def finish(self, most_steps: int = 2000) -> None:
        """To the end, whatever has to be loaded. Raises AssertionError if that takes too long."""
        for _ in range(most_steps):
            if not (self.engine.has_work or self.adapters.busy):
                return
            self.work()
            self.step()
        raise AssertionError("no progress")

    def ending(self, name: str) -> str | None:
        """How a request ended: its finish reason or the code of its error; None while it goes on."""
        last = self.outputs[name][-1] if self.outputs[name] else None
        if last is None or last.finish_reason is None:
            return None
        return last.error_code or last.finish_reason.value

    def check(self) -> None:
        self.engine.check_integrity()
        self.residency |= self.adapters.take_residency()
        for digest in LIBRARY:
            assert self.residency.get(digest, "disk") == self.adapters.residency(digest)
