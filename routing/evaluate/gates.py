"""What token-level routers are worth beside single adapters, merges and one LoRA for everything:

python -m routing.evaluate.gates --model DIR --tasks ROOT --adapters DIR --router FOLDER --out DIR
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from routing.card_file import RouterFolderError
from routing.evaluate.answers import WAITING, AnswerError, open_tokenizer
from routing.evaluate.gate_jobs import carry_out, finished
from routing.evaluate.gate_methods import MERGES
from routing.evaluate.gate_plan import GateEvaluation, GatePlan, make_plan
from routing.evaluate.gate_scores import Lines
from routing.evaluate.gates_report import document, write_report
from routing.evaluate.prompt_report import described
from routing.train.data import TaskDataError
from routing.train.many import task_names
from routing.train.progress import say
from server.engine.config import GIB, EngineConfig, RequestError
from server.engine.engine import Engine
from server.engine.memory import CPU_KV_MEMORY
from server.engine.runner import choose_device, choose_dtype
from server.model.config import ModelConfig, ModelError

Json = dict[str, Any]
Say = Callable[[str], None]

FAILURES = (AnswerError, ModelError, RequestError, RouterFolderError, TaskDataError)
"""What `evaluate` raises for input that does not fit."""

PAGE_MEMORY = 4 * GIB
"""Of a GPU, at most: hundreds of adapters of a small model."""


def evaluate(asked: GateEvaluation, out: Path, say: Say = lambda _: None) -> Json:
    """Asks every method everything, and writes answers/, merges/, gates.json, gates.md and plots into `out`.

    Each method's answers and a report of all that is there are written as soon as the method is done; methods whose
    answers lie in `out` from an earlier run with the same questions are not asked again. Returns the content of
    gates.json.

    Raises:
        TaskDataError, AnswerError, RouterFolderError: tasks, adapters and routers do not fit together.
        ModelError: the model cannot be served.
    """
    started = time.perf_counter()
    asked.check()
    names = task_names(Path(asked.tasks), asked.group)
    config = ModelConfig.from_folder(asked.model)
    tokenizer = open_tokenizer(asked.model)
    plan = make_plan(asked, names, tokenizer, config, out / "merges")
    say(f"{len(plan.jobs)} methods and parts, {sum(len(job.questions) for job in plan.jobs)} questions")
    setting = _setting(asked, config)
    lines, missing = Lines([job.method for job in plan.jobs]), []
    for job in plan.jobs:
        known = finished(job, out / "answers", setting)
        if known is None:
            missing.append(job)
        else:
            lines.add(job.part, job.method, known)
            say(f"there already: {job.part}, {job.method}: {lines.shown(job.part, job.method)}")

    def report() -> Json:
        made = document(lines, plan.curve, plan.temperatures, asked.new, asked.seed)
        found = {**_circumstances(asked, plan, setting, time.perf_counter() - started), **made}
        write_report(out, found)
        return found

    found = report()
    if not missing:
        return found
    engine = Engine.from_config(_engine_config(asked, plan, config))
    try:
        answers = carry_out(missing, engine, tokenizer, plan.paths, WAITING * asked.batch, out / "answers", setting)
        for job, own in answers:
            lines.add(job.part, job.method, own)
            found = report()
            shown = lines.shown(job.part, job.method)
            say(f"{time.perf_counter() - started:6.0f} s  {job.part}, {job.method}: {shown}")
    finally:
        engine.close()
    return found


def _setting(asked: GateEvaluation, config: ModelConfig) -> Json:
    """What decides the answers beside the questions."""
    device = choose_device(asked.device)
    dtype = str(choose_dtype(asked.dtype, device, config)).removeprefix("torch.")
    return {"device": device.type, "dtype": dtype, "model_fingerprint": config.fingerprint()}


def _engine_config(asked: GateEvaluation, plan: GatePlan, config: ModelConfig) -> EngineConfig:
    device = choose_device(asked.device)
    tokens = asked.batch * (plan.longest + EngineConfig.block_size)
    itemsize = choose_dtype(asked.dtype, device, config).itemsize
    needed = tokens * 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    most = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_KV_MEMORY
    return EngineConfig(
        asked.model,
        device=asked.device,
        dtype=asked.dtype,
        backend=asked.backend,
        max_num_seqs=asked.batch,
        max_batch_tokens=max(asked.batch_tokens, asked.batch),
        max_model_len=plan.longest,
        kv_memory=min(most, needed),  # what is used: other evaluations may run beside this one
        page_memory=min(most // 4, PAGE_MEMORY) if device.type == "cuda" else None,
        load_threads=asked.load_threads,
        cuda_graphs="lazy",
        gates="routing.token_router:TokenGateFactory",
        gate_slots=8,
        prompt_routers="routing.prompt_serving:PromptRouterFactory",
    )


def _circumstances(asked: GateEvaluation, plan: GatePlan, setting: Json, seconds: float) -> Json:
    return {
        "evaluation": "gates",
        "arguments": asdict(asked),
        **setting,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "metrics": dict(plan.metrics),
        "routers": {
            router.label: {"sha256": router.card.sha256, "training": dict(router.card.training)}
            for router in plan.routers
        },
        "prompt_routers": {router.label: described(router) for router in plan.prompt_routers},
        "seconds": round(seconds, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0 done, 2 the input does not fit."""
    given = vars(_parser().parse_args(arguments))
    out = given.pop("out")

    try:
        routers = labelled(given.pop("router") or (), "router")
        deciders = labelled(given.pop("prompt_router") or (), "prompt router")
        swapped = labelled(given.pop("swapped") or (), "swapped")
        curve = curve_of(given.pop("curve") or ())
        only = tuple(given.pop("only") or ())
        rest = {name: value for name, value in given.items() if value is not None}
        labels: Json = {"routers": routers, "prompt_routers": deciders, "swapped": swapped, "curve": curve}
        asked = GateEvaluation(**labels, only=only, **rest)
        evaluate(asked, out, say)
    except FAILURES as error:
        say(str(error))
        return 2
    sys.stdout.write((out / "gates.md").read_text(encoding="utf-8"))
    return 0


def labelled(texts: Sequence[str], what: str) -> dict[str, str]:
    """`name=folder`, or a folder that is called by its own name.

    Raises AnswerError for a name that comes twice, and for a folder that is not there.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        name, folder = (name, folder) if equals else (Path(text).resolve().name, text)
        if not name or name in found:
            raise AnswerError(f"{what} {text}: expected a name of its own, as in name=folder")
        if not Path(folder).is_dir():
            raise AnswerError(f"{what} {name}: there is no folder {folder}")
        found[name] = folder
    return found


def curve_of(texts: Sequence[str]) -> Mapping[int, str]:
    """`rows=folder`. Raises AnswerError."""
    found = labelled(texts, "curve")
    if wrong := [name for name in found if not name.isdecimal()]:
        raise AnswerError(f"curve {wrong[0]}: expected training rows a task before the folder, as in 50=folder")
    return {int(name): folder for name, folder in found.items()}


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split(":")[0]
    parser = argparse.ArgumentParser(prog="python -m routing.evaluate.gates", description=about)
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--tasks", required=True, help="folder of task folders")
    parser.add_argument("--adapters", required=True, help="folder of PEFT folders by task")
    parser.add_argument("--out", type=Path, required=True, help="folder of answers, tables and plots")
    parser.add_argument("--group", help="tasks of this group of the manifest [all]")
    parser.add_argument("--router", action="append", metavar="LABEL=FOLDER", help="a trained router; repeatable")
    parser.add_argument("--curve", action="append", metavar="ROWS=FOLDER", help="one trained on so many rows a task")
    parser.add_argument("--prompt-router", action="append", metavar="LABEL=FOLDER", help="MoA or MiLoRA; repeatable")
    parser.add_argument("--modules", type=_counts, help="of a layer, for MiLoRA over modules: 1,2,7 [its own]")
    parser.add_argument("--joint", help="PEFT folder of one adapter trained on all tasks")
    parser.add_argument("--swapped", action="append", metavar="TASK=FOLDER", help="another adapter of a task")
    parser.add_argument("--new", type=_words, metavar="TASKS", help="report each of these apart from the others")
    parser.add_argument("--merges", type=_words, help=f"of all adapters [{','.join(MERGES)}]; '' for none")
    parser.add_argument("--rows", type=int, help="test rows of a task [all]")
    parser.add_argument("--composite-rows", type=int, help="composite prompts of a size [all]")
    parser.add_argument("--composite-sizes", type=_counts, metavar="SIZES", help="of composite prompts: 3,5 [all]")
    parser.add_argument("--composite-routers", type=_words, metavar="LABELS", help="asked composites [the first]")
    parser.add_argument("--temperatures", type=_numbers, help="of composite prompts [1,5,15,20,30]")
    parser.add_argument("--perplexity", action="store_true", help="of the targets, too")
    parser.add_argument("--only", action="append", metavar="METHOD", help="as the tables name it; repeatable [all]")
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument("--dtype", help="auto, float32 or bfloat16")
    parser.add_argument("--backend", help="auto, reference or triton")
    parser.add_argument("--batch", type=int, help="sequences of a step [64]")
    parser.add_argument("--batch-tokens", type=int, help="token rows of a step [512]")
    parser.add_argument("--load-threads", type=int, help="that read adapters [4]")
    parser.add_argument("--seed", type=int, help="of the bootstrap")
    return parser


if __name__ == "__main__":
    sys.exit(main())
