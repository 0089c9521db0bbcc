"""Leases and deletion against a model of them, in a store over SQLite and a local folder."""

import asyncio
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from polling import until
from safetensors.torch import save_file

from adapters_store.registry import BeingDeleted, NameTaken, NotFound, Resolved
from adapters_store.store import AdapterInUse, AdapterStore, NewAdapter, StoreConfig, StoreLease, UnknownAdapter
from adapters_store.types import TARGETS, LinearShape

SHAPE = LinearShape(1, dict.fromkeys(TARGETS, 4), dict.fromkeys(TARGETS, 4))
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


class StoreMachine(RuleBasedStateMachine):
    """Three names of one tenant and three adapters; a name is there, draining, or free."""

    names = st.sampled_from(["x", "y", "z"])
    alphas = st.sampled_from([1, 2, 3])

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="loramux-store-"))
        self.loop = asyncio.new_event_loop()
        for alpha in (1, 2, 3):
            folder = self.folder / str(alpha)
            folder.mkdir()
            config = {"peft_type": "LORA", "r": 1, "lora_alpha": alpha, "target_modules": ["q_proj"]}
            (folder / "adapter_config.json").write_text(json.dumps(config))
            factors = {f"{PREFIX}.lora_A.weight": torch.ones(1, 4), f"{PREFIX}.lora_B.weight": torch.ones(4, 1)}
            save_file(factors, folder / "adapter_model.safetensors")
        self.gone: list[str] = []
        self.revisions: dict[str, list[str]] = {}  # digests, the current one last
        self.draining: set[str] = set()
        self.leases: list[tuple[StoreLease, tuple[Resolved, ...]]] = []
        self._open()

    def _open(self) -> None:
        url = f"sqlite:///{self.folder / 'registry.db'}"
        config = StoreConfig(url, str(self.folder / "blobs"), self.folder / "store")
        self.store = AdapterStore.open(SHAPE, "base", config, lambda: 1.0)
        self.store.on_gone.append(self.gone.append)

    def teardown(self) -> None:
        for lease, _ in self.leases:
            self.store.release(lease)
        self._run(self._settled())
        self._run(self.store.close())
        self.loop.close()
        shutil.rmtree(self.folder)

    def _run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    async def _settled(self) -> None:
        """Nothing happens any more but waiting for leases."""
        store = self.store
        in_use = Counter(name for lease in store._leases._leases for _, name in lease.names)
        await until(lambda: {name for _, name in store._deletions._draining} <= in_use.keys())
        await until(lambda: not store._workers._tasks and not store._folders._moving)

    @rule(name=names, alpha=alphas, replaced=st.booleans())
    def register(self, name: str, alpha: int, replaced: bool) -> None:
        new = NewAdapter(name, replace=replaced)
        work = self.store.register(self.folder / str(alpha), new)
        if name in self.draining or (name in self.revisions and not replaced):
            with pytest.raises(BeingDeleted if name in self.draining else NameTaken):
                self._run(work)
            return
        digest = self._run(work).adapter.adapter.digest
        self.revisions[name] = [each for each in self.revisions.get(name, []) if each != digest] + [digest]

    @rule(wanted=st.lists(names, min_size=1, max_size=3, unique=True))
    def lease(self, wanted: list[str]) -> None:
        found = self._run(self.store.resolve("default", wanted))
        assert {name: each.digest for name, each in found.items()} == {
            name: self.revisions[name][-1] for name in wanted if name in self.revisions
        }
        adapters = tuple(found.values())
        self.leases.append((self._run(self.store.lease("default", adapters)), adapters))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def lease_again_what_may_be_gone(self, data: st.DataObject) -> None:
        """A router that takes long leases what it found out before a deletion."""
        _, adapters = data.draw(st.sampled_from(self.leases))
        work = self.store.lease("default", adapters)
        if any(adapter.name in self.draining for adapter in adapters):
            with pytest.raises(UnknownAdapter):
                self._run(work)
            return
        self.leases.append((self._run(work), adapters))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease, adapters = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.store.release(lease)
        self._run(self._settled())
        for name in {adapter.name for adapter in adapters}:
            if name in self.draining and not self._users(name):
                self.draining.discard(name)

    @rule(name=names, wait=st.sampled_from([None, False]))
    def delete(self, name: str, wait: bool | None) -> None:
        work = self.store.delete("default", name, wait)
        if name not in self.revisions and name not in self.draining:
            with pytest.raises(NotFound):
                self._run(work)
        elif wait is False and self._users(name) and name not in self.draining:
            with pytest.raises(AdapterInUse):
                self._run(work)
        else:
            assert self._run(work) == (not self._users(name))
            self.revisions.pop(name, None)
            if self._users(name):
                self.draining.add(name)
        self._run(self._settled())

    @rule()
    def restart(self) -> None:
        for lease, _ in self.leases:
            lease.released = True  # with the process
        self.store._leases._leases.clear()
        for counts in (self.store._leases._digests, self.store._leases._names, self.store._leases._uses):
            counts.clear()
        self._run(self.store.close())
        self.leases.clear()
        self.draining.clear()
        self._open()

    def _users(self, name: str) -> int:
        return sum(any(each.name == name for each in adapters) for _, adapters in self.leases)

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        store = self.store
        store.check_integrity()
        assert {name for _, name in store.registry.removals.marked()} == self.draining
        assert [row.name for row in store.registry.models("default").items] == sorted(self.revisions)
        for name in ("x", "y", "z"):
            assert store.leases("default", "default", name) == self._users(name)
        for lease, adapters in self.leases:
            for adapter in adapters:
                assert (Path(lease.paths[adapter.digest]) / "adapter_model.safetensors").is_file()
                assert store.digest_leases(adapter.digest) >= 1
        live = {digest for digests in self.revisions.values() for digest in digests}
        assert live >= set(store.registry.known(live)) == live


class TestSomeHistories(StoreMachine.TestCase):
    settings = settings(
        max_examples=4, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


@pytest.mark.slow
class TestManyHistories(StoreMachine.TestCase):
    settings = settings(
        max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
