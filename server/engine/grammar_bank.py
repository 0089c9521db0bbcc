"""The compiled grammars of one engine: each is compiled once, beside the steps, and stays while there is room."""

import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Protocol

from adapters_store.loader import Loader, ThreadLoader
from server.engine.config import EngineConfig, RequestError
from server.engine.constraint import Constraint
from server.engine.grammar import STACK_BYTES, Grammar, GrammarError
from server.engine.grammar_check import CheckedCompiler
from server.engine.masks import mask_threads
from server.model.config import ModelConfig

logger = logging.getLogger(__name__)

REFUSED_BYTES = 1 << 12
"""What is counted for a constraint that was refused, beside its source."""

MOST_COPIES = 16
"""Of a grammar: a mask near the end of a bounded string takes a millisecond, and what shares its lexer waits for it. A
further copy takes a millisecond to compile and must find out about regular expressions by itself."""

COMPILERS = 2
"""Threads, of which a hostile constraint takes one for some seconds."""


def open_bank(config: EngineConfig, model: ModelConfig) -> "GrammarBank":
    """Where the requests of an engine find their grammars."""
    folder, copies = Path(config.model), min(MOST_COPIES, 2 * mask_threads(config))
    compiler = CheckedCompiler(folder, model.vocab_size, model.eos_token_ids, copies=copies)
    return GrammarBank(ThreadLoader(COMPILERS, stack_bytes=STACK_BYTES), compiler, config.grammar_memory)


class Compiler(Protocol):
    """Makes grammars, in any thread."""

    def compile(self, constraint: Constraint) -> Grammar:
        """Raises GrammarError, or OSError or MemoryError where the system refuses what it needs."""
        ...

    def close(self) -> None: ...


class GrammarBank:
    """Grammars by constraint. Not thread-safe; `loader` runs `compiler`, and both are the bank's.

    budget: bytes, as `Grammar` counts them, of the grammars that no request uses; the least recently used go first.
    """

    def __init__(self, loader: Loader, compiler: Compiler, budget: int) -> None:
        self._loader = loader
        self._compiler = compiler
        self._budget = budget
        self._found: dict[Constraint, Grammar | GrammarError] = {}  # the least recently used first
        self._passing: set[Constraint] = set()  # of the refused ones, those that may be fine when they come again
        self._users: Counter[Constraint] = Counter()
        self._compiling: set[Constraint] = set()
        self._idle_bytes = 0

    def enter(self, constraint: Constraint) -> None:
        """A request comes; `leave` must be called once when it ends."""
        self._users[constraint] += 1
        if constraint in self._found:
            found = self._found[constraint] = self._found.pop(constraint)
            if self._users[constraint] == 1:
                self._idle_bytes -= _num_bytes(constraint, found)
        elif constraint not in self._compiling:
            self._compiling.add(constraint)
            self._loader.submit(partial(self._compiler.compile, constraint), partial(self._take, constraint))

    def leave(self, constraint: Constraint) -> None:
        """A request has ended."""
        self._users[constraint] -= 1
        if not self._users[constraint]:
            del self._users[constraint]
            if constraint in self._found:
                self._rest(constraint)

    def get(self, constraint: Constraint) -> Grammar | None:
        """The grammar, or None while it is being compiled. Raises RequestError if it cannot be used."""
        found = self._found.get(constraint)
        if constraint in self._passing:
            raise RequestError(str(found), param=constraint.param, code="constraint_unavailable")
        if isinstance(found, GrammarError):
            raise RequestError(f"{constraint.param}: {found}", param=constraint.param, code="invalid_constraint")
        return found

    @property
    def compiling(self) -> bool:
        """Whether something is being compiled."""
        return bool(self._compiling)

    def poll(self) -> None:
        """Take what has been compiled."""
        self._loader.poll()

    def wait(self, seconds: float) -> None:
        """Return when `poll` may have news, at once if nothing is being compiled, at the latest after this time."""
        self._loader.wait(seconds)

    def close(self) -> None:
        """Compile nothing more."""
        self._compiler.close()
        self._loader.close(0.0)

    def drop_idle(self) -> int:
        """Forget all that no request uses: its bytes."""
        dropped = self._idle_bytes
        self._found = {one: found for one, found in self._found.items() if one in self._users}
        self._idle_bytes = 0
        return dropped

    def __len__(self) -> int:
        return len(self._found)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless all that is used is there or under way, and the rest is within the budget."""
        if lost := self._users.keys() - self._found.keys() - self._compiling:
            raise RuntimeError(f"requests use {len(lost)} grammars that nobody compiles")
        if len(self._compiling) > self._loader.pending:
            raise RuntimeError(f"{len(self._compiling)} grammars are awaited, {self._loader.pending} tasks are pending")
        if lost := self._passing - (self._users.keys() & self._found.keys()):
            raise RuntimeError(f"{len(lost)} refusals that pass are kept for nobody")
        idle = sum(_num_bytes(one, found) for one, found in self._found.items() if one not in self._users)
        if idle != self._idle_bytes or idle > self._budget:
            raise RuntimeError(f"idle grammars of {idle} bytes count as {self._idle_bytes}, of {self._budget} allowed")

    def _take(self, constraint: Constraint, found: Grammar | Exception) -> None:
        self._compiling.remove(constraint)
        if isinstance(found, OSError | MemoryError):
            self._passing.add(constraint)
            found = GrammarError(f"the system does not let it be compiled ({str(found) or type(found).__name__})")
        elif isinstance(found, Exception) and not isinstance(found, GrammarError):
            logger.error("a constraint of kind %s could not be compiled", constraint.kind, exc_info=found)
            found = GrammarError("it cannot be compiled")
        elif isinstance(found, GrammarError):
            found = GrammarError(str(found))  # what was raised has a traceback, and with it the grammar: 0.8 MB
        self._found[constraint] = found
        if constraint not in self._users:
            self._rest(constraint)

    def _rest(self, constraint: Constraint) -> None:
        """Nobody uses it now."""
        if constraint in self._passing:
            self._passing.remove(constraint)
            del self._found[constraint]
            return
        self._idle_bytes += _num_bytes(constraint, self._found[constraint])
        self._forget()

    def _forget(self) -> None:
        for constraint in tuple(self._found):
            if self._idle_bytes <= self._budget:
                return
            if constraint not in self._users:
                self._idle_bytes -= _num_bytes(constraint, self._found.pop(constraint))


def _num_bytes(constraint: Constraint, found: Grammar | GrammarError) -> int:
    return found.num_bytes if isinstance(found, Grammar) else REFUSED_BYTES + len(constraint.source)
