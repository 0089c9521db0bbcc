"""The ways of answering that an evaluation of token-level routers compares: a mix of adapters, and maybe gates."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapters_store.merging import MergeRecipe, merge
from adapters_store.peft_format import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from adapters_store.peft_write import write_peft
from adapters_store.types import BASE, AdapterError, LinearShape, Mix
from routing.evaluate.answers import AdapterFolders, AnswerError
from routing.gate_folder import GateCard, read_gates
from routing.train.trained_adapters import ADAPTERS_FOLDER
from server.engine.gates import GateUse
from server.engine.prompt_routers import PromptUse


@dataclass(frozen=True)
class GateMethod:
    """What answers a question: `mix`, or what `own` has for its task; with `gates` weighed anew for every token, with a
    `prompt_router` chosen from once.

    `rows`: the row of the gates, or the router's expert, that stands for the adapter of a task, where there is one.
    """

    name: str
    mix: Mix = BASE
    gates: GateUse | None = None
    own: Mapping[str, Mix] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    prompt_router: PromptUse | None = None

    @property
    def layered(self) -> bool:
        """Whether every layer decides by itself."""
        return self.prompt_router is not None and self.prompt_router.layered

    def mix_for(self, task: str) -> Mix:
        return self.own.get(task, self.mix)


@dataclass(frozen=True)
class OwnAdapters:
    """What a router's adapters are called among all that are evaluated: some may have been trained with it."""

    label: str
    folder: Path
    names: tuple[str, ...]

    def name(self, name: str) -> str:
        """Of the adapter that the router's card calls so."""
        return f"{name} of {self.label}" if (self.folder / ADAPTERS_FOLDER / name / CONFIG_NAME).is_file() else name

    def beside(self) -> dict[str, Path]:
        """The folders of those that were trained with it."""
        return {self.name(name): self.folder / ADAPTERS_FOLDER / name for name in self.names if self.name(name) != name}


@dataclass(frozen=True)
class EvaluatedRouter:
    """A router under the label that the tables have for it."""

    label: str
    folder: Path
    card: GateCard

    @property
    def own(self) -> OwnAdapters:
        return OwnAdapters(self.label, self.folder, tuple(adapter.name for adapter in self.card.adapters))


@dataclass(frozen=True)
class MergeSpec:
    """A merge of all adapters with one weight for each: 1/n where `even`, else 1. `density` as `merge` takes it."""

    method: str
    even: bool = True
    density: float | None = None

    @classmethod
    def parse(cls, text: str) -> MergeSpec:
        """`cat`, `ties:0.5` (a density), `linear:sum` (weight 1), `dare_ties:sum:0.5`. Raises AnswerError."""
        method, *rest = text.split(":")
        even, density = "sum" not in rest, None
        try:
            for part in rest:
                density = density if part == "sum" else float(part)
            MergeRecipe.of([("any", 1.0)], method, density=density)
        except (AdapterError, ValueError) as error:
            raise AnswerError(f"merge {text!r}: {error}") from error
        return cls(method, even, density)

    @property
    def name(self) -> str:
        parts = [self.method, f"density {self.density:g}" if self.density is not None else ""]
        return " ".join(["merge", *filter(None, parts), "of 1/n each" if self.even else "of 1 each"])


MERGES = ("cat", "linear", "linear:sum", "svd", "ties:0.5", "ties:sum:0.5", "dare_ties:0.5", "dare_ties:sum:0.5")
"""`cat` of 1/n each is the even mixture of all adapters; the others are the merges of MeteoRA's tables."""


def read_router(label: str, folder: Path, shape: LinearShape, fingerprint: str) -> EvaluatedRouter:
    """Raises RouterFolderError for a router of another model."""
    return EvaluatedRouter(label, folder, read_gates(folder, shape, fingerprint))


def check_trained_for(router: EvaluatedRouter, folders: AdapterFolders, shape: LinearShape) -> None:
    """Raises AnswerError where an adapter is missing, or is not the one that the gates were trained for."""
    digests = {router.own.name(adapter.name): adapter.digest for adapter in router.card.adapters}
    check_adapters(router.label, digests, folders, shape)


def check_adapters(label: str, digests: Mapping[str, str], folders: AdapterFolders, shape: LinearShape) -> None:
    """Raises AnswerError where one of these adapters is missing, or its weights do not have the digest."""
    for name, expected in digests.items():
        if name not in folders.digests:
            raise AnswerError(f"router {label}: adapter {name} is not among the evaluated ones")
        path = Path(folders.paths[folders.digests[name]])
        try:
            digest = read_adapter(path, shape).digest
        except AdapterError as error:
            raise AnswerError(f"{path}: {error.message}") from error
        if digest != expected:
            raise AnswerError(
                f"router {label}: {path} has other weights ({digest[:16]}) than those that it was trained for "
                f"({expected[:16]})"
            )


def oracle(tasks: Sequence[str], digests: Mapping[str, str], name: str = "oracle") -> GateMethod:
    """Every task with its own adapter."""
    return GateMethod(name, own={task: single(digests[task]) for task in tasks})


def single(digest: str) -> Mix:
    return Mix(((digest, 1.0),))


def router_method(
    name: str,
    router: EvaluatedRouter,
    digests: Mapping[str, str],
    top_k: int,
    temperature: float | None = None,
) -> GateMethod:
    """A router over the adapters that `digests` has for its names. Of its rows at most all are chosen."""
    rows = tuple(digests[router.own.name(adapter.name)] for adapter in router.card.adapters)
    use = GateUse(
        router.card.sha256,
        str(router.folder),
        rows,
        min(top_k, router.card.rows),
        router.card.temperature if temperature is None else temperature,
        router.card.has_null,
    )
    places = {adapter.name: place for place, adapter in enumerate(router.card.adapters)}
    return GateMethod(name, Mix(tuple((digest, 1.0) for digest in sorted(rows))), use, rows=places)


def merged(spec: MergeSpec, tasks: Sequence[str], folders: AdapterFolders, shape: LinearShape, out: Path) -> Path:
    """The folder of the merge of the tasks' adapters, made unless it is there. Raises AnswerError."""
    key = hashlib.sha256(repr([spec, [folders.digests[task] for task in tasks]]).encode()).hexdigest()[:16]
    folder = out / f"{spec.method}-{key}"
    if (folder / WEIGHTS_NAME).is_file():
        return folder
    weight = 1 / len(tasks) if spec.even else 1.0
    try:
        read = [read_adapter(Path(folders.paths[folders.digests[task]]), shape).weights for task in tasks]
        found = merge([(weights, weight) for weights in read], spec.method, density=spec.density)
    except AdapterError as error:
        raise AnswerError(f"{spec.name}: {error.message}") from error
    write_peft(folder, found)
    return folder
