"""What a pool of rank pages gives to a mix: pages to run with, or room for what is still being loaded."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from adapters_store.residents import Resident
from adapters_store.types import Composition, Mix


@dataclass(eq=False)
class PageLease:
    """The pages of one mix while a sequence runs; given back exactly once by `PagePool.release`.

    `pages[group]` and `weights[group]` run in parallel over all pages of all adapters of the mix, for every group name;
    a weight is the mix's weight times the adapter's own scale. `ranks[group]`: the rank rows of each page that are in
    use. `keys` are the residents that own the pages, `owned[group]` how many of them each one owns.
    """

    mix: Mix
    pages: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, tuple[float, ...]]
    ranks: Mapping[str, tuple[int, ...]]
    keys: tuple[str, ...]
    owned: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    released: bool = False

    @classmethod
    def of(cls, mix: Mix, residents: Mapping[str, Resident], groups: Iterable[str]) -> "PageLease":
        """Of a mix whose residents, by key in the mix's order, are all loaded; `groups` are all group names."""
        weights_of = {mix.digest: 1.0} if mix.composition is Composition.FUSION else dict(mix.entries)
        pages: dict[str, tuple[int, ...]] = dict.fromkeys(groups, ())
        weights: dict[str, tuple[float, ...]] = dict.fromkeys(pages, ())
        ranks: dict[str, tuple[int, ...]] = dict.fromkeys(pages, ())
        for key, resident in residents.items():
            for name, own in resident.pages.items():
                pages[name] += own
                weights[name] += (weights_of[key] * resident.scales[name],) * len(own)
                ranks[name] += resident.ranks[name]
        owned = {name: tuple(len(each.pages.get(name, ())) for each in residents.values()) for name in pages}
        return cls(mix, pages, weights, ranks, tuple(residents), owned)

    def by_key(self, group: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The residents with their pages of a group."""
        start = 0
        for key, count in zip(self.keys, self.owned[group], strict=True):
            yield key, self.pages[group][start : start + count]
            start += count


@dataclass(eq=False)
class Reservation:
    """The pages of one mix while its adapters are being loaded; ended exactly once by `PagePool.settle`.

    `keys` are the residents of the mix; those in `missing` got pages for it, which whoever reserved must have written.
    """

    mix: Mix
    keys: tuple[str, ...]
    missing: tuple[str, ...]
