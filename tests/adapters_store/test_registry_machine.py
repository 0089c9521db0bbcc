"""The registry against a dictionary."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import event

from adapters_store.registry import (
    DEFAULT_TENANT,
    BeingDeleted,
    Database,
    NameTaken,
    NotFound,
    Outcome,
    Registry,
    TenantRow,
    open_engine,
)
from adapters_store.registry.schema import metadata
from tests.adapters_store.registered import adapter, forget_syncing


class RegistryMachine(RuleBasedStateMachine):
    """The registry against a dictionary: (tenant, name) -> [current digest, revisions, public, tags, deleting]."""

    tenants = st.sampled_from(["acme", "umbrella"])
    names = st.sampled_from(["x", "y", "z"])
    digits = st.sampled_from("abc")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="loramux-registry-"))
        engine = open_engine(f"sqlite:///{self.folder / 'registry.db'}")
        event.listen(engine, "connect", forget_syncing)
        with engine.begin() as connection:
            metadata.create_all(connection)
        self.registry = Registry(Database(engine, lambda: 1.0))
        for tenant in ("acme", "umbrella"):
            self.registry.accounts.add(TenantRow(tenant))
        self.model: dict[tuple[str, str], dict[str, object]] = {}

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.folder)

    def _public_elsewhere(self, tenant: str, name: str) -> bool:
        return any(row["public"] for (owner, each), row in self.model.items() if each == name and owner != tenant)

    @rule(tenant=tenants, name=names, digit=digits, public=st.none() | st.booleans(), replaced=st.booleans())
    def register(self, tenant: str, name: str, digit: str, public: bool | None, replaced: bool) -> None:
        old = self.model.get((tenant, name))
        if old is not None and old["deleting"]:
            with pytest.raises(BeingDeleted):
                self.registry.register(tenant, name, adapter(digit), public=public, replace=replaced)
            return
        taken = old is not None and not replaced
        if taken or (public and self._public_elsewhere(tenant, name)):
            with pytest.raises(NameTaken):
                self.registry.register(tenant, name, adapter(digit), public=public, replace=replaced)
            return
        outcome = self.registry.register(tenant, name, adapter(digit), public=public, replace=replaced).outcome
        if old is None:
            assert outcome is Outcome.CREATED
            row = {"digit": digit, "revisions": [digit], "public": bool(public), "tags": (), "deleting": False}
            self.model[tenant, name] = row
            return
        assert outcome is (Outcome.SAME if old["digit"] == digit else Outcome.REVISED)
        assert isinstance(old["revisions"], list)
        if digit not in old["revisions"]:
            old["revisions"].append(digit)
        old["digit"] = digit
        old["public"] = old["public"] if public is None else public

    @precondition(lambda self: self.model)
    @rule(data=st.data(), digit=digits)
    def roll_back(self, data: st.DataObject, digit: str) -> None:
        tenant, name = data.draw(st.sampled_from(sorted(self.model)))
        row = self.model[tenant, name]
        if row["deleting"] or digit not in row["revisions"]:  # type: ignore[operator]
            with pytest.raises(NotFound):
                self.registry.roll_back(tenant, name, digit * 64)
            return
        self.registry.roll_back(tenant, name, digit * 64)
        row["digit"] = digit

    @precondition(lambda self: self.model)
    @rule(data=st.data(), new=st.lists(st.sampled_from(["t", "u"])))
    def retag(self, data: st.DataObject, new: list[str]) -> None:
        tenant, name = data.draw(st.sampled_from(sorted(self.model)))
        if self.model[tenant, name]["deleting"]:
            with pytest.raises(NotFound):
                self.registry.update(tenant, name, tags=new)
            return
        self.registry.update(tenant, name, tags=new)
        self.model[tenant, name]["tags"] = tuple(sorted(set(new)))

    @rule(tenant=tenants, name=names)
    def mark_deleting(self, tenant: str, name: str) -> None:
        if (tenant, name) not in self.model:
            with pytest.raises(NotFound):
                self.registry.removals.mark(tenant, name)
            return
        self.registry.removals.mark(tenant, name)
        self.model[tenant, name]["deleting"] = True

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        before = self._digits()
        del self.model[key]
        assert self.registry.removals.remove(*key) == tuple(digit * 64 for digit in sorted(before - self._digits()))

    def _digits(self) -> set[str]:
        return {digit for row in self.model.values() for digit in row["revisions"]}  # type: ignore[attr-defined]

    @invariant()
    def everybody_sees_what_the_model_says(self) -> None:
        for tenant in ("acme", "umbrella", DEFAULT_TENANT):
            live = {key: row for key, row in self.model.items() if not row["deleting"]}
            seen = {name: row for (_, name), row in live.items() if row["public"]}
            seen |= {name: row for (owner, name), row in live.items() if owner == tenant}
            items = self.registry.list(tenant).items
            assert [each.name for each in items] == sorted(seen)
            for each in items:
                row = seen[each.name]
                assert (each.adapter.digest[0], each.public, each.tags) == (row["digit"], row["public"], row["tags"])
                shown = row["revisions"] if each.tenant == tenant else [row["digit"]]  # others see what is public now
                assert [revision.digest[0] for revision in each.revisions] == shown
            if items:
                assert self.registry.get(tenant, items[0].name) == items[0]
            resolved = self.registry.resolve(tenant, ["x", "y", "z"])
            assert {name: found.digest[0] for name, found in resolved.items()} == {
                name: row["digit"] for name, row in seen.items()
            }
        blobs = {blob for digit in self._digits() for blob in (adapter(digit).config_blob, adapter(digit).weights_blob)}
        assert self.registry.referenced_blobs() == blobs


class TestSomeHistories(RegistryMachine.TestCase):
    settings = settings(
        max_examples=3, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


@pytest.mark.slow
class TestManyHistories(RegistryMachine.TestCase):
    settings = settings(
        max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
