"""Trains and evaluates all routers inside the model; the same command goes on where one was stopped:

python -m routing.evaluate.study --model DIR --tasks ROOT --out DIR --scale cuda
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch

from routing.evaluate.study_plan import Places, plan
from routing.evaluate.study_scale import SCALES
from routing.evaluate.study_steps import Step, StudyError, chosen
from routing.train.adapter import TrainError, check_out
from routing.train.data import TaskDataError
from routing.train.progress import say

Json = dict[str, Any]
Say = Callable[[str], None]

POLL = 0.2
"""Seconds between two looks at what runs."""

DONE, FAILED, WRONG, MORE = 0, 1, 2, 3
"""Exit codes: all done, a step failed, the arguments are wrong, the time was up: call again."""


@dataclass(frozen=True)
class Study:
    """`jobs` steps run at once; after `seconds` they are stopped, and a later call goes on from their checkpoints.

    Only the steps `names` run, the first of them first, and what they need; none for all.
    """

    places: Places
    scale: str
    jobs: int
    seconds: float | None = None
    names: tuple[str, ...] = ()

    def record(self, step: Step) -> Path:
        return self.places.out / "steps" / f"{step.name}.json"

    def log(self, step: Step) -> Path:
        return self.places.out / "logs" / f"{step.name}.log"


def carry_out(study: Study, say: Say) -> int:
    """Runs what is missing, and writes study.json and study.md into `out` after every step; the exit code.

    A step begins once what it needs is done. One that fails stops what needs it, and nothing else.

    Raises:
        StudyError: a step is asked for that there is not.
        TaskDataError: a group of tasks is missing.
    """
    deadline = None if study.seconds is None else time.monotonic() + study.seconds
    every = plan(study.places, SCALES[study.scale])
    steps = chosen(every, study.names)
    failed = _run(study, steps, deadline, lambda: write_report(study, every), say)
    if failed:
        say(f"failed: {', '.join(failed)}; see {study.log(steps[0]).parent}")
        return FAILED
    if not all(_known(study, step) for step in steps):
        say("the time is up; the same command goes on from here")
        return MORE
    return DONE


def _known(study: Study, step: Step) -> Json | None:
    """The record of the step, if it is done as it is asked for now."""
    with suppress(OSError, ValueError):
        found: Json = json.loads(study.record(step).read_text(encoding="utf-8"))
        if found["module"] == step.module and found["arguments"] == list(step.arguments):
            return found
    return None


def _run(
    study: Study, steps: Sequence[Step], deadline: float | None, report: Callable[[], None], say: Say
) -> list[str]:
    """The names of those that failed. At the deadline the others are stopped and leave no record."""
    done = {step.name for step in steps if _known(study, step)}
    waiting, failed = [step for step in steps if step.name not in done], list[str]()
    running: dict[str, tuple[Step, subprocess.Popen[bytes], float]] = {}
    report()
    try:
        while not _late(deadline):
            ready = [step for step in waiting if step.needs <= done][: study.jobs - len(running)]
            for step in ready:
                waiting.remove(step)
                say(f"{step.name} begins")
                running[step.name] = (step, _start(study, step), time.monotonic())
            if not running:
                break
            for step, process, started in list(running.values()):
                if _ended(study, step, process, started, say):
                    del running[step.name]
                    (failed.append if process.returncode else done.add)(step.name)
                    report()
            time.sleep(POLL)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.wait()
    return failed


def _ended(study: Study, step: Step, process: subprocess.Popen[bytes], started: float, say: Say) -> bool:
    """Whether it has; its record is written then, unless it failed."""
    ended, status, usage = os.wait4(process.pid, os.WNOHANG)  # says what the step itself has used
    if not ended:
        return False
    process.returncode = os.waitstatus_to_exitcode(status)
    spent = {"seconds": time.monotonic() - started, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    say(f"{step.name}: exit code {process.returncode}, {spent['seconds']:.0f} s")
    if process.returncode:
        say(_last_line(study.log(step)))
    else:
        _write_record(study, step, spent)
    return True


def _last_line(log: Path) -> str:
    return next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _start(study: Study, step: Step) -> subprocess.Popen[bytes]:
    for link, target in step.links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target.resolve(), target_is_directory=True)
    log = study.log(step)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        command = [sys.executable, "-m", step.module, *step.arguments]
        environment = {**_environment(study.jobs), **os.environ}
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )


def _environment(jobs: int) -> dict[str, str]:
    """Steps side by side share the processors; on one GPU they must give back what they no longer need."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {"OMP_NUM_THREADS": str(threads), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def _write_record(study: Study, step: Step, spent: Mapping[str, float]) -> None:
    path = study.record(step)
    rounded = {name: round(value, 1) for name, value in spent.items()}
    found = {"module": step.module, "arguments": step.arguments, **rounded}
    _write(path, json.dumps(found, indent=1) + "\n")


def write_report(study: Study, steps: Sequence[Step]) -> None:
    """study.json: circumstances, and what each finished step took; study.md: that, and the tables of all that asks."""
    out = study.places.out
    found = {step.name: known for step in steps if (known := _known(study, step))}
    document = {"scale": study.scale, **circumstances(), "steps": found}
    _write(out / "study.json", json.dumps(document, indent=1) + "\n")
    _write(out / "study.md", markdown(document, {name: out / name / "gates.md" for name in found}))


def circumstances() -> Json:
    """The machine and the libraries."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(document: Json, tables: Mapping[str, Path]) -> str:
    """The steps with their seconds, then the tables that are there."""
    lines = [
        f"# Routers inside the model, scale {document['scale']}",
        "",
        "| step | seconds | of a processor |",
        "|---|---|---|",
    ]
    for name, record in document["steps"].items():
        lines.append(f"| {name} | {record['seconds']:.0f} | {record['cpu_seconds']:.0f} |")
    for name, path in tables.items():
        if path.is_file():
            lines += ["", f"## {name}", "", path.read_text(encoding="utf-8").strip()]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes as above."""
    asked = _parser().parse_args(arguments)

    if asked.jobs < 1:
        say(f"jobs {asked.jobs}: expected a whole number of at least 1")
        return WRONG
    places = Places(asked.model, asked.tasks, asked.out, asked.adapters)
    study = Study(places, asked.scale, asked.jobs, asked.seconds, asked.steps)
    try:
        check_out(asked.out)
        code = carry_out(study, say)
    except (StudyError, TaskDataError, TrainError) as error:
        say(str(error))
        return WRONG
    say(str(asked.out / "study.md"))
    return code


def run_alone(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole process: told to end, it ends its steps first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(MORE))
    sys.exit(main(arguments))


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split(";")[0]
    parser = argparse.ArgumentParser(prog="python -m routing.evaluate.study", description=about)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--tasks", type=Path, required=True, help="folder of task folders, with groups small and medium"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--adapters", type=Path, help="folder of PEFT folders by task [they are trained]")
    parser.add_argument("--scale", choices=sorted(SCALES), default="cuda")
    parser.add_argument("--steps", type=_names, default=(), help="only these and what they need: a,b,c [all]")
    parser.add_argument("--jobs", type=int, default=1, help="steps at once [1]")
    parser.add_argument("--seconds", type=float, help="stop after so long; the same command goes on")
    return parser


if __name__ == "__main__":
    run_alone()
