"""What one process of a server needs to know of the others that answer requests."""

import uuid
from dataclasses import dataclass, field

from server.board import Slot
from server.config import ServeSettings
from server.siblings import Siblings


@dataclass(frozen=True)
class Part:
    """By default there are no others. `name` no other process has.

    `is_first`: what is done once when a server starts is done by this process. `fetches`: so is making the folders of
    adapters that requests use; engines on other machines make their own.
    """

    siblings: Siblings = field(default_factory=Siblings)
    slot: Slot = field(default_factory=Slot)
    is_first: bool = True
    fetches: bool = True
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def shares_registry(self, serve: ServeSettings) -> bool:
        """Whether other processes may answer the same tenants: a SQLite file belongs to one server."""
        return serve.frontends > 1 or (serve.database_url or "").startswith("postgres")
