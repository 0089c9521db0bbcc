"""The ways of using ranked adapters that are compared, each as the mix of one query."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters_store.types import Composition, Mix
from routing.evaluate.ranked import RankedQuery
from routing.route_weights import rounded, softmax

METHODS = ("oracle", "base", "selection", "fusion", "mixture", "soup", "smear")


@dataclass(frozen=True)
class Setting:
    """A column of the table. `own` False is out of distribution: the query's own adapter is no candidate."""

    method: str
    own: bool

    @property
    def name(self) -> str:
        return self.method if self.method in ("oracle", "base") else f"{self.method}/{'id' if self.own else 'ood'}"


@dataclass(frozen=True)
class Chosen:
    """What answers a query: adapters by name with their weights, and how they are composed."""

    entries: tuple[tuple[str, float], ...]
    composition: Composition = Composition.MIXTURE

    def mix(self, digests: Mapping[str, str]) -> Mix:
        """With digests in place of names, as a server hands it to the engine."""
        return Mix.of([(digests[name], weight) for name, weight in self.entries], self.composition)


def settings(methods: Sequence[str] = METHODS) -> list[Setting]:
    """Every method in and, where a choice is made, out of distribution."""
    both = [Setting(method, own) for method in methods for own in (True, False)]
    return [setting for setting in both if setting.own or setting.method not in ("oracle", "base")]


def choose(setting: Setting, queries: Sequence[RankedQuery], top_k: int = 3, temperature: float = 0.05) -> list[Chosen]:
    """The adapters of each query under a setting.

    - oracle: the adapter of the query's task; base: none.
    - selection, fusion, mixture: the best one, or the `top_k` best with weight 1/k: LoraRetriever (arXiv 2402.09997).
    - soup: AdapterSoup (arXiv 2302.07027), the uniform average of the weights of `top_k` adapters, one set for a task:
      those with the highest mean score over the task's queries.
    - smear: SMEAR (arXiv 2306.03745), the average of the weights of all adapters by softmax(score / temperature) of the
      query, rounded to 1/32.

    Averages of weights are fusions: A and B are averaged apart from each other.
    """
    if setting.method == "base":
        return [Chosen(())] * len(queries)
    if setting.method == "oracle":
        return [Chosen(((query.task, 1.0),)) for query in queries]
    ranked = [_candidates(query, setting.own) for query in queries]
    if setting.method == "selection":
        return [Chosen(((own[0][0], 1.0),), Composition.SELECTION) for own in ranked]
    if setting.method == "smear":
        return [Chosen(softmax_weights(own, temperature), Composition.FUSION) for own in ranked]
    if setting.method == "soup":
        sets = _soups(queries, ranked, top_k)
        return [Chosen(sets[query.task], Composition.FUSION) for query in queries]
    return [Chosen(_even([name for name, _ in own[:top_k]]), Composition(setting.method)) for own in ranked]


def softmax_weights(ranked: Sequence[tuple[str, float]], temperature: float) -> tuple[tuple[str, float], ...]:
    """softmax(score / temperature) as a router rounds it, in multiples of 1/32; zeros are dropped."""
    weights = rounded(softmax([score for _, score in ranked], temperature))
    return tuple((name, weight) for (name, _), weight in zip(ranked, weights, strict=True) if weight)


def _candidates(query: RankedQuery, own: bool) -> list[tuple[str, float]]:
    found = [(name, score) for name, score in query.ranked if own or name != query.task]
    if not found:
        raise ValueError(f"task {query.task}, row {query.row}: no adapter is left to choose from")
    return found


def _even(names: Sequence[str]) -> tuple[tuple[str, float], ...]:
    return tuple((name, 1.0 / len(names)) for name in names)


def _soups(
    queries: Sequence[RankedQuery], ranked: Sequence[Sequence[tuple[str, float]]], top_k: int
) -> dict[str, tuple[tuple[str, float], ...]]:
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for query, own in zip(queries, ranked, strict=True):
        for name, score in own:
            totals[query.task][name] += score
    return {
        task: _even([name for name, _ in sorted(sums.items(), key=lambda pair: (-pair[1], pair[0]))[:top_k]])
        for task, sums in totals.items()
    }
