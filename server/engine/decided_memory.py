"""Decisions at fixed addresses on a device, where steps that are captured as graphs look them up."""

from collections.abc import Mapping

import torch
from torch import Tensor

from server.engine.decided_rows import PLACES, DecidedRows

MOST_PAGES, MOST_DECISIONS = 128, 256
"""Columns of a mapping and different decisions in a step: with 32 layers 29 MB. Steps with more run without a graph."""


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
        self._rows.zero_()
        self._rows[: len(decided.rows)].copy_(decided.rows)
        for group, table in decided.tables.items():
            self._tables[group][:, :, : table.shape[2], : table.shape[3]].copy_(table)
        self._written = decided
        return True

    def view(self, num_rows: int, pages: Mapping[str, int]) -> DecidedRows:
        """What is written then, for steps of so many rows, and so many columns by group; those in excess mean nothing.

        Something has been written before.
        """
        tables = {group: self._tables[group][..., :count] for group, count in pages.items()}
        return DecidedRows(self._rows[:num_rows], tables)
