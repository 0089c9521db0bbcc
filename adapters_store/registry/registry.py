"""The registry: the adapters of all tenants under their names."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, case, func, or_, select, union, update

from adapters_store.registry.accounts import DEFAULT_TENANT, Accounts, lock_tenant, read_tenant, tenant_values
from adapters_store.registry.budgets import Budgets
from adapters_store.registry.checks import NAME_PATTERN, check_name, seek_name
from adapters_store.registry.database import Database, chunks, insert, no_fault, open_engine
from adapters_store.registry.errors import NotFound
from adapters_store.registry.identity import claim
from adapters_store.registry.ledger import Ledger
from adapters_store.registry.migrations import migrate
from adapters_store.registry.names import (
    check_free,
    check_own,
    check_public,
    check_tags,
    given_settings,
    insert_name,
    is_name,
    move_name,
    replace_tags,
    update_settings,
)
from adapters_store.registry.page import Page, paginate
from adapters_store.registry.prototypes import Prototypes, touch_prototypes
from adapters_store.registry.registration import (
    Outcome,
    Registration,
    check_quotas,
    check_room,
    insert_adapter,
    insert_revision,
)
from adapters_store.registry.removals import Removals
from adapters_store.registry.resolution import meaning_of, resolve_statement
from adapters_store.registry.routers import Routers
from adapters_store.registry.rows import AdapterRow, ModelRow, NamedAdapter, Resolved, TenantRow
from adapters_store.registry.schema import adapters, names, revisions, routers, tenants
from adapters_store.registry.uses import Uses
from adapters_store.registry.views import MODEL, load, load_one, visible


class Registry:
    """Adapters and their names; beside them accounts, ledger, trained routers and prototypes of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.accounts = Accounts(database)
        self.ledger = Ledger(database)
        self.removals = Removals(database)
        self.routers = Routers(database)
        self.uses = Uses(database)
        self.prototypes = Prototypes(database)

    def budgets(self, holder: str) -> Budgets:
        """Quotas as this process uses them up together with others; `holder` is a name that no other has."""
        return Budgets(self._database, holder)

    @classmethod
    def open(cls, url: str, clock: Callable[[], float], fault: Callable[[str], None] = no_fault) -> "Registry":
        """The registry at `sqlite:///<file>` or `postgresql://...`: creates or upgrades its schema.

        The tenant "default" exists afterwards. `clock` gives seconds since the epoch. `fault` is for tests of crashes:
        it is called as `fault("<operation>.<step>")` in every write, with the steps `begin`, `commit` (just before)
        and `committed`, and in a registration `tenant`, `adapter`, `name`, `revision`, `metadata`, `quota` too.

        Raises ValueError for another URL, SchemaTooNew for a database of a newer version, RegistryUnavailable.
        """
        registry = cls(Database(open_engine(url), clock, fault))
        try:
            with registry._database.write("open") as connection:
                migrate(connection)
                default = tenant_values(TenantRow(DEFAULT_TENANT, created=clock()))
                connection.execute(insert(connection, tenants).values(default).on_conflict_do_nothing())
        except BaseException:
            registry.close()
            raise
        return registry

    def claim(self, base_model: str, new_id: str) -> str:
        """Bind the registry to a base model, by its fingerprint; returns the registry's id, `new_id` the first time.

        Raises OtherBaseModel if it is bound to another.
        """
        with self._database.write("claim") as connection:
            return claim(connection, base_model, new_id)

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def register(
        self,
        tenant: str,
        name: str,
        adapter: AdapterRow,
        *,
        public: bool | None = None,
        pinned: bool | None = None,
        description: str | None = None,
        tags: Sequence[str] | None = None,
        samples: Sequence[str] | None = None,
        recipe: Mapping[str, object] | None = None,
        replace: bool = False,
        may_be_public: bool = True,
    ) -> Registration:
        """Make `name` point to `adapter`, whose blobs are stored already.

        With `replace` a name that exists moves to the digest; what is None then keeps its value (for a new name it is
        False, or empty). `recipe`, JSON, stays with a new revision. Raises InvalidValue, NotFound for the tenant,
        NameTaken, QuotaExceeded; without `may_be_public` also NotPermitted for a public name.
        """
        check_name("adapter", name)
        settings = given_settings(public, pinned, description, samples)
        new_tags = check_tags(tags)
        now = self._database.clock()
        with self._database.write("register") as connection:
            limits = lock_tenant(connection, tenant)
            self._database.fault("register.tenant")
            insert_adapter(connection, adapter, now)
            self._database.fault("register.adapter")
            created = insert_name(connection, tenant, name, adapter.digest, settings, now)
            self._database.fault("register.name")
            before = (
                adapter.digest
                if created
                else move_name(connection, tenant, name, adapter.digest, replace, may_be_public)
            )
            grown = insert_revision(connection, tenant, name, adapter.digest, now, recipe)
            self._database.fault("register.revision")
            if not created:
                update_settings(connection, tenant, name, settings)
            replace_tags(connection, tenant, name, new_tags)
            self._database.fault("register.metadata")
            if grown:
                check_quotas(connection, tenant, limits, created)
            self._database.fault("register.quota")
            if public is not None and not created:
                touch_prototypes(connection, tenant, name)
            stored = load_one(connection, tenant, tenant, name)
        if created:
            return Registration(Outcome.CREATED, stored)
        return Registration(Outcome.SAME if before == adapter.digest else Outcome.REVISED, stored)

    def check_new(
        self,
        tenant: str,
        name: str,
        *,
        public: bool | None = None,
        replace: bool = False,
        may_be_public: bool = True,
        digest: str | None = None,
        size: int = 0,
    ) -> None:
        """Raise what `register` would raise now, for an adapter of this digest, if it is known, and bytes.

        It changes nothing, and the transaction of `register` decides: this spares work that would be refused.
        """
        check_name("adapter", name)
        seek_name("tenant", tenant)
        with self._database.read() as connection:
            row = read_tenant(connection, tenant)
            before = check_free(connection, tenant, name, replace, may_be_public)
            if public:
                check_public(connection, tenant, name)
            check_room(connection, tenant, row, before is None, digest, size)

    def roll_back(self, tenant: str, name: str, digest: str, *, may_be_public: bool = True) -> NamedAdapter:
        """Move a tenant's own name to another of its revisions.

        Raises NotFound for the name or the revision; without `may_be_public`, NotPermitted for a public name.
        """
        seek_name("adapter", name)
        with self._database.write("roll_back") as connection:
            lock_tenant(connection, tenant)
            check_own(connection, tenant, name, may_be_public)
            known = select(revisions.c.number).where(is_name(revisions, tenant, name), revisions.c.digest == digest)
            if connection.execute(known).first() is None:
                raise NotFound("revision", f"{name}@{digest}")
            connection.execute(update(names).where(is_name(names, tenant, name)).values(digest=digest))
            return load_one(connection, tenant, tenant, name)

    def update(
        self,
        tenant: str,
        name: str,
        *,
        public: bool | None = None,
        pinned: bool | None = None,
        description: str | None = None,
        tags: Sequence[str] | None = None,
        samples: Sequence[str] | None = None,
        may_be_public: bool = True,
    ) -> NamedAdapter:
        """Change what is not None of a tenant's own name.

        Raises NotFound, InvalidValue, NameTaken (as public); without `may_be_public`, NotPermitted for a public name.
        """
        seek_name("adapter", name)
        settings = given_settings(public, pinned, description, samples)
        new_tags = check_tags(tags)
        with self._database.write("update") as connection:
            lock_tenant(connection, tenant)
            check_own(connection, tenant, name, may_be_public)
            update_settings(connection, tenant, name, settings)
            replace_tags(connection, tenant, name, new_tags)
            if public is not None:
                touch_prototypes(connection, tenant, name)
            return load_one(connection, tenant, tenant, name)

    def get(self, tenant: str, name: str) -> NamedAdapter:
        """The adapter of this name that a tenant may use: its own before a public one. Raises NotFound."""
        seek_name("adapter", name)
        with self._database.read() as connection:
            found = connection.execute(
                select(names.c.tenant)
                .where(names.c.name == name, ~names.c.deleting, or_(names.c.tenant == tenant, names.c.public))
                .order_by(case((names.c.tenant == tenant, 0), else_=1))
                .limit(1)
            ).first()
            if found is None:
                raise NotFound("adapter", name)
            return load_one(connection, tenant, found.tenant, name)

    def list(
        self, tenant: str, *, limit: int = 100, cursor: str | None = None, tag: str | None = None, own: bool = False
    ) -> Page[NamedAdapter]:
        """The adapters that a tenant may use, by name; with `own`, only those that belong to it.

        A tenant's own name hides a public one. Neither shows names that are being deleted.
        """
        wanted = visible(tenant, own, cursor or "", limit + 1, tag)
        with self._database.read() as connection:
            rows = load(connection, tenant, wanted)
        return paginate(rows, limit, lambda row: row.name)

    def models(self, tenant: str, *, limit: int | None = None, cursor: str | None = None) -> Page[ModelRow]:
        """What `list` has, all of it unless limited, with little of each: 10,000 names take some 50 ms."""
        wanted = visible(tenant, False, cursor or "", None if limit is None else limit + 1, None, MODEL)
        with self._database.read() as connection:
            rows = [ModelRow(*row) for row in connection.execute(select(wanted).order_by(wanted.c.name))]
        return paginate(rows, len(rows) if limit is None else limit, lambda row: row.name)

    def resolve(self, tenant: str, wanted: Iterable[str]) -> dict[str, Resolved]:
        """What each `name` or `name@<digest prefix>` means for a tenant, in one query; what means nothing is absent.

        A prefix has at least `MIN_PREFIX` digits and fits exactly one revision of the tenant's own name or, without
        one, of the public name.
        """
        plain = {each: each.partition("@")[0] for each in wanted}
        plain = {each: name for each, name in plain.items() if re.fullmatch(NAME_PATTERN, name)}
        pinned = any("@" in each for each in plain)
        found: dict[str, list[Row[Any]]] = defaultdict(list)
        with self._database.read() as connection:
            for some in chunks(sorted(set(plain.values()))):
                for row in connection.execute(resolve_statement(tenant, some, pinned)):
                    found[row.name].append(row)
        meanings = {each: meaning_of(tenant, each, found.get(name, [])) for each, name in plain.items()}
        return {each: meaning for each, meaning in meanings.items() if meaning is not None}

    def samples(self, tenant: str, wanted: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
        """The example inputs of a tenant's own names; names that do not exist are absent."""
        found: dict[str, tuple[str, ...]] = {}
        with self._database.read() as connection:
            for some in chunks(sorted(set(wanted))):
                statement = select(names.c.name, names.c.samples).where(
                    names.c.tenant == tenant, names.c.name.in_(some)
                )
                found |= {row.name: tuple(row.samples) for row in connection.execute(statement)}
        return found

    def referenced_blobs(self) -> frozenset[str]:
        """sha256 of every blob that an adapter or a router needs, of all tenants."""
        statement = union(select(adapters.c.config_blob), select(adapters.c.weights_blob), select(routers.c.blob))
        with self._database.read() as connection:
            return frozenset(connection.execute(statement).scalars())

    def known(self, digests: Iterable[str]) -> frozenset[str]:
        """Those digests that somebody has under some name."""
        found: set[str] = set()
        with self._database.read() as connection:
            for some in chunks(sorted(set(digests))):
                statement = select(adapters.c.digest).where(adapters.c.digest.in_(some))
                found.update(connection.execute(statement).scalars())
        return frozenset(found)

    def blobs_of(self, digests: Iterable[str]) -> Mapping[str, tuple[str, str]]:
        """sha256 of config and weights, by the digest of adapters that somebody has."""
        found: dict[str, tuple[str, str]] = {}
        with self._database.read() as connection:
            for some in chunks(sorted(set(digests))):
                blobs = adapters.c.config_blob, adapters.c.weights_blob
                statement = select(adapters.c.digest, *blobs).where(adapters.c.digest.in_(some))
                found |= {row.digest: (row.config_blob, row.weights_blob) for row in connection.execute(statement)}
        return found

    def pinned(self) -> tuple[Resolved, ...]:
        """The pinned names of all tenants with what they mean, by tenant and name."""
        blobs = adapters.c.config_blob, adapters.c.weights_blob
        statement = select(names.c.tenant, names.c.name, names.c.digest, names.c.public, *blobs)
        statement = statement.join(adapters, adapters.c.digest == names.c.digest)
        statement = statement.where(names.c.pinned, ~names.c.deleting).order_by(*names.primary_key)
        with self._database.read() as connection:
            return tuple(Resolved(*row) for row in connection.execute(statement))

    def count(self) -> int:
        """How many adapters there are, whatever their names."""
        with self._database.read() as connection:
            return connection.execute(select(func.count()).select_from(adapters)).scalar_one()

    def count_names(self) -> int:
        """How many names of all tenants there are, without those that are being deleted."""
        with self._database.read() as connection:
            return connection.execute(select(func.count()).where(~names.c.deleting)).scalar_one()
