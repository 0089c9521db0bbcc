"""Routers inside the model as the registry has them: checked against the base model and the adapters, and served."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from adapters_store.registry import RouterRow
from adapters_store.store import AdapterStore
from adapters_store.types import LinearShape
from routing.card_adapters import CardAdapter
from routing.card_file import RouterFolderError
from routing.gate_folder import KIND as METEORA
from routing.gate_folder import GateCard, read_gates
from routing.gated_router import GatedRouter
from routing.prompt_choice import PromptLevelRouter
from routing.prompt_folder import MILORA, MOA, PromptCard, read_prompt_router
from routing.router import Routers
from server.errors import Unprocessable

Card = GateCard | PromptCard

READERS: Mapping[str, Callable[[Path, LinearShape, str], Card]] = MappingProxyType(
    {METEORA: read_gates, MILORA: read_prompt_router, MOA: read_prompt_router}
)
"""What reads a router's folder, by the kinds that are served here."""


class MemberState(StrEnum):
    """Whether the name of a router's adapter still means the weights that the router was trained for."""

    CURRENT = "current"
    REPLACED = "replaced"
    MISSING = "missing"


@dataclass(frozen=True)
class Member:
    """One adapter of such a router."""

    name: str
    digest: str
    state: MemberState


@dataclass(frozen=True)
class ServedGates:
    """One router in use, and how its adapters' names stand."""

    row: RouterRow
    card: Card
    members: tuple[Member, ...]

    @property
    def num_current(self) -> int:
        return sum(each.state is MemberState.CURRENT for each in self.members)

    @property
    def problem(self) -> str | None:
        """Why the router is stale, None if it is not."""
        changed = [f"adapter {each.name!r} is {each.state}" for each in self.members if each.state != "current"]
        if not changed:
            return None
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"{', '.join(changed[:3])}{more}: train the router again"


class GatedRouters:
    """Keeps those of `routers` that are inside the model. `fingerprint` is the base model's, `clock` counts seconds.

    Methods raise RegistryError.
    """

    def __init__(self, store: AdapterStore, routers: Routers, fingerprint: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._routers = routers
        self._fingerprint = fingerprint
        self._clock = clock
        self.served: dict[str, ServedGates] = {}

    async def check(self, kind: str, folder: Path) -> Card:
        """Whether a folder can be served: for this base model, over adapters that are registered as they were.

        Raises Unprocessable.
        """
        try:
            card = await self._read(kind, folder)
        except RouterFolderError as error:
            raise Unprocessable(f"the router cannot be served: {error}", code="router_bad_folder") from error
        for member in await self._members(card):
            if member.state is not MemberState.CURRENT:
                what = "names other weights" if member.state is MemberState.REPLACED else "is not registered"
                raise Unprocessable(
                    f"the router cannot be served: adapter {member.name!r} {what}, expected the one with digest"
                    f" {member.digest[:12]}",
                    code="router_wrong_adapters",
                )
        if isinstance(card, GateCard):
            await self._check_targets(card)
        return card

    async def serve(self, row: RouterRow, folder: Path) -> None:
        """From now on requests can name it. Raises RouterFolderError."""
        card = await self._read(row.kind, folder)
        self.served[row.name] = ServedGates(row, card, await self._members(card))
        if isinstance(card, GateCard):
            self._routers.put(GatedRouter(row.name, card, folder, self._store, self._clock))
        else:
            router = PromptLevelRouter(row.name, card, folder, self._store, self._clock)
            self._routers.put(router, router.trained_with)

    def drop(self, name: str) -> None:
        """Requests can name it no more."""
        del self.served[name]
        self._routers.drop(name)

    async def refresh(self, adapter: str | None = None) -> None:
        """See how the names of the routers' adapters stand, or only of routers over this one."""
        for name, served in tuple(self.served.items()):
            if adapter is None or any(member.name == adapter for member in served.members):
                members = await self._members(served.card)
                if self.served.get(name) is served:
                    self.served[name] = replace(served, members=members)

    async def _read(self, kind: str, folder: Path) -> Card:
        return await asyncio.to_thread(READERS[kind], folder, self._store.shape, self._fingerprint)

    async def _members(self, card: Card) -> tuple[Member, ...]:
        registry = self._store.registry.routers
        meanings = await asyncio.to_thread(registry.meanings, [adapter.name for adapter in card.adapters])

        def state(adapter: CardAdapter) -> MemberState:
            digests = meanings.get(adapter.name)
            if digests is None:
                return MemberState.MISSING
            return MemberState.CURRENT if adapter.digest in digests else MemberState.REPLACED

        return tuple(Member(adapter.name, adapter.digest, state(adapter)) for adapter in card.adapters)

    async def _check_targets(self, card: GateCard) -> None:
        digests = {adapter.digest: adapter.name for adapter in card.adapters}
        for digest, targets in (await asyncio.to_thread(self._store.registry.routers.targets, digests)).items():
            if ungated := sorted(set(targets) - set(card.targets)):
                raise Unprocessable(
                    f"the router cannot be served: adapter {digests[digest]!r} touches {', '.join(ungated)}, for which"
                    " the router has no gates",
                    code="router_wrong_adapters",
                )
