"""A registry whose process is killed, whose disk is full, whose server is lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import event

from adapters_store.registry import (
    DEFAULT_TENANT,
    Database,
    NotFound,
    Outcome,
    Registry,
    RegistryUnavailable,
    open_engine,
)
from tests.adapters_store.registered import MakeUrl, adapter

STEPS = ["begin", "tenant", "adapter", "name", "revision", "metadata", "quota", "commit", "committed"]
KILLED = """
import json, os, signal, sys
import psycopg, sqlalchemy.dialects.postgresql.psycopg  # once, not in each child
from adapters_store.registry import AdapterRow, Database, Registry, open_engine

def run(url, verb, step):
    def kill(at):
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
    registry = Registry(Database(open_engine(url), lambda: 3.0, kill))
    row = AdapterRow("b" * 64, 8, 16.0, ("q_proj",), 2, 100, "c" * 64, "d" * 64)
    name = f"{verb}.{step}"
    if verb in ("create", "replace"):
        registry.register("default", name, row, replace=verb == "replace", tags=["t"])
    elif verb == "mark":
        registry.removals.mark("default", name)
    else:
        registry.removals.remove("default", name)

codes = []
for verb, step in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        try:
            run(sys.argv[1], verb, step)
        finally:
            os._exit(1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


class TestFaults:
    @pytest.mark.slow
    def test_a_killed_process_leaves_before_or_after(self, make_url: MakeUrl) -> None:
        """Registration, replacement, marking and removal are killed at each of their steps, one child a step."""
        registrations = [f"register.{step}" for step in STEPS]
        transaction = ["begin", "commit", "committed"]
        plan = {
            "create": registrations,
            "replace": registrations,
            "mark": [f"mark_deleting.{step}" for step in transaction],
            "remove": ["remove.begin", "remove.name", "remove.commit", "remove.committed"],
        }
        url = make_url()
        registry = Registry.open(url, lambda: 1.0)
        for verb, steps in plan.items():
            for step in steps:
                name = f"{verb}.{step}"
                if verb != "create":
                    registry.register(DEFAULT_TENANT, name, adapter("a"))
        registry.close()
        jobs = json.dumps([(verb, step) for verb, steps in plan.items() for step in steps])
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", KILLED, url, jobs],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        assert json.loads(done.stdout) == [-9] * 25
        registry = Registry.open(url, lambda: 2.0)
        for verb, steps in plan.items():
            for step in steps:
                after = step.endswith("committed")
                assert self._state(registry, f"{verb}.{step}") == self._expected(verb, after), step
        assert registry.removals.marked() == ((DEFAULT_TENANT, "mark.mark_deleting.committed"),)
        registry.close()

    def _state(self, registry: Registry, name: str) -> tuple[str, int, tuple[str, ...]] | None:
        try:
            found = registry.get(DEFAULT_TENANT, name)
        except NotFound:
            return None
        return found.adapter.digest[0], len(found.revisions), found.tags

    def _expected(self, verb: str, after: bool) -> tuple[str, int, tuple[str, ...]] | None:
        first = ("a", 1, ())
        outcomes = {
            "create": (None, ("b", 1, ("t",))),
            "replace": (first, ("b", 2, ("t",))),
            "mark": (first, None),
            "remove": (first, None),
        }
        return outcomes[verb][after]

    def test_an_exception_at_any_step_changes_nothing(self, make_url: MakeUrl) -> None:
        engine = open_engine(make_url())
        for step in STEPS[:-1]:

            def fail(at: str, step: str = step) -> None:
                if at == f"register.{step}":
                    raise RuntimeError(step)

            registry = Registry(Database(engine, lambda: 1.0, fail))
            with pytest.raises(RuntimeError, match=step):
                registry.register(DEFAULT_TENANT, "sql", adapter("a"), tags=["t"])
            assert registry.list(DEFAULT_TENANT).items == ()
            assert registry.referenced_blobs() == frozenset()
        engine.dispose()

    def test_a_full_disk_refuses_writes_and_still_reads(self, sqlite_template: Path, tmp_path: Path) -> None:
        shutil.copy(sqlite_template, tmp_path / "full.db")
        engine = open_engine(f"sqlite:///{tmp_path / 'full.db'}")
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count = 1"))
        registry = Registry(Database(engine, lambda: 1.0))
        with pytest.raises(RegistryUnavailable, match="unavailable: database or disk is full") as refused:
            registry.register(DEFAULT_TENANT, "sql", adapter("a"), description="x" * 100_000)
        assert (refused.value.code, refused.value.status) == ("registry_unavailable", 503)
        assert registry.list(DEFAULT_TENANT).items == ()
        registry.close()

    def test_a_read_only_file_refuses_writes_and_still_reads(self, sqlite_template: Path, tmp_path: Path) -> None:
        shutil.copy(sqlite_template, tmp_path / "frozen.db")
        engine = open_engine(f"sqlite:///{tmp_path / 'frozen.db'}")
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA query_only = 1"))
        registry = Registry(Database(engine, lambda: 1.0))
        with pytest.raises(RegistryUnavailable, match="unavailable: attempt to write a readonly database"):
            registry.register(DEFAULT_TENANT, "sql", adapter("a"))
        assert registry.accounts.get(DEFAULT_TENANT).id == DEFAULT_TENANT
        registry.close()

    def test_a_lost_server_is_unavailable_without_its_address(self) -> None:
        with pytest.raises(RegistryUnavailable, match="does not answer") as refused:
            Registry.open("postgresql://loramux:secret@127.0.0.1:1/registry", lambda: 0.0)
        assert "127.0.0.1" not in refused.value.message
        assert "secret" not in refused.value.message

    def test_a_connection_cut_by_the_server_is_replaced(self, postgres: str) -> None:
        with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
            connection.execute("CREATE DATABASE cut TEMPLATE template1")
            registry = Registry.open(f"{postgres}/cut", lambda: 0.0)
            cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'cut'"
            assert connection.execute(cut).fetchall() == [(True,)]
        assert registry.register(DEFAULT_TENANT, "sql", adapter("a")).outcome is Outcome.CREATED
        registry.close()
