"""What a study of all routers inside the model trains and asks, as commands that need each other's results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from routing.evaluate.gate_plan import named
from routing.evaluate.study_scale import MEDIUM, SMALL, Loop, Scale, Variant
from routing.evaluate.study_steps import Step, needed
from routing.train.many import task_names
from routing.train.moelora import MoeLoraRecipe


@dataclass(frozen=True)
class Places:
    """Folders: of the base model, of the tasks, of adapters by task (None: they are trained), and of the results."""

    model: Path
    tasks: Path
    out: Path
    given: Path | None = None

    @property
    def adapters(self) -> Path:
        return self.given or self.out / "adapters"


def plan(places: Places, scale: Scale) -> tuple[Step, ...]:
    """All steps, each behind those whose results it needs. Side by side, the first ones matter most."""
    maker = _Maker(places, scale)
    steps = [*maker.adapters(), *maker.gates(), *maker.joining(), *maker.tasks(), maker.composites(), maker.moa()]
    steps += [*maker.decisions(), maker.asked_moa(), *maker.milora(), *maker.asked_milora()]
    steps += [*maker.variants(), *maker.asked_variants()]
    return tuple(replace(step, needs=needed(step, steps[:number])) for number, step in enumerate(steps))


@dataclass(frozen=True)
class _Maker:
    places: Places
    scale: Scale

    def adapters(self) -> Iterable[Step]:
        """One for each small task unless they are given; with `whole` those of the other medium tasks, beside links to
        the small ones, the rows of one LoRA for all tasks, and another adapter of `spell`."""
        if self.places.given is None:
            yield self._many("adapters", self.places.tasks, self.places.adapters, "--group", SMALL)
        if not self.scale.whole:
            return
        if self._medium_adapters != self.places.adapters:
            links = {self._medium_adapters / name: self.places.adapters / name for name in self._small}
            only = ("--only", ",".join(self._only_medium))
            yield replace(self._many("adapters-medium", self.places.tasks, self._medium_adapters, *only), links=links)
        for group in (SMALL, MEDIUM):
            rows = self.places.out / "joint-tasks" / group
            yield Step(f"rows-{group}", "routing.train.joint", _options(tasks=self.places.tasks, group=group, out=rows))
        yield self._many("swapped", self.places.tasks, self._out("swapped"), "--only", "spell", "--seed", "1")

    def gates(self) -> Iterable[Step]:
        yield self._router("small", SMALL)
        if self.scale.whole:
            yield self._router("medium", MEDIUM)
            yield self._router("packed", SMALL, "--packed", "0.5")
            yield self._router("seed-1", SMALL, "--seed", "1")
            for group in (SMALL, MEDIUM):
                joint = _options(rank=32, alpha=64, learning_rate=1e-3, steps=1600, epochs=1000)
                rows = self.places.out / "joint-tasks" / group
                yield self._many(f"joint-{group}", rows, self._out(f"joint-{group}"), "--only", "joint", *joint)
        for count in self.scale.curve:
            yield self._router(f"rows-{count}", SMALL, "--samples", str(count))
        for task in self.scale.new:
            yield self._router(f"without-{task}", f"rest={SMALL},-{task}")

    def joining(self) -> Iterable[Step]:
        """Rows for adapters that their router was not trained with."""
        for task in self.scale.new:
            yield self._extend(f"row-{task}", f"without-{task}", task, self.places.adapters)
        if self.scale.whole:
            row = self._extend("row-swapped", "small", "spell", self._mixed)
            yield replace(row, links=self._swapped_links())

    def tasks(self) -> Iterable[Step]:
        """MeteoRA on single tasks."""
        more = [f"--router=row for {task}={self._trained(f'row-{task}')}" for task in self.scale.new]
        more += [f"--curve={rows}={self._trained(f'rows-{rows}')}" for rows in self.scale.curve]
        if self.scale.new:
            more += ["--new", ",".join(self.scale.new)]
        if self.scale.whole:
            more += [f"--router=packed={self._trained('packed')}", f"--router=seed 1={self._trained('seed-1')}"]
            more += ["--joint", str(self._out("joint-small") / "joint")]
            more += [f"--swapped=spell={self._out('swapped') / 'spell'}"]
        router = f"--router=MeteoRA={self._trained('small')}"
        asked = ("--merges", self.scale.merges, "--perplexity", "--composite-rows", "0")
        yield self._ask("tasks", SMALL, *_rows(self.scale.rows), router, *more, *asked)
        if self.scale.whole:
            joint = ("--joint", str(self._out("joint-medium") / "joint"), "--merges", self.scale.merges)
            router = f"--router=MeteoRA={self._trained('medium')}"
            yield self._ask("medium", MEDIUM, router, *joint, "--composite-rows=0")
            swapped = f"--router=row for the swapped={self._trained('row-swapped')}"
            own = ("--merges", "", "--composite-rows", "0", "--new", "spell")
            yield self._ask("swapped", SMALL, swapped, *own, adapters=self._mixed)

    def moa(self) -> Step:
        return self._train("moa", "moa", SMALL, self.scale.moa, "--adapters", str(self.places.adapters))

    def decisions(self) -> Iterable[Step]:
        """The same router, not by vote."""
        for decision in ("last", "layer"):
            where = _options(router=self._trained("moa"), out=self._trained(f"moa-{decision}"))
            yield Step(f"moa-{decision}", "routing.train.decide", (*where, "--decision", decision))

    def milora(self) -> Iterable[Step]:
        """MiLoRA over modules; with all seven chosen it is plain LoRA."""
        every = ("--coefficients-every", str(self.scale.coefficients_every))
        for name, (_, *options) in self._miloras().items():
            yield self._train("milora", name, SMALL, self.scale.milora, *every, *options)
        if self.scale.whole:
            yield self._train("moelora", "moelora", SMALL, self.scale.milora)

    def asked_moa(self) -> Step:
        """MoA on single tasks; prompts whose layers decide one by one are slow on a CPU."""
        moa = {"vote": "moa", "last": "moa-last"} | ({"layer": "moa-layer"} if self.scale.whole else {})
        routers = [f"--prompt-router=MoA, {label}={self._trained(name)}" for label, name in moa.items()]
        merges = ("--merges", self.scale.moa_merges, "--perplexity")
        return self._ask("moa", SMALL, *_rows(self.scale.moa_rows), *routers, *merges, "--composite-rows", "0")

    def asked_milora(self) -> Iterable[Step]:
        """MiLoRA on single tasks, beside plain LoRA that was trained on the same rows.

        A step asks one router, or one number of linears: prompts whose layers decide one by one are taken through
        the model one by one.
        """
        rows = _rows(self.scale.milora_rows)
        parts = [self._part("milora-beside", SMALL, ("oracle", "base"), *rows)]
        for name, (label, *_) in self._miloras().items():
            router = f"--prompt-router={label}={self._trained(name)}"
            parts.append(self._part(name, SMALL, (label,), *rows, router))
            for count in self.scale.modules if name == "milora" else ():
                own = (*rows, router, "--modules", str(count))
                parts.append(self._part(f"milora-k-{count}", SMALL, (f"{label}, k = {count}",), *own))
        if self.scale.whole:
            method = f"MoE-LoRA, top {MoeLoraRecipe().top_k}"
            router = f"--router=MoE-LoRA={self._trained('moelora')}"
            parts.append(self._part("moelora", SMALL, (method,), *rows, router))
        return (*parts, self._joined("milora", parts, "plain LoRA"))

    def variants(self) -> Iterable[Step]:
        """Gates that are trained otherwise than the main ones."""
        for each in self.scale.variants:
            loop = each.loop or self.scale.gates
            yield self._router(each.name, each.group, *each.options, loop=loop)

    def asked_variants(self) -> Iterable[Step]:
        """Each of them on single tasks, beside the main ones of its group; a step asks one router."""
        for group, main in ((SMALL, "small"), (MEDIUM, "medium")):
            variants = [each for each in self.scale.variants if each.group == group]
            if not variants:
                continue
            rows = _rows(self.scale.rows)
            parts = [self._part(f"{group}-beside", group, ("oracle", "base"), *rows, "--perplexity")]
            for each in (Variant(main, "MeteoRA", group=group), *variants):
                methods = (*tops(each.label), *((named(each.label),) if each.joint else ()))
                router = f"--router={each.label}={self._trained(each.name)}"
                parts.append(self._part(each.name, group, methods, *rows, router, "--perplexity"))
            yield from (*parts, self._joined(f"{group}-variants", parts, tops("MeteoRA")[1]))

    def composites(self) -> Step:
        routers = [f"--router=MeteoRA={self._trained('small')}"]
        if self.scale.whole:
            routers += [f"--router=packed={self._trained('packed')}", "--composite-routers", "MeteoRA,packed"]
            routers += ["--joint", str(self._out("joint-small") / "joint")]
        count = str(self.scale.composite_rows)
        options = ("--temperatures", self.scale.temperatures, "--composite-sizes", self.scale.composite_sizes)
        merges = ("--merges", self.scale.few_merges)
        return self._ask("composites", SMALL, "--rows", "0", *routers, *merges, "--composite-rows", count, *options)

    def _miloras(self) -> dict[str, tuple[str, ...]]:
        """Label and options by name."""
        found: dict[str, tuple[str, ...]] = {"milora": ("MiLoRA",), "plain": ("plain LoRA", "--top-k", "7")}
        if self.scale.whole:
            for pooling in ("mean", "last", "max"):
                found[f"milora-{pooling}"] = (f"MiLoRA, {pooling} pooling", "--pooling", pooling)
            found["milora-gelu"] = ("MiLoRA, GeLU", "--coefficients", "fixed")
            found["milora-none"] = ("MiLoRA, no activation", "--activation", "none")
        return found

    def _out(self, name: str) -> Path:
        return self.places.out / name

    def _trained(self, name: str) -> Path:
        return self.places.out / "routers" / name

    @property
    def _medium_adapters(self) -> Path:
        """Those of all medium tasks."""
        return self._out("adapters-medium") if self._only_medium and not self.places.given else self.places.adapters

    @property
    def _only_medium(self) -> list[str]:
        small = self._small
        return [name for name in task_names(self.places.tasks, MEDIUM) if name not in small]

    @property
    def _mixed(self) -> Path:
        """The adapters with the swapped one among them."""
        return self._out("with-swapped")

    def _swapped_links(self) -> dict[Path, Path]:
        own = {name: self.places.adapters / name for name in self._small}
        return {self._mixed / name: path for name, path in own.items()} | {
            self._mixed / "spell": self._out("swapped") / "spell"
        }

    @property
    def _small(self) -> Sequence[str]:
        return task_names(self.places.tasks, SMALL)

    @property
    def _common(self) -> tuple[str, ...]:
        return _options(model=self.places.model, tasks=self.places.tasks)

    def _many(self, name: str, tasks: Path, out: Path, *more: str) -> Step:
        options = _options(model=self.places.model, tasks=tasks, out=out, device=self.scale.device, evaluation_rows=20)
        return Step(name, "routing.train.many", (*options, *more))

    def _train(self, kind: str, name: str, group: str, loop: Loop, *more: str) -> Step:
        where = _options(group=group, out=self._trained(name), device=self.scale.device, precision=self.scale.precision)
        judged = ("--evaluation-rows", str(self.scale.judged), "--plain")
        return Step(name, f"routing.train.{kind}", (*self._common, *where, *judged, *loop.options, *more))

    def _router(self, name: str, group: str, *more: str, loop: Loop | None = None) -> Step:
        adapters = ("--adapters", str(self._adapters(group)))
        return self._train("meteora", name, group, loop or self.scale.gates, *adapters, *more)

    def _adapters(self, group: str) -> Path:
        return self._medium_adapters if group == MEDIUM else self.places.adapters

    def _extend(self, name: str, router: str, task: str, adapters: Path) -> Step:
        where = _options(router=self._trained(router), adapters=adapters, out=self._trained(name))
        options = (*self._common, *where, "--add", task, "--device", self.scale.device)
        return Step(name, "routing.train.extend", options)

    def _ask(self, name: str, group: str, *more: str, adapters: Path | None = None, out: Path | None = None) -> Step:
        scale = self.scale
        where = _options(adapters=adapters or self._adapters(group), group=group, out=out or self._out(f"eval-{name}"))
        how = _options(device=scale.device, dtype="bfloat16", batch=scale.batch, batch_tokens=scale.batch_tokens)
        return Step(f"eval-{name}", "routing.evaluate.gates", (*self._common, *where, *how, *more))

    def _part(self, name: str, group: str, methods: Sequence[str], *more: str) -> Step:
        """A step that asks some methods; its tables stand in the log, those of all in the report."""
        only = [f"--only={method}" for method in methods]
        step = self._ask(name, group, "--merges=", "--composite-rows=0", *only, *more, out=self._out(f"parts/{name}"))
        return replace(step, name=f"ask-{name}")

    def _joined(self, name: str, parts: Iterable[Step], beside: str) -> Step:
        folders = [str(self._out(f"parts/{step.name.removeprefix('ask-')}")) for step in parts]
        out = str(self._out(f"eval-{name}"))
        return Step(f"eval-{name}", "routing.evaluate.joined", ("--out", out, "--beside", beside, *folders))


def _options(**values: object) -> tuple[str, ...]:
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in values.items())
    return tuple(text for pair in pairs for text in pair)


def tops(label: str) -> tuple[str, ...]:
    """The methods of the first gates that an evaluation asks."""
    return f"{label}, top 1", f"{label}, top 2"


def _rows(count: int | None) -> tuple[str, ...]:
    return () if count is None else ("--rows", str(count))
