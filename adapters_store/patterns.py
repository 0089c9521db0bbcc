"""Regular expressions that come with an adapter, and so from strangers: compiled once, matched within a time limit."""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import regex  # type: ignore[import-untyped]

from adapters_store.types import AdapterError

PATTERN_SECONDS = 2.0
"""CPU time that compiling and matching the expressions of one config may take."""

MAX_EXPRESSIONS = 256
"""Most regular expressions of one config."""

MAX_NAMES = 4096
"""Most plain names in the patterns of one config: a rank and an alpha for each linear of 126 layers are 1,764."""

Value = TypeVar("Value", int, float)

_PLAIN = re.compile(r"[\w.]+", re.ASCII)
_LINEAR = re.compile(
    r"(((((model\.)?layers\.)?(0|[1-9]\d*)\.)?self_attn\.)?[qkvo]_proj)|"
    r"(((((model\.)?layers\.)?(0|[1-9]\d*)\.)?mlp\.)?(gate|up|down)_proj)",
    re.ASCII,
)
"""The end of a linear's path, whole names."""


class PatternBudget:
    """What the patterns of one config may still cost."""

    def __init__(self, seconds: float = PATTERN_SECONDS) -> None:
        self.seconds = seconds
        self._expressions = MAX_EXPRESSIONS
        self._names = MAX_NAMES

    def compile(self, field: str, text: str, prefix: str = "", suffix: str = "") -> "Expression":
        """The pattern `text` of a config's `field`, between parts of ours. Raises AdapterError `adapter_bad_config`."""
        self._expressions -= 1
        if self._expressions < 0:
            raise _bad(field, text, f"at most {MAX_EXPRESSIONS} regular expressions in a config")
        with self.spending(field, text):
            try:
                return Expression(self, field, text, regex.compile(f"{prefix}{text}{suffix}"))
            except (regex.error, RecursionError, OverflowError) as error:
                raise _bad(field, text, "a regular expression") from error

    def compile_end(self, field: str, text: str) -> "Expression | PlainName":
        """A pattern for the end of a path, from a border between names on: how PEFT looks up ranks and alphas."""
        if not _PLAIN.fullmatch(text):
            return self.compile(field, text, r"(.*\.)?(", ")$")
        self._names -= 1
        if self._names < 0:
            raise _bad(field, text, f"at most {MAX_NAMES} names in a config's patterns")
        return PlainName(text)

    @contextmanager
    def spending(self, field: str, text: str) -> Iterator[None]:
        """Charge the block's CPU time. Raises AdapterError if nothing is left before it."""
        if self.seconds <= 0:
            raise _bad(field, text, "patterns that match quickly")
        start = time.thread_time()
        try:
            yield
        finally:
            self.seconds -= time.thread_time() - start


class Expression:
    """A compiled pattern that spends its config's budget; beyond it, matching raises AdapterError."""

    def __init__(self, budget: PatternBudget, field: str, text: str, compiled: "regex.Pattern[str]") -> None:
        self._budget = budget
        self._field = field
        self._text = text
        self._compiled = compiled

    def fullmatch(self, text: str) -> "regex.Match[str] | None":
        with self._budget.spending(self._field, self._text):
            try:
                return self._compiled.fullmatch(text, timeout=self._budget.seconds)
            except TimeoutError as error:
                raise _bad(self._field, self._text, "patterns that match quickly") from error


class PlainName:
    """A pattern of letters and dots, which needs no engine; a dot stands for any character, as in an expression."""

    def __init__(self, text: str) -> None:
        self._text = text

    def fullmatch(self, path: str) -> bool:
        start = len(path) - len(self._text)
        if start < 0 or (start > 0 and path[start - 1] != "."):
            return False
        return all(own in (".", other) for own, other in zip(self._text, path[start:], strict=True))


class PatternTable(Generic[Value]):
    """Values by patterns for the end of a linear's path; the first that matches decides, as for PEFT's ranks.

    The linears' own names, of which configs list hundreds, are looked up: 882 of them for as many linears take 5 ms.
    """

    def __init__(self, budget: PatternBudget, field: str, items: Iterable[tuple[str, Value]]) -> None:
        self._values: list[Value] = []
        self._numbers: dict[str, int] = {}
        self._patterns: list[tuple[int, Expression | PlainName]] = []
        for number, (text, value) in enumerate(items):
            self._values.append(value)
            pattern = budget.compile_end(field, text)
            if _LINEAR.fullmatch(text):  # its dots match dots only: no other linear has these letters beside them
                self._numbers[text] = number
            else:
                self._patterns.append((number, pattern))

    def get(self, path: str, default: Value) -> Value:
        """Raises AdapterError `adapter_bad_config` when expressions take too long."""
        if not self._values:
            return default
        parts = path.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        first = min((self._numbers[end] for end in ends if end in self._numbers), default=len(self._values))
        for number, pattern in self._patterns:
            if number > first:
                break
            if pattern.fullmatch(path):
                return self._values[number]
        return self._values[first] if first < len(self._values) else default


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


def _bad(field: str, text: str, expected: str) -> AdapterError:
    return AdapterError("adapter_bad_config", f"{field} holds {text[:80]!r}: expected {expected}")
