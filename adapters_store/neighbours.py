"""Other processes that lease the adapters of the same registry for the same server."""


class Neighbours:
    """None, unless somebody puts others in their place: nothing is used elsewhere."""

    async def uses(self, owner: str, name: str) -> int:  # noqa: ARG002
        """How many leases of a name they have."""
        return 0

    async def idle(self, owner: str, name: str) -> None:
        """Return when none of them uses the name, which is hidden from all."""
