"""How many requests wait for their first token, in each front end: counted where all of them see it at once."""

import mmap
import os

CELL = 8
"""Bytes of one count: written and read by the processor as one."""


class Board:
    """`slots` counts in memory that processes share by its file descriptor. Each writes its own slot alone."""

    def __init__(self, slots: int, file: int | None = None) -> None:
        """`file` None: new, with all counts 0."""
        if file is None:
            file = os.memfd_create("loramux-board")
            os.ftruncate(file, slots * CELL)
        self.file = file
        self._memory = mmap.mmap(file, slots * CELL)
        self._counts = memoryview(self._memory).cast("q")

    def set(self, slot: int, count: int) -> None:
        self._counts[slot] = count

    def others(self, slot: int) -> int:
        """The sum without this slot's."""
        return sum(self._counts) - self._counts[slot]

    def close(self) -> None:
        self._counts.release()
        self._memory.close()
        os.close(self.file)


class Slot:
    """A process's own count on a board, or alone with it."""

    def __init__(self, board: Board | None = None, number: int = 0) -> None:
        self._board = board
        self._number = number

    def set(self, count: int) -> None:
        if self._board is not None:
            self._board.set(self._number, count)

    @property
    def others(self) -> int:
        """The sum of the other processes' counts."""
        return 0 if self._board is None else self._board.others(self._number)
