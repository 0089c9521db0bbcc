"""Requests, their adapters and whoever else wants adapters, in any order: nothing is lost, and everything ends."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters_store.types import GROUPS, Mix
from server.engine.config import RequestError
from tests.adapters_store.library import LIBRARY, MIXES, RANKS
from tests.engine.manual_loading import BYTES, PATHS, Loading

DIGESTS = st.sampled_from(sorted(LIBRARY))


class LoadingMachine(RuleBasedStateMachine):
    """Few pages, little host memory and few KV blocks, so that adapters and sequences push each other out."""

    @initialize(
        sizes=st.lists(st.integers(4, 8), min_size=4, max_size=4),
        host=st.sampled_from([0.5, 1.5, 3, 20]),
        num_blocks=st.integers(8, 16),
        lookahead=st.booleans(),
    )
    def start(self, sizes: list[int], host: float, num_blocks: int, lookahead: bool) -> None:
        pages = dict(zip((group.name for group in GROUPS), sizes, strict=True))
        self.loading = Loading(pages, host_bytes=int(host * BYTES), num_blocks=num_blocks, lookahead=lookahead)
        self.mixes: dict[str, Mix] = {}
        self.aborted: set[str] = set()
        self.asked = 0
        self.answers: Counter[str] = Counter()

    def answer(self, value: bool | str | RequestError) -> None:
        self.answers["error" if isinstance(value, RequestError) else str(value)] += 1

    @rule(mixes=st.lists(MIXES, min_size=1, max_size=4), data=st.data())
    def add(self, mixes: list[Mix], data: st.DataObject) -> None:
        for mix in mixes:
            name, tenant = str(len(self.mixes)), data.draw(st.sampled_from("xyz"))
            prompt, length = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
            try:
                self.loading.add(name, mix, prompt=prompt, max_tokens=length, tenant=tenant)
            except RequestError:  # for its size alone
                assert not self.loading.pool.fits(mix, RANKS)
            else:
                self.mixes[name] = mix

    @rule(data=st.data(), steps=st.integers(1, 6), work=st.integers(0, 4))
    def go_on(self, data: st.DataObject, steps: int, work: int) -> None:
        """Some of what is under way is done, in any order, and some steps are made."""
        tasks = self.loading.loader.tasks
        for _ in range(min(work, len(tasks))):
            self.loading.loader.run(data.draw(st.integers(0, len(tasks) - 1)))
        self.loading.step(steps)

    @precondition(lambda self: self.loading.engine._sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*sorted(self.loading.engine._sequences), ""]))
        self.loading.engine.abort(name)
        self.aborted.add(name)

    @rule(digest=DIGESTS, breaks=st.booleans())
    def damage_or_repair(self, digest: str, breaks: bool) -> None:
        (self.loading.disk.broken.add if breaks else self.loading.disk.broken.discard)(digest)

    @rule(digest=DIGESTS, wish=st.sampled_from(["pin", "pin", "unpin", "prefetch", "evict", "ahead"]))
    def wish(self, digest: str, wish: str) -> None:
        adapters, path = self.loading.adapters, PATHS[digest]
        if wish == "pin":
            self.asked += 1
            adapters.pin(digest, path, self.answer)
        elif wish == "prefetch":
            self.asked += 1
            adapters.prefetch(digest, path, self.answer)
        elif wish == "unpin":
            adapters.unpin(digest)
        elif wish == "ahead":
            adapters.read_ahead({digest: path})
        else:
            is_kept = adapters._wishes.has_pin(digest)
            adapters.evict(digest)
            assert is_kept or digest not in self.loading.host

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "loading"):
            self.loading.check()

    def teardown(self) -> None:
        """Every request has its one ending, every call its answer, and nothing is held."""
        if not hasattr(self, "loading"):
            return
        loading = self.loading
        loading.finish()
        for name, mix in self.mixes.items():
            ending = loading.ending(name)
            assert sum(output.finish_reason is not None for output in loading.outputs[name]) == 1
            assert ending in {"length", "adapter_unavailable", "mix_too_large"} | ({"abort"} & self.endings(name))
            if ending == "length":
                assert sum(len(output.tokens) for output in loading.outputs[name]) > 0
            else:
                assert ending == "abort" or mix.entries
        assert self.answers.total() == self.asked
        assert loading.pool.pages_by_state()["used"] == self.pinned_pages()
        assert not loading.adapters._requests
        assert not loading.adapters._wanted
        assert loading.engine.stats().kv_used_blocks == 0

    def endings(self, name: str) -> set[str]:
        return {"abort"} if name in self.aborted else set()

    def pinned_pages(self) -> int:
        pool = self.loading.pool
        return sum(sum(own.values()) for digest, own in pool._pins.items() if pool.is_loaded(digest))


TestLoadingMachine = LoadingMachine.TestCase
TestLoadingMachine.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
