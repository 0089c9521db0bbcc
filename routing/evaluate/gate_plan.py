"""What an evaluation of token-level routers asks: which methods, of which tasks and composite prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from routing.evaluate.answers import MARGIN, AdapterFolders, AnswerError, answer_limits, answer_tokens, tokenise
from routing.evaluate.composites import Composite, read_composites
from routing.evaluate.gate_jobs import ITEM_TOKENS, Job, Prompt, composite_job, guided_job, loss_job, task_job
from routing.evaluate.gate_methods import (
    MERGES,
    EvaluatedRouter,
    GateMethod,
    MergeSpec,
    OwnAdapters,
    check_trained_for,
    merged,
    oracle,
    read_router,
    router_method,
    single,
)
from routing.evaluate.held_out import read_held_out, read_metrics
from routing.evaluate.prompt_methods import EvaluatedPromptRouter, check_prompt, prompt_methods, read_prompt
from routing.prompt_router import MODULES
from routing.train.data import TaskRow
from server.model.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
JOINT = "one LoRA for all tasks"


@dataclass(frozen=True)
class GateEvaluation:
    """The settings of one evaluation of routers inside the model.

    `adapters` holds a PEFT folder for each task. `routers` are folders of MeteoRA routers by label, `curve` those by
    the training rows a task that they saw, `prompt_routers` MoA's and MiLoRA's by label. The first MiLoRA over modules
    also answers with each number of `modules` of a layer in place of its own. `joint` is an adapter that was trained on
    all tasks. `swapped`: folders of other adapters by task, each put in place of the task's own under the first router,
    which was not trained for it. `new` are tasks each of which is reported apart from the others. `rows` of each task
    and `composite_rows` of each size, or of `composite_sizes` alone, are asked, None for all. Composite prompts are
    asked of `composite_routers` (labels, by default the first), top 2, at every one of `temperatures`. `perplexity`: of
    the rows' targets, too, but not where every layer decides by itself, which is no mix. `only` these methods are
    asked, by the names that the tables have for them; none for all.
    """

    model: str
    tasks: str
    adapters: str
    routers: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    curve: Mapping[int, str] = field(default_factory=dict)
    prompt_routers: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[int, ...] = ()
    joint: str | None = None
    swapped: Mapping[str, str] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    merges: tuple[str, ...] = MERGES
    rows: int | None = None
    composite_rows: int | None = None
    composite_sizes: tuple[int, ...] = ()
    composite_routers: tuple[str, ...] = ()
    perplexity: bool = False
    only: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (1.0, 5.0, 15.0, 20.0, 30.0)
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    batch: int = 64
    batch_tokens: int = 512
    load_threads: int = 4
    seed: int = 0

    def check(self) -> None:
        """Raise AnswerError for the first field that cannot be."""
        for name, least in (("rows", 0), ("composite_rows", 0), ("batch", 1), ("batch_tokens", 1), ("load_threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise AnswerError(f"{name} {value}: expected a whole number of at least {least}")
        if wrong := [t for t in self.temperatures if not 0 < t < math.inf]:
            raise AnswerError(f"temperatures {wrong[0]}: expected numbers above 0")
        if wrong := [count for count in self.modules if count < 1]:
            raise AnswerError(f"modules {wrong[0]}: expected whole numbers of at least 1")


def swapped_name(task: str) -> str:
    return f"{task} swapped"


@dataclass(frozen=True)
class GatePlan:
    """All jobs in the order in which they are asked, and what the report needs to know of them.

    `paths` are adapters' folders by digest, `curve` is (training rows a task, method), `temperatures` the temperature
    of each method of the composite jobs that has one.
    """

    jobs: tuple[Job, ...]
    paths: Mapping[str, str]
    metrics: Mapping[str, str]
    routers: tuple[EvaluatedRouter, ...]
    prompt_routers: tuple[EvaluatedPromptRouter, ...]
    curve: tuple[tuple[int, str], ...]
    temperatures: Mapping[str, tuple[str, float]]
    longest: int


def make_plan(
    asked: GateEvaluation,
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    out: Path,
) -> GatePlan:
    """Everything is read and checked, and merged adapters are written into `out`, before any question is asked.

    Raises:
        TaskDataError, AnswerError, RouterFolderError: tasks, adapters and routers do not fit together.
    """
    root = Path(asked.tasks)
    given = _read(asked, names, config, out)
    fixed, methods = _fixed(asked, given), _methods(asked, names, given)
    rows = read_held_out(root, names, asked.rows)
    metrics = read_metrics(root, names)
    limits = answer_limits(tokenizer, root, names)
    prompts = [(tokenise(tokenizer, row.example), limits[row.task]) for row in rows]
    jobs = [task_job(method, rows, prompts) for method in methods] if rows else []
    if asked.perplexity and rows:
        targets = [answer_tokens(tokenizer, row.example) for row in rows]
        jobs += [loss_job(method, rows, prompts, targets) for method in methods if not method.layered]
    heated = _Heated({})
    for size, composites in read_composites(root, names, asked.composite_rows).items():
        if asked.composite_sizes and size not in asked.composite_sizes:
            continue
        together = [*fixed, *heated.methods(asked, given.routers, given.folders, composites)]
        jobs += _composite_jobs(together, composites, tokenizer, limits, metrics)
    if not jobs:
        raise AnswerError("rows 0: there are no composite prompts of these tasks either, expected something to ask")
    _check_names(jobs)
    if asked.only:
        jobs = _narrowed(jobs, asked.only)
    jobs.sort(key=lambda job: job.questions[0].gates is not None)  # captured steps serve rows without gates alone
    return GatePlan(
        jobs=tuple(jobs),
        paths=given.folders.paths,
        metrics=metrics,
        routers=(*given.routers, *given.curve.values()),
        prompt_routers=given.deciders,
        curve=tuple((count, curve_name(router)) for count, router in given.curve.items()),
        temperatures={name: at for name, at in heated.temperatures.items() if name in {job.method for job in jobs}},
        longest=max(job.longest for job in jobs),
    )


@dataclass(frozen=True)
class _Given:
    """The routers that are evaluated, `curve` by training rows a task, and the folders of all adapters by name."""

    routers: tuple[EvaluatedRouter, ...]
    curve: Mapping[int, EvaluatedRouter]
    deciders: tuple[EvaluatedPromptRouter, ...]
    folders: AdapterFolders


def _read(asked: GateEvaluation, names: Sequence[str], config: ModelConfig, out: Path) -> _Given:
    """Reads the routers, and checks that their adapters are those that they were trained for."""
    shape, fingerprint = config.linear_shape, config.fingerprint()
    routers = tuple(read_router(label, Path(path), shape, fingerprint) for label, path in asked.routers.items())
    curve = {
        rows: read_router(f"{rows} rows a task", Path(path), shape, fingerprint)
        for rows, path in sorted(asked.curve.items())
    }
    deciders = tuple(read_prompt(label, Path(path), shape, fingerprint) for label, path in asked.prompt_routers.items())
    trained = [router.own for router in (*routers, *curve.values())] + [router.own for router in deciders]
    folders = _adapters(asked, names, trained, config, out)
    for router in (*routers, *curve.values()):
        check_trained_for(router, folders, shape)
    for decider in deciders:
        check_prompt(decider, folders, shape)
    return _Given(routers, curve, deciders, folders)


def _fixed(asked: GateEvaluation, given: _Given) -> list[GateMethod]:
    """What is the same for all tasks and prompts."""
    named = [JOINT] * (asked.joint is not None) + [MergeSpec.parse(text).name for text in asked.merges]
    return [GateMethod("base"), *(GateMethod(name, single(given.folders.digests[name])) for name in named)]


def _methods(asked: GateEvaluation, names: Sequence[str], given: _Given) -> list[GateMethod]:
    """All that answer the rows of tasks."""
    digests = given.folders.digests
    of_curve = [router_method(curve_name(router), router, digests, 2) for router in given.curve.values()]
    over_modules = [router for router in given.deciders if router.card.form.experts == MODULES]
    by_prompt = [
        method
        for router in given.deciders
        for method in prompt_methods(router, digests, asked.modules if router in over_modules[:1] else ())
    ]
    gated = _gated(asked, names, given.routers, given.folders)
    return [oracle(names, digests), *_fixed(asked, given), *gated, *of_curve, *by_prompt]


def curve_name(router: EvaluatedRouter) -> str:
    return f"{router.label}, top 2"


def named(label: str) -> str:
    """The method that names the adapters which were trained with this router."""
    return f"oracle, adapters of {label}"


def _check_names(jobs: Sequence[Job]) -> None:
    counts = Counter((job.part, job.method) for job in jobs)
    if twice := [method for (_, method), count in counts.items() if count > 1]:
        raise AnswerError(f"{twice[0]}: two methods have this name, expected another label")


def _narrowed(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    names = dict.fromkeys(job.method for job in jobs)
    if strangers := [name for name in only if name not in names]:
        raise AnswerError(f"only {strangers[0]}: expected one of the methods: {'; '.join(names)}")
    return [job for job in jobs if job.method in only]


def _composite_jobs(
    methods: Sequence[GateMethod],
    composites: Sequence[Composite],
    tokenizer: PreTrainedTokenizerBase,
    limits: Mapping[str, int],
    metrics: Mapping[str, str],
) -> list[Job]:
    """All methods answer all prompts, first freely and then item by item."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    stops = line_ends(tokenizer)
    prompts = [_composite_prompt(tokenizer, composite, limits) for composite in composites]
    free = [composite_job(method, composites, prompts, metrics) for method in methods]
    return [*free, *(guided_job(method, composites, prompts, metrics, limits, encode, stops) for method in methods)]


def _adapters(
    asked: GateEvaluation, names: Sequence[str], trained: Sequence[OwnAdapters], config: ModelConfig, out: Path
) -> AdapterFolders:
    """All folders by the names that methods have for them; merges are made."""
    if strangers := [name for name in (*asked.swapped, *asked.new) if name not in names]:
        raise AnswerError(f"{strangers[0]}: expected one of the evaluated tasks, {', '.join(names)}")
    if asked.swapped and not asked.routers:
        raise AnswerError("swapped: expected a router whose adapter is swapped")
    specs = [MergeSpec.parse(text) for text in asked.merges]
    given = {name: Path(asked.adapters) / name for name in names}
    given |= {swapped_name(name): Path(path) for name, path in asked.swapped.items()}
    given |= {} if asked.joint is None else {JOINT: Path(asked.joint)}
    for own in trained:
        given |= own.beside()
    folders = AdapterFolders.of(given)
    made = {spec.name: merged(spec, names, folders, config.linear_shape, out) for spec in specs}
    return AdapterFolders.of(given | made)


def _gated(
    asked: GateEvaluation, names: Sequence[str], routers: Sequence[EvaluatedRouter], folders: AdapterFolders
) -> list[GateMethod]:
    """Every router with its two best rows, and with as many as it was trained with where they are more; the first one
    also with the best alone, and with each adapter swapped. Adapters that were trained with a router are named, too."""
    found = [
        router_method(f"{router.label}, top {top_k}", router, folders.digests, top_k)
        for router in routers
        for top_k in sorted({2, max(2, router.card.top_k)} | ({1} if router is routers[0] else set()))
    ]
    for task in asked.swapped:
        other = folders.digests[swapped_name(task)]
        name = f"{routers[0].label}, top 2, {swapped_name(task)}"
        found.append(router_method(name, routers[0], {**folders.digests, task: other}, 2))
        found.append(oracle(names, {**folders.digests, task: other}, f"oracle, {swapped_name(task)}"))
    for router in routers:
        if router.own.beside():
            trained = {task: folders.digests[router.own.name(task)] for task in names}
            found.append(oracle(names, trained, named(router.label)))
    return found


@dataclass(frozen=True)
class _Heated:
    """Routers at the temperatures of composite prompts; `temperatures` is filled with (router, temperature) by name."""

    temperatures: dict[str, tuple[str, float]]

    def methods(
        self,
        asked: GateEvaluation,
        routers: Sequence[EvaluatedRouter],
        folders: AdapterFolders,
        composites: Sequence[Composite],
    ) -> list[GateMethod]:
        """Those that have all adapters which the prompts need. Raises AnswerError for a label that is not there."""
        labels = asked.composite_routers or tuple(router.label for router in routers[:1])
        if strangers := sorted(set(labels) - {router.label for router in routers}):
            raise AnswerError(f"composite routers: {strangers[0]}: there is no router of this label")
        found = []
        for router in (router for router in routers if router.label in labels):
            if set(composites[0].tasks) <= {adapter.name for adapter in router.card.adapters}:
                for temperature in asked.temperatures:
                    name = f"{router.label}, top 2, T {temperature:g}"
                    self.temperatures[name] = (router.label, temperature)
                    found.append(router_method(name, router, folders.digests, 2, temperature))
        return found


def line_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens with a line end."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return frozenset(token for token, text in enumerate(texts) if "\n" in text)


def _composite_prompt(tokenizer: PreTrainedTokenizerBase, composite: Composite, limits: Mapping[str, int]) -> Prompt:
    """As one user message, with room for an answer of the longest to every sub-question."""
    row = TaskRow("composite", "composite", composite.prompt, "", "-", 0)
    return tokenise(tokenizer, row), sum(limits[task] - MARGIN + ITEM_TOKENS for task in composite.tasks)
