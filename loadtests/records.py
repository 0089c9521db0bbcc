"""What became of each request of a trace."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

OK = "ok"


@dataclass(frozen=True)
class Record:
    """One request. Times in seconds: `at` and `sent` from the start of the run, the others from when it was sent.

    `times`: when each piece of the answer came; a piece is usually a token. `status` is `ok`, `http 429` and the like,
    or what went wrong. `cold`: it was the first of its run that used its adapter.
    """

    index: int
    tenant: str
    adapter: str | None
    at: float
    sent: float
    times: tuple[float, ...]
    end: float
    prompt_tokens: int
    output_tokens: int
    asked_tokens: int
    status: str = OK
    cold: bool = False

    @property
    def first(self) -> float | None:
        """Seconds to the first token."""
        return self.times[0] if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def write_records(path: Path, records: Iterable[Record]) -> None:
    """One record a line."""
    path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """What `write_records` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Record(**{**(entry := json.loads(line)), "times": tuple(entry["times"])}) for line in lines]


def by(records: Sequence[Record], name: str) -> dict[str, list[Record]]:
    """Records by the value of a field, sorted by it; None is the base model."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: str(getattr(record, name))):
        value = getattr(record, name)
        found.setdefault("(base model)" if value is None else str(value), []).append(record)
    return found
