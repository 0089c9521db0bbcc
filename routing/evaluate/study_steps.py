"""The steps of a study: commands that need each other's results, and the choice of some of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


class StudyError(Exception):
    """The study that is asked for cannot be; the message says why."""


@dataclass(frozen=True)
class Step:
    """`python -m module arguments`, once the steps in `needs` are done; `links` (link to target) are made before."""

    name: str
    module: str
    arguments: tuple[str, ...]
    links: Mapping[Path, Path] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()

    @property
    def made(self) -> frozenset[Path]:
        """Folders that are there once it is done."""
        out = Path(self.arguments[self.arguments.index("--out") + 1])
        return frozenset({out, *(link.parent for link in self.links)})

    def reads(self, folder: Path) -> bool:
        """Whether one of its arguments, or what it links to, lies in `folder`."""
        named = {Path(text.rpartition("=")[2]) for text in self.arguments}
        return any(path.is_relative_to(folder) for path in named | set(self.links.values()))


def chosen(steps: Sequence[Step], names: Sequence[str]) -> tuple[Step, ...]:
    """The steps of these names in this order, each behind whatever it needs; all without names.

    Raises StudyError for a name that no step has.
    """
    by_name = {step.name: step for step in steps}
    if strangers := [name for name in names if name not in by_name]:
        raise StudyError(f"there is no step {strangers[0]}, expected some of {', '.join(by_name)}")
    found: dict[str, Step] = {}

    def add(step: Step) -> None:
        for other in steps:
            if other.name in step.needs and other.name not in found:
                add(other)
        found[step.name] = step

    for name in names or by_name:
        add(by_name[name])
    return tuple(found.values())


def needed(step: Step, before: Iterable[Step]) -> frozenset[str]:
    """The names of those that make what it reads."""
    return frozenset(other.name for other in before if any(step.reads(folder) for folder in other.made))
