"""Quotas that several processes share: each borrows budgets, which are taken from one bucket for a tenant at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, extract, func, select, update

from adapters_store.registry.database import Database, insert
from adapters_store.registry.schema import budgets, places

PLACES = "concurrency"
"""Kind of the row that those wait for who change a tenant's places at once."""
PLACE_SECONDS = 3.0
"""How long places are kept for a holder that does not renew them: it has died."""
BACK_SECONDS = 10.0
"""A clock that is back by more than this was set, and counts from there; by less it only waits."""
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class BudgetWish:
    """One holder's dealings with one bucket, which holds `capacity` and gains `rate` a second.

    `back` is what the holder had borrowed and did not use; below 0 what it used beyond. `need` is the least that is of
    any use to it, `want` the most that it takes.
    """

    tenant: str
    kind: str
    rate: float
    capacity: float
    back: float
    need: float
    want: float


@dataclass(frozen=True)
class BudgetGrant:
    """What a holder may use, and what the bucket has left; below 0 when more was used than it had."""

    amount: float
    left: float


@dataclass(frozen=True)
class PlaceWish:
    """Of the `most` sequences that a tenant may have at once the holder has `running`, and wants `want` in all.

    At least `need`, or none beyond those that run.
    """

    tenant: str
    most: int
    running: int
    need: int
    want: int


class Budgets:
    """The buckets and places of all tenants. `holder` is this process, by a name that no other has.

    In PostgreSQL time is the database's, so that clocks of machines need not agree; a SQLite file has one machine.
    """

    def __init__(self, database: Database, holder: str) -> None:
        self._database = database
        self._holder = holder

    def exchange(
        self, wishes: Sequence[BudgetWish], place_wishes: Sequence[PlaceWish] = ()
    ) -> tuple[list[BudgetGrant], list[int]]:
        """All in one transaction: budgets, and how many places the holder has now. Raises RegistryUnavailable."""
        keys = sorted({(each.tenant, each.kind) for each in wishes} | {(each.tenant, PLACES) for each in place_wishes})
        with self._database.write("budgets") as connection:
            _relax(connection)
            levels = _lock(connection, keys)
            now = self._now(connection)
            grants = []
            for wish in wishes:
                row = levels[wish.tenant, wish.kind]
                grants.append(row.exchange(wish, now))
            for key, row in levels.items():
                if row.is_changed:
                    _write(connection, key, row)
            held = [self._take_places(connection, wish, now) for wish in place_wishes]
        return grants, held

    def leave(self) -> None:
        """This process has no places any more. Raises RegistryUnavailable."""
        with self._database.write("leave_budgets") as connection:
            connection.execute(delete(places).where(places.c.holder == self._holder))

    def _now(self, connection: Connection) -> float:
        """Read behind the locks, so that it never goes back from one holder to the next."""
        if connection.dialect.name == "postgresql":
            return float(connection.execute(select(extract("epoch", func.clock_timestamp()))).scalar_one())
        return self._database.clock()

    def _take_places(self, connection: Connection, wish: PlaceWish, now: float) -> int:
        of_tenant = places.c.tenant == wish.tenant
        connection.execute(
            delete(places).where(of_tenant, (places.c.until < now) | (places.c.until > now + 2 * PLACE_SECONDS))
        )
        others = select(func.coalesce(func.sum(places.c.places), 0)).where(of_tenant, places.c.holder != self._holder)
        free = wish.most - int(connection.execute(others).scalar_one())
        held = min(wish.want, free) if free >= wish.need else wish.running
        held = max(held, wish.running)
        if held:
            values = {"places": held, "until": now + PLACE_SECONDS}
            statement = insert(connection, places).values(tenant=wish.tenant, holder=self._holder, **values)
            connection.execute(statement.on_conflict_do_update(index_elements=places.primary_key, set_=values))
        else:
            connection.execute(delete(places).where(of_tenant, places.c.holder == self._holder))
        return held


@dataclass
class BucketRow:
    """A bucket as it is stored, or nothing yet: it is full when somebody first wants of it."""

    level: float | None = None
    capacity: float = 0.0
    time: float = 0.0
    is_changed: bool = False

    def exchange(self, wish: BudgetWish, now: float) -> BudgetGrant:
        level = self._level(wish, now)
        level = min(wish.capacity, level + wish.back)
        amount = min(wish.want, level) if level >= wish.need - _TOLERANCE * max(1.0, wish.need) else 0.0
        amount = max(0.0, amount)
        self.level, self.capacity, self.is_changed = level - amount, wish.capacity, True
        self.time = now if now >= self.time or now < self.time - BACK_SECONDS else self.time
        return BudgetGrant(amount, self.level)

    def _level(self, wish: BudgetWish, now: float) -> float:
        """What it has grown to. Of a larger quota the growth can be used at once, and what was used stays used."""
        if self.level is None:
            return wish.capacity
        level = self.level + max(0.0, wish.capacity - self.capacity)
        return min(wish.capacity, level + max(0.0, now - self.time) * wish.rate)


class LocalBuckets:
    """The same in one process, for tests and for when no registry answers. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rows: dict[tuple[str, str], BucketRow] = {}

    def exchange(
        self, wishes: Sequence[BudgetWish], place_wishes: Sequence[PlaceWish] = ()
    ) -> tuple[list[BudgetGrant], list[int]]:
        now = self._clock()
        grants = [self._rows.setdefault((wish.tenant, wish.kind), BucketRow()).exchange(wish, now) for wish in wishes]
        return grants, [max(wish.running, min(wish.want, wish.most)) for wish in place_wishes]


def _relax(connection: Connection) -> None:
    """What a failing disk or a power cut takes back of this is a second's budget: nobody waits for the disk."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")


def _lock(connection: Connection, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], BucketRow]:
    """The rows of these keys, in their order, which nobody else changes until the transaction ends."""
    rows: dict[tuple[str, str], BucketRow] = {}
    for tenant, kind in keys:
        values = {"tenant": tenant, "kind": kind, "level": None, "capacity": 0.0, "time": 0.0}
        connection.execute(insert(connection, budgets).values(values).on_conflict_do_nothing())
        this = budgets.c.tenant == tenant, budgets.c.kind == kind
        row = connection.execute(select(budgets).where(*this).with_for_update()).one()
        rows[tenant, kind] = BucketRow(row.level, row.capacity, row.time)
    return rows


def _write(connection: Connection, key: tuple[str, str], row: BucketRow) -> None:
    this = budgets.c.tenant == key[0], budgets.c.kind == key[1]
    values = {"level": row.level, "capacity": row.capacity, "time": row.time}
    connection.execute(update(budgets).where(*this).values(**values))
