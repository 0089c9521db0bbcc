"""The adapters to which a client narrows a router's choice."""

from collections.abc import Mapping, Sequence

from adapters_store.registry import Resolved
from adapters_store.store import AdapterStore
from routing.card_adapters import CardAdapter
from routing.router import RouteError, RouteQuery


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


async def usable(store: AdapterStore, query: RouteQuery, adapters: Sequence[CardAdapter]) -> list[Resolved | None]:
    """What a trained router's adapters mean for the tenant, None where it may not use one.

    An adapter counts with the very weights that the router was trained for, as the tenant's own name has or had them,
    or a public name has them now. Raises as `allowed_candidates`.
    """
    candidates = query.options.candidates
    allowed = await allowed_candidates(store, query.tenant, candidates)
    exact = {each.partition("@")[0] for each in candidates or () if "@" in each}
    wanted = [f"{adapter.name}@{adapter.digest}" for adapter in adapters]
    found = await store.resolve(query.tenant, wanted)

    def may_be(adapter: CardAdapter) -> bool:
        if allowed is None:
            return True
        meant = allowed.get(adapter.name)
        return meant is not None and (adapter.name not in exact or meant.digest == adapter.digest)

    both = zip(wanted, adapters, strict=True)
    return [found.get(each) if may_be(adapter) else None for each, adapter in both]
