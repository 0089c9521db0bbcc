"""Which rows of a step use which token-level router."""

from collections.abc import Mapping, Sequence

import torch

from server.engine.gates import GateFactory, GatePart, Gates, GateUse, Shares, StepRouter
from server.engine.plan import Chunk

Columns = Mapping[str, tuple[int, ...]]
"""By group name the page of every column of the step's mapping, which may end in some that are none (-1)."""


def make_router(
    factory: GateFactory | None, chunks: list[Chunk], columns: Columns, device: torch.device
) -> StepRouter | None:
    """The router of a step; None if no row is routed by token."""
    parts = gate_parts(chunks, columns, device)
    if not parts:
        return None
    assert factory is not None, "gates were read without a factory"
    return factory.router(parts)


def gate_parts(chunks: list[Chunk], columns: Columns, device: torch.device) -> list[GatePart]:
    """One part for each router in use, in the order of their first rows."""
    users: dict[Gates, list[tuple[int, Chunk]]] = {}
    row = 0
    for chunk in chunks:
        if chunk.sequence.gates is not None:
            users.setdefault(chunk.sequence.gates, []).append((row, chunk))
        row += chunk.num_tokens
    return [_part(gates, own, row, columns, device) for gates, own in users.items()]


def part_shares(chunks: list[Chunk], router: StepRouter) -> Shares:
    """The shares of the last row of every chunk, after a step with the router that `make_router` gave."""
    ends: dict[Gates, int] = {}
    places: list[tuple[int, int, int] | None] = []
    for chunk in chunks:
        gates = chunk.sequence.gates
        if gates is None:
            places.append(None)
            continue
        end = ends[gates] = ends.get(gates, 0) + chunk.num_tokens
        places.append((list(ends).index(gates), end - 1, gates.num_rows))
    return Shares(router.totals(), places)


def _part(
    gates: Gates, users: list[tuple[int, Chunk]], num_rows: int, columns: Columns, device: torch.device
) -> GatePart:
    """What is the same for all rows is left out: each operation that is saved is saved four times a layer."""
    uses, lengths = [_use(chunk) for _, chunk in users], [chunk.num_tokens for _, chunk in users]
    rows = [start + offset for start, chunk in users for offset in range(chunk.num_tokens)]
    most = max(use.top_k for use in uses)

    def by_row(values: Sequence[object], common: object, dtype: torch.dtype) -> torch.Tensor | None:
        """[R, ...] of one value for each request; None if all are `common`."""
        if all(value == common for value in values):
            return None
        return torch.tensor(values, dtype=dtype).repeat_interleave(torch.tensor(lengths), dim=0).to(device)

    return GatePart(
        gates,
        count=len(rows),
        rows=None if len(rows) == num_rows else torch.tensor(rows, device=device),
        allowed=by_row([use.allowed for use in uses], (True,) * gates.num_rows, torch.bool),
        top_k=by_row([use.top_k for use in uses], most, torch.int64),
        temperature=by_row([use.temperature for use in uses], 1.0, torch.float32),
        most=most,
        owners={group: _owners(gates, users, group, pages).to(device) for group, pages in columns.items()},
        touched={group: by_row([_touches(chunk, group) for _, chunk in users], True, torch.bool) for group in columns},
    )


def _owners(gates: Gates, users: list[tuple[int, Chunk]], group: str, columns: tuple[int, ...]) -> torch.Tensor:
    """fp32[n, U]. A page has the same adapter in all leases; two rows of the gates may name the same one."""
    owners = torch.zeros(gates.num_rows, len(columns))
    column_of = {page: column for column, page in enumerate(columns) if page >= 0}
    for _, chunk in users:
        lease = chunk.sequence.lease
        pages = dict(lease.by_key(group)) if lease is not None else {}
        for row, digest in enumerate(_use(chunk).rows):
            for page in pages.get(digest or "", ()):
                if page in column_of:  # else its adapter's scale is 0
                    owners[row, column_of[page]] = 1.0
    return owners


def _touches(chunk: Chunk, group: str) -> bool:
    lease = chunk.sequence.lease
    return lease is not None and bool(lease.pages[group])


def _use(chunk: Chunk) -> GateUse:
    use = chunk.sequence.request.gates
    assert use is not None
    return use
