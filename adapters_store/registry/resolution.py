"""What `name` and `name@<digest prefix>` mean."""

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Select, and_, or_, select

from adapters_store.registry.checks import NAME_PATTERN
from adapters_store.registry.names import is_name
from adapters_store.registry.rows import Resolved
from adapters_store.registry.schema import adapters, names, revisions

MIN_PREFIX = 4
"""Fewest hexadecimal digits of a digest in `name@<digest prefix>`."""
_MEANT = re.compile(rf"{NAME_PATTERN}(@[0-9a-fA-F]{{{MIN_PREFIX},64}})?")


def may_be_meant(wanted: str) -> bool:
    """Whether this can be `name` or `name@<digest prefix>` at all."""
    return _MEANT.fullmatch(wanted) is not None


def resolve_statement(tenant: str, wanted: Sequence[str], pinned: bool) -> Select[Any]:
    """All revisions of a tenant's own names if `pinned`, else the current ones; of public names the current ones.

    What a name was before it was made public remains its owner's.
    """
    digest = revisions.c.digest if pinned else names.c.digest
    blobs = adapters.c.config_blob, adapters.c.weights_blob
    current = (names.c.digest == digest).label("current")
    statement = select(names.c.tenant, names.c.name, digest, names.c.public, *blobs, current)
    if pinned:
        statement = statement.join(revisions, is_name(revisions, names.c.tenant, names.c.name))
    usable = or_(names.c.tenant == tenant, and_(names.c.public, digest == names.c.digest))
    return statement.join(adapters, adapters.c.digest == digest).where(
        names.c.name.in_(wanted), ~names.c.deleting, usable
    )


def meaning_of(tenant: str, wanted: str, rows: Sequence[Row[Any]]) -> Resolved | None:
    rows = [row for row in rows if row.tenant == tenant] or rows
    _, at, prefix = wanted.partition("@")
    if at and len(prefix) < MIN_PREFIX:
        return None
    fitting = [row for row in rows if (row.digest.startswith(prefix.lower()) if at else row.current)]
    return Resolved(*tuple(fitting[0])[:-1]) if len(fitting) == 1 else None
