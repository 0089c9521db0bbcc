"""The adapters to which a client narrows a router's choice."""

from collections.abc import Mapping, Sequence

from adapters_store.registry import Resolved
from adapters_store.store import AdapterStore
from routing.router import RouteError


async def allowed_candidates(
    store: AdapterStore, tenant: str, candidates: Sequence[str] | None
) -> Mapping[str, Resolved] | None:
    """What the candidates mean for a tenant, by plain name; None for no restriction.

    Raises RouteError `model_not_found` for one that the tenant may not see, RegistryError.
    """
    if candidates is None:
        return None
    found = await store.resolve(tenant, candidates) if candidates else {}
    for place, name in enumerate(candidates):
        if name not in found:
            param = f"lora.candidates.{place}"
            message = f"{param}: {name[:200]!r} does not exist, no such adapter"
            raise RouteError(message, param=param, code="model_not_found")
    return {found[name].name: found[name] for name in reversed(candidates)}  # of two revisions the first
