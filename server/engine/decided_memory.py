"""Decisions at fixed addresses on a device, where steps that are captured as graphs look them up."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from server.engine.decided_rows import PLACES, DecidedRows

MOST_PAGES, MOST_DECISIONS = 128, 256
"""Columns of a mapping, and decoding rows or different decisions, in a step: with 32 layers 29 MB. Steps with more run
without a graph."""


class DecidedMemory:
    """Holds the decisions of one step at a time. Takes memory when it is first written to."""

    def __init__(self, num_layers: int, max_rows: int, max_num_seqs: int, device: torch.device) -> None:
        self._num_layers = num_layers
        self._max_rows = max_rows
        self._most = 1 + min(max_num_seqs, MOST_DECISIONS)
        self._device = device
        self._rows = torch.empty(0)
        self._tables: dict[str, Tensor] = {}
        self._written: DecidedRows | None = None

    def write(self, decided: DecidedRows) -> bool:
        """For the next step, behind all that were launched. False, and nothing changes, for more than it holds."""
        if decided is self._written:
            return True
        sizes = [table.shape[2:] for table in decided.tables.values()]
        if any(count > self._most or pages > MOST_PAGES for count, pages in sizes):
            return False
        if not self._tables:
            self._rows = torch.zeros(self._max_rows, dtype=torch.int64, device=self._device)
            for group, places in PLACES.items():
                shape = (self._num_layers, len(places), self._most, MOST_PAGES)
                self._tables[group] = torch.ones(shape, device=self._device)
        if decided.rows is not None:
            self._rows.zero_()
            self._rows[: len(decided.rows)].copy_(decided.rows)
        for group, table in decided.tables.items():
            self._tables[group][:, :, : table.shape[2], : table.shape[3]].copy_(table)
        self._written = decided
        return True

    def fits(self, num_rows: int, *, decoding: bool, pages: Iterable[int]) -> bool:
        """Whether there is room for steps of so many rows, and so many columns in each group."""
        return all(count <= MOST_PAGES for count in pages) and not (decoding and num_rows > self._most)

    def view(self, num_rows: int, *, decoding: bool, pages: Mapping[str, int]) -> DecidedRows:
        """What is written then, for steps of so many rows, and so many columns by group; those in excess mean nothing.

        decoding: as the steps are that it is written for. Something has been written before.
        """
        tables = {group: self._tables[group][..., :count] for group, count in pages.items()}
        if decoding:
            return DecidedRows(None, {group: table[:, :, :num_rows] for group, table in tables.items()})
        return DecidedRows(self._rows[:num_rows], tables)
