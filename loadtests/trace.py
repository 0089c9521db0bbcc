"""A trace: what is asked when. Written as JSON Lines, so that several servers are asked exactly the same."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

FIRST_TOKEN_ID = 100
"""Smaller ids are control tokens in most vocabularies."""


class TraceError(ValueError):
    """A file is no trace; one sentence with its line."""


@dataclass(frozen=True)
class TraceRequest:
    """One completion, sent `at` seconds after the start.

    `adapter` None is the base model. The prompt is `prompt`, or `prompt_tokens` random token ids. `extra` are further
    fields of the request's body.
    """

    at: float
    output_tokens: int
    prompt_tokens: int = 0
    prompt: str | None = None
    adapter: str | None = None
    tenant: str = "default"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.at >= 0 and self.output_tokens >= 1 and (self.prompt or self.prompt_tokens >= 1)):
            raise TraceError("expected at >= 0, output_tokens >= 1 and a prompt or prompt_tokens >= 1")

    def prompt_of(self, index: int, seed: int, vocab_size: int) -> str | list[int]:
        """The text, or token ids below `vocab_size` that depend on `index` and `seed` alone: no prefix is shared."""
        if self.prompt is not None:
            return self.prompt
        rng = np.random.default_rng([seed, index])
        ids: list[int] = rng.integers(FIRST_TOKEN_ID, vocab_size, self.prompt_tokens).tolist()
        return ids


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their times. `at_once`: the most that run at a time, None for any number."""

    requests: tuple[TraceRequest, ...]
    at_once: int | None = None

    @classmethod
    def of(cls, requests: Iterable[TraceRequest], at_once: int | None = None) -> "Trace":
        return cls(tuple(sorted(requests, key=lambda request: request.at)), at_once)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that occur, sorted."""
        return tuple(sorted({request.adapter for request in self.requests if request.adapter is not None}))

    @property
    def tenants(self) -> tuple[str, ...]:
        return tuple(sorted({request.tenant for request in self.requests}))

    def write(self, path: Path) -> None:
        """One request a line; fields that have their default are left out."""
        defaults = TraceRequest(0.0, 1, 1)
        lines = []
        for request in self.requests:
            values = asdict(request)
            kept = {"at", "output_tokens"} | {name for name in values if values[name] != getattr(defaults, name)}
            lines.append(json.dumps({name: values[name] for name in values if name in kept or name == "prompt_tokens"}))
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    @classmethod
    def read(cls, path: Path, at_once: int | None = None) -> "Trace":
        """Raises TraceError for a line that is no request, and for a file without one."""
        known = {entry.name for entry in fields(TraceRequest)}
        requests = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                if not isinstance(values, dict) or values.keys() - known:
                    raise TraceError(f"expected an object with some of {', '.join(sorted(known))}")
                requests.append(TraceRequest(**values))
            except (TypeError, ValueError) as error:
                raise TraceError(f"{path}, line {number}: {error}") from error
        if not requests:
            raise TraceError(f"{path}: expected at least one request")
        return cls.of(requests, at_once)
