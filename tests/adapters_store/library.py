"""Small random adapters of every kind, pools for them, and what their mixes add to a linear, from the definition."""

import itertools
import random

import torch
from hypothesis import strategies as st

from adapters_store.merge import fuse
from adapters_store.page_lease import PageLease, Reservation
from adapters_store.pages import PackedAdapter, pack
from adapters_store.pool import PagePool
from adapters_store.types import GROUPS, PAGE_RANK, TARGETS, AdapterWeights, Composition, LinearShape, LoraPair, Mix
from adapters_store.upload import write_pages

HIDDEN, KEYS, FEED = 6, 3, 5
INPUTS = dict.fromkeys(TARGETS, HIDDEN) | {"down_proj": FEED}
OUTPUTS = dict.fromkeys(TARGETS, HIDDEN) | {"k_proj": KEYS, "v_proj": KEYS, "gate_proj": FEED, "up_proj": FEED}
SHAPE = LinearShape(2, INPUTS, OUTPUTS)
CPU = torch.device("cpu")


def adapter(
    digest: str,
    rank: int | tuple[int, ...],
    targets: tuple[str, ...] = TARGETS,
    scales: tuple[float, ...] = (1.0,),
    seed: int = 0,
) -> AdapterWeights:
    """Random weights; ranks and scales go round over layers and targets."""
    generator = torch.Generator().manual_seed(seed)
    modules = list(itertools.product(range(SHAPE.num_layers), targets))
    ranks = itertools.cycle(rank if isinstance(rank, tuple) else (rank,))
    pairs = {}
    for (layer, target), r, scale in zip(modules, ranks, itertools.cycle(scales), strict=False):
        a = torch.randn(r, INPUTS[target], generator=generator, dtype=torch.float64)
        b = torch.randn(OUTPUTS[target], r, generator=generator, dtype=torch.float64)
        pairs[layer, target] = LoraPair(a, b, scale)
    return AdapterWeights(digest, pairs)


def library() -> dict[str, AdapterWeights]:
    """Adapters of one to three pages a group, whole and partial, with one scale and with several."""
    draw = random.Random(0)
    made = [
        adapter("00", 4),
        adapter("01", (16, 9)),
        adapter("02", (3, 40, 17), scales=(0.5, 2.0)),
        adapter("03", 8, ("q_proj", "v_proj"), (0.25,)),
        adapter("04", 33, ("k_proj",)),
        adapter("05", (20, 1), ("down_proj", "up_proj"), (-1.0,)),
        adapter("06", 16, ("o_proj", "gate_proj"), (3.0, 0.0)),
        *(
            adapter(f"{n:02}", draw.randint(1, 48), tuple(draw.sample(TARGETS, 3)), (draw.random(),), n)
            for n in range(7, 12)
        ),
    ]
    return {weights.digest: weights for weights in made}


LIBRARY = library()
RANKS = {digest: weights.group_ranks for digest, weights in LIBRARY.items()}
PACKED = {digest: pack(weights, SHAPE, torch.float64) for digest, weights in LIBRARY.items()}
WEIGHTS = st.sampled_from([1.0, 0.5, -0.75, 0.125, 2.0])
ENTRIES = st.lists(st.tuples(st.sampled_from(sorted(LIBRARY)), WEIGHTS), max_size=4)
MIXES = st.builds(Mix.of, ENTRIES) | st.builds(
    Mix.of,
    ENTRIES.filter(lambda entries: sum(weight for _, weight in entries) != 0),
    st.just(Composition.FUSION),
)


def single(digest: str) -> Mix:
    return Mix(((digest, 1.0),))


def expected_delta(mix: Mix, layer: int, target: str) -> tuple[torch.Tensor, float]:
    """The (out, in) matrix that the mix adds to a linear, from its definition, and the size of what cancels in it."""
    pairs = [(LIBRARY[d].pairs[layer, target], w) for d, w in mix.entries if (layer, target) in LIBRARY[d].pairs]
    if mix.composition is not Composition.FUSION:
        zero = torch.zeros(OUTPUTS[target], INPUTS[target], dtype=torch.float64)
        return sum((w * pair.scale * pair.b @ pair.a for pair, w in pairs), zero), 1.0
    rank = max((pair.rank for pair, _ in pairs), default=0)
    a = torch.zeros(rank, INPUTS[target], dtype=torch.float64)
    b = torch.zeros(OUTPUTS[target], rank, dtype=torch.float64)
    for pair, w in pairs:
        a += w * torch.nn.functional.pad(pair.a, (0, 0, 0, rank - pair.rank))
        b += w * pair.scale * torch.nn.functional.pad(pair.b, (0, rank - pair.rank))
    largest = sum(abs(w) for _, w in pairs) ** 2 * rank
    return b @ a, max(1.0, largest)


def leased_delta(pool: PagePool, lease: PageLease, layer: int, target: str) -> torch.Tensor:
    """The same matrix from the lease's pages and weights, as the kernels use them."""
    group = next(group for group in GROUPS if target in group.targets)
    outputs = SHAPE.group_outputs(group)
    place = group.targets.index(target)
    a, b = pool.tensors[group.name]
    pages = list(lease.pages[group.name])
    rows = a[layer, pages, place * PAGE_RANK : (place + 1) * PAGE_RANK]
    columns = b[layer, pages, :, sum(outputs[:place]) : sum(outputs[: place + 1])]
    weights = torch.tensor(lease.weights[group.name], dtype=a.dtype)
    return torch.einsum("p,pro,pri->oi", weights, columns, rows)


def check_content(pool: PagePool, lease: PageLease) -> None:
    for layer, target in itertools.product(range(SHAPE.num_layers), TARGETS):
        expected, size = expected_delta(lease.mix, layer, target)
        torch.testing.assert_close(leased_delta(pool, lease, layer, target), expected, rtol=1e-5, atol=1e-5 * size)


def make_pool(num_pages: dict[str, int] | int, dtype: torch.dtype = torch.float64) -> PagePool:
    """A pool whose pages hold NaN at first, so that what is not written shows."""
    pool = PagePool(SHAPE, num_pages, CPU, dtype)
    for a, b in pool.tensors.values():
        a.fill_(torch.nan)
        b.fill_(torch.nan)
    return pool


def packed_resident(mix: Mix, key: str) -> PackedAdapter:
    """What the pages of one resident of the mix hold."""
    if mix.composition is not Composition.FUSION:
        return PACKED[key]
    return fuse([(PACKED[digest], weight) for digest, weight in mix.entries], SHAPE, torch.float64)


def write(pool: PagePool, mix: Mix, key: str) -> None:
    """Load one resident of a reserved mix."""
    packed = packed_resident(mix, key)
    write_pages(packed, pool.pages_of(key), pool.tensors)
    pool.fill(key, packed.scales)


def load(pool: PagePool, reservation: Reservation) -> None:
    """Load all that was reserved."""
    for key in reservation.missing:
        write(pool, reservation.mix, key)
    pool.settle(reservation)


def acquire(pool: PagePool, mix: Mix) -> PageLease | None:
    """The lease of a mix, which is loaded first if need be; None if its pages cannot be had."""
    reservation = pool.reserve(mix, RANKS)
    if reservation is None:
        return None
    load(pool, reservation)
    lease = pool.acquire(mix)
    assert lease is not None
    return lease
