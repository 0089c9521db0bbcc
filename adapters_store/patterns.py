"""Regular expressions that come with an adapter, and so from strangers: compiled once, matched within a time limit."""

import re
import time
from collections.abc import Iterable

import regex  # type: ignore[import-untyped]

from adapters_store.types import AdapterError

MATCH_SECONDS = 2.0
"""CPU time that all matches of one config may take; 600 plain names against 600 modules take an eighth of it."""


class PatternBudget:
    """The time left to match the patterns of one config."""

    def __init__(self, seconds: float = MATCH_SECONDS) -> None:
        self.seconds = seconds

    def compile(self, field: str, text: str, prefix: str = "", suffix: str = "") -> "Pattern":
        """The pattern `text` of a config's `field`, between parts of ours. Raises AdapterError `adapter_bad_config`."""
        try:
            return Pattern(self, field, text, regex.compile(f"{prefix}{text}{suffix}"))
        except (regex.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                "adapter_bad_config", f"{field} holds {text[:80]!r}: expected a regular expression"
            ) from error

    def compile_end(self, field: str, text: str) -> "Pattern":
        """A pattern for the end of a path, from a border between names on: how PEFT looks up ranks and alphas."""
        pattern = self.compile(field, text, r"(.*\.)?(", ")$")
        if re.fullmatch(r"[\w.]+", text):
            pattern.tail = text.rpartition(".")[2]
        return pattern


class Pattern:
    """A compiled pattern that spends its config's budget; beyond it, matching raises AdapterError."""

    def __init__(self, budget: PatternBudget, field: str, text: str, compiled: "regex.Pattern[str]") -> None:
        self._budget = budget
        self._field = field
        self._text = text
        self._compiled = compiled
        self.tail = ""
        """What every match ends with; cheaper to look at where a config lists hundreds of plain names."""

    def fullmatch(self, text: str) -> "regex.Match[str] | None":
        if not text.endswith(self.tail):
            return None
        start = time.thread_time()
        try:
            return self._compiled.fullmatch(text, timeout=max(self._budget.seconds, 1e-3))
        except TimeoutError as error:
            raise AdapterError(
                "adapter_bad_config", f"{self._field} holds {self._text[:80]!r}: expected patterns that match quickly"
            ) from error
        finally:
            self._budget.seconds -= time.thread_time() - start


class ModuleNames:
    """PEFT's two ways to name modules: one expression for the whole path, or a list of paths or of their last parts."""

    def __init__(self, budget: PatternBudget, field: str, names: str | Iterable[str]) -> None:
        self._pattern = budget.compile(field, names) if isinstance(names, str) else None
        self.listed = frozenset() if isinstance(names, str) else frozenset(names)

    def __contains__(self, module: str) -> bool:
        if self._pattern is not None:
            return self._pattern.fullmatch(module) is not None
        parts = module.split(".")
        return any(".".join(parts[start:]) in self.listed for start in range(len(parts)))
