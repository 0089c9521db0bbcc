"""Prototypes: the vectors by which a prompt finds an adapter, one set for each name and encoder."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import BigInteger, Connection, Row, Select, Text, and_, cast, delete, func, select, tuple_, update

from adapters_store.registry.database import Database, chunks, insert
from adapters_store.registry.errors import InvalidValue
from adapters_store.registry.names import is_name
from adapters_store.registry.page import Page, paginate
from adapters_store.registry.rows import NewPrototype, PrototypeRow, TextsRow, source_of, texts_of
from adapters_store.registry.schema import identity, names, prototypes

_VERSION = "prototypes"
_SCANNED = 500
"""Names whose texts are read and hashed at a time: at most 50 samples each."""


class Prototypes:
    """The prototypes of all names.

    A name's texts may change after its prototypes were made; these then remain until newer ones replace them, and the
    name counts as missing.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def version(self) -> int:
        """Grows with every change or removal of prototypes, and of who may use a name that has some."""
        with self._database.read() as connection:
            return _version(connection)

    def put(
        self, tenant: str, name: str, encoder: str, source: str, vectors: bytes, count: int, width: int
    ) -> int | None:
        """Store the prototypes of a name and return their version, None if it has other texts or is gone."""
        written = self.put_many([NewPrototype(tenant, name, encoder, source, vectors, count, width)])
        return written.get((tenant, name))

    def put_many(self, new: Sequence[NewPrototype]) -> dict[tuple[str, str], int]:
        """Store prototypes, in one transaction, of those (tenant, name) that still have the texts of their `source`.

        A name is given once. Returns the versions of what is stored: names that are gone, are being deleted or got
        other texts meanwhile are absent. Raises InvalidValue for vectors of another size than count x width.
        """
        for each in new:
            if each.count < 1 or each.width < 1 or len(each.vectors) != 4 * each.count * each.width:
                raise InvalidValue(
                    f"the prototypes of {each.name!r} have {len(each.vectors)} bytes:"
                    f" expected {each.count} x {each.width} float32"
                )
        versions: dict[tuple[str, str], int] = {}
        with self._database.write("put_prototypes") as connection:
            locked = _lock_names(connection, sorted((each.tenant, each.name) for each in new))
            kept = [each for each in new if locked.get((each.tenant, each.name)) == each.source]
            last = count_changes(connection, len(kept)) if kept else 0
            for version, each in enumerate(kept, last - len(kept) + 1):
                versions[each.tenant, each.name] = version
                values = asdict(each) | {"version": version}
                statement = insert(connection, prototypes).values(values)
                connection.execute(statement.on_conflict_do_update(index_elements=prototypes.primary_key, set_=values))
        return versions

    def get(self, tenant: str, name: str, encoder: str) -> PrototypeRow | None:
        """The prototypes of one name that is not being deleted."""
        statement = _rows(encoder).where(is_name(prototypes, tenant, name))
        with self._database.read() as connection:
            row = connection.execute(statement).first()
        return None if row is None else PrototypeRow(**row._mapping)

    def changed(self, encoder: str, after: int, limit: int = 500) -> list[PrototypeRow]:
        """The first `limit` changes after a version, in order of their versions.

        Versions are given in the order in which their transactions end: whoever has read up to one misses nothing
        below it.
        """
        statement = _rows(encoder).where(prototypes.c.version > after).order_by(prototypes.c.version).limit(limit)
        with self._database.read() as connection:
            return [PrototypeRow(**row._mapping) for row in connection.execute(statement)]

    def keys(self, encoder: str) -> tuple[int, frozenset[tuple[str, str]]]:
        """(tenant, name) of all that have prototypes, at a version: what is older and not among them was removed."""
        statement = select(prototypes.c.tenant, prototypes.c.name).join(names, _same_name())
        statement = statement.where(prototypes.c.encoder == encoder, ~names.c.deleting)
        with self._database.read() as connection:
            found = frozenset((row.tenant, row.name) for row in connection.execute(statement))
            return _version(connection), found

    def count(self, encoder: str) -> int:
        """How many names have prototypes of this encoder."""
        statement = select(func.count()).select_from(prototypes.join(names, _same_name()))
        statement = statement.where(prototypes.c.encoder == encoder, ~names.c.deleting)
        with self._database.read() as connection:
            return connection.execute(statement).scalar_one()

    def texts(self, tenant: str, name: str, encoder: str) -> TextsRow | None:
        """What one name can be found by, None if there is no such name."""
        with self._database.read() as connection:
            row = connection.execute(_texts(encoder).where(is_name(names, tenant, name))).first()
        return None if row is None else _texts_row(row)

    def missing(self, encoder: str, limit: int = 500, cursor: str | None = None) -> Page[TextsRow]:
        """Names, by tenant and name, with texts but without prototypes of this encoder or with those of other texts."""
        found: list[TextsRow] = []
        after = tuple((cursor or "/").split("/", 1))
        while len(found) <= limit:
            statement = _texts(encoder).where(tuple_(names.c.tenant, names.c.name) > after)
            with self._database.read() as connection:
                rows = connection.execute(statement.order_by(names.c.tenant, names.c.name).limit(_SCANNED)).all()
            scanned = [_texts_row(row) for row in rows]
            found += [each for each in scanned if each.texts and each.source != each.stored]
            if len(rows) < _SCANNED:
                break
            after = (scanned[-1].tenant, scanned[-1].name)
        return paginate(found, limit, lambda row: f"{row.tenant}/{row.name}")

    def remove(self, tenant: str, name: str, encoder: str) -> None:
        """Forget the prototypes of one name, if there are any."""
        with self._database.write("remove_prototypes") as connection:
            this = is_name(prototypes, tenant, name), prototypes.c.encoder == encoder
            gone = connection.execute(delete(prototypes).where(*this).returning(prototypes.c.name))
            if gone.first() is not None:
                count_changes(connection, 1)

    def forget(self, encoder: str) -> int:
        """Remove the prototypes of an encoder that is not used any more; returns how many names had some."""
        with self._database.write("forget_prototypes") as connection:
            gone = delete(prototypes).where(prototypes.c.encoder == encoder).returning(prototypes.c.name)
            count = len(connection.execute(gone).all())
            if count:
                count_changes(connection, 1)
            return count


def has_prototypes(connection: Connection, tenant: str, name: str) -> bool:
    """Whether a name has prototypes of any encoder."""
    statement = select(prototypes.c.name).where(is_name(prototypes, tenant, name)).limit(1)
    return connection.execute(statement).first() is not None


def touch_prototypes(connection: Connection, tenant: str, name: str) -> None:
    """Give the prototypes of a name that others may use now, or no more, new versions. Last in its transaction."""
    of_name = is_name(prototypes, tenant, name)
    encoders = connection.execute(select(prototypes.c.encoder).where(of_name).order_by("encoder")).scalars().all()
    if not encoders:
        return
    first = count_changes(connection, len(encoders)) - len(encoders) + 1
    for version, encoder in enumerate(encoders, first):
        changed = update(prototypes).where(of_name, prototypes.c.encoder == encoder)
        connection.execute(changed.values(version=version))


def _version(connection: Connection) -> int:
    return int(connection.execute(select(identity.c.value).where(identity.c.key == _VERSION)).scalar() or 0)


def count_changes(connection: Connection, count: int) -> int:
    """The last of `count` new versions. Changes of prototypes wait for one another here: no lock is taken later."""
    statement = insert(connection, identity).values(key=_VERSION, value=str(count))
    more = cast(cast(identity.c.value, BigInteger) + count, Text)
    statement = statement.on_conflict_do_update(index_elements=identity.primary_key, set_={"value": more})
    return int(connection.execute(statement.returning(identity.c.value)).scalar_one())


def _lock_names(connection: Connection, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The sources of those names that exist and stay as they are until the transaction ends."""
    found: dict[tuple[str, str], str] = {}
    for some in chunks(pairs):
        these = tuple_(names.c.tenant, names.c.name).in_(some), ~names.c.deleting
        texts = names.c.tenant, names.c.name, names.c.samples, names.c.description
        statement = select(*texts).where(*these).order_by(names.c.tenant, names.c.name)
        rows = connection.execute(statement.with_for_update(key_share=True))
        found |= {(row.tenant, row.name): source_of(texts_of(row.samples, row.description)) for row in rows}
    return found


def _same_name() -> Any:
    return and_(names.c.tenant == prototypes.c.tenant, names.c.name == prototypes.c.name)


def _rows(encoder: str) -> Select[Any]:
    statement = select(prototypes, names.c.public).join(names, _same_name())
    return statement.where(prototypes.c.encoder == encoder, ~names.c.deleting)


def _texts(encoder: str) -> Select[Any]:
    shown = names.c.tenant, names.c.name, names.c.samples, names.c.description, names.c.public
    statement = select(*shown, prototypes.c.source.label("stored"))
    statement = statement.outerjoin(prototypes, and_(_same_name(), prototypes.c.encoder == encoder))
    return statement.where(~names.c.deleting)


def _texts_row(row: Row[Any]) -> TextsRow:
    return TextsRow(row.tenant, row.name, tuple(row.samples), row.description, row.public, row.stored)
