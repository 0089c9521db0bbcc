"""The cache of decisions against a list in order of use."""

from hypothesis import given
from hypothesis import strategies as st

from routing.route_cache import RouteCache

tenants = st.sampled_from("abc")
keys = st.integers(0, 4)
steps = st.lists(st.tuples(st.sampled_from(["put", "get", "drop"]), tenants, keys), max_size=60)


@given(steps)
def test_against_a_model(steps: list[tuple[str, str, int]]) -> None:
    cache: RouteCache[int] = RouteCache(per_tenant=2, total=3)
    model: dict[str, dict[int, int]] = {}  # dictionaries keep the order of insertion: last used last
    for number, (step, tenant, key) in enumerate(steps):
        known = key in model.get(tenant, {})
        if step == "put":
            cache.put(tenant, key, number)
            entries = model.pop(tenant, {})
            entries.pop(key, None)
            model[tenant] = entries | {key: number}
            if len(model[tenant]) > 2:
                del model[tenant][next(iter(model[tenant]))]
            if sum(map(len, model.values())) > 3:
                away = next(iter(model))
                del model[away][next(iter(model[away]))]
                if not model[away]:
                    del model[away]
        elif step == "get":
            assert cache.get(tenant, key) == model.get(tenant, {}).get(key)
            if known:
                entries = model.pop(tenant)
                entries[key] = entries.pop(key)
                model[tenant] = entries
        else:
            cache.drop(tenant, key)
            if known:
                del model[tenant][key]
                if not model[tenant]:
                    del model[tenant]
        cache.check_integrity()
        assert len(cache) == sum(map(len, model.values()))
