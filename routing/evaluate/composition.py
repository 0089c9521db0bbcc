"""What answers are worth by the way adapters are chosen and composed:

python -m routing.evaluate.composition --model DIR --tasks ROOT --adapters DIR --rankings FILE --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from routing.evaluate.answers import (
    WAITING,
    AdapterFolders,
    AnswerError,
    Question,
    answer_limits,
    answers,
    open_tokenizer,
    tokenise,
)
from routing.evaluate.composition_report import Table, markdown
from routing.evaluate.methods import METHODS, Chosen, choose, settings
from routing.evaluate.quality import scores
from routing.evaluate.ranked import RankedQuery, Rankings, read_rankings
from routing.route_weights import UNITS
from routing.train.data import TaskDataError
from routing.train.progress import say
from server.engine.config import EngineConfig, RequestError
from server.engine.engine import Engine
from server.model.config import ModelError

if TYPE_CHECKING:
    pass

FOLDERS = ("model", "tasks", "adapters", "rankings")
"""Of these a result keeps the names alone: where they lay says nothing to its readers."""

Json = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """The settings of one evaluation. `rows` of each task, None all of the rankings; `batch` sequences in a step."""

    model: str
    tasks: str
    adapters: str
    rankings: str
    rows: int | None = 50
    top_k: int = 3
    temperature: float = 0.05
    methods: tuple[str, ...] = METHODS
    device: str = "auto"
    dtype: str = "auto"
    batch: int = 64
    load_threads: int = 4
    seed: int = 0


def evaluate(asked: Evaluation, out: Path, say: Say = lambda _: None) -> Json:
    """Answers every query under every setting, and writes into `out`: answers.jsonl (one line a query), result.json and
    table.md. Returns the content of result.json.

    Raises:
        TaskDataError, AnswerError: rankings, tasks and adapters do not fit together.
        ModelError: the model cannot be served.
    """
    started = time.perf_counter()
    tasks = Path(asked.tasks)
    rankings = read_rankings(Path(asked.rankings), tasks, asked.rows)
    queries = rankings.queries
    names = {name for query in queries for name, _ in query.ranked} | {query.task for query in queries}
    folders = AdapterFolders.find(Path(asked.adapters), names)
    plan = [(setting.name, choose(setting, queries, asked.top_k, asked.temperature)) for setting in _settings(asked)]
    tokenizer = open_tokenizer(asked.model)
    limits = answer_limits(tokenizer, tasks, rankings.metrics)
    prompts = [tokenise(tokenizer, query.example) for query in queries]
    longest = max(len(prompt) + limits[query.task] for prompt, query in zip(prompts, queries, strict=True))
    engine = _engine(asked, longest)
    given: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    try:
        for name, chosen in plan:
            began = time.perf_counter()
            questions = [
                Question(prompt, limits[query.task], own.mix(folders.digests))
                for prompt, query, own in zip(prompts, queries, chosen, strict=True)
            ]
            given[name] = answers(engine, tokenizer, questions, folders.paths, WAITING * asked.batch)
            seconds[name] = round(time.perf_counter() - began, 1)
            say(f"{name}: {len(questions)} answers in {seconds[name]:.0f} s")
    finally:
        engine.close()
    return _write(asked, rankings, dict(plan), given, seconds, engine, out, time.perf_counter() - started)


def _settings(asked: Evaluation) -> list[Any]:
    if unknown := [name for name in asked.methods if name not in METHODS]:
        raise TaskDataError(f"methods: {unknown[0]!r} is none of {', '.join(METHODS)}")
    return settings(asked.methods)


def _engine(asked: Evaluation, longest: int) -> Engine:
    config = EngineConfig(
        asked.model,
        device=asked.device,
        dtype=asked.dtype,
        max_num_seqs=asked.batch,
        max_batch_tokens=max(EngineConfig.max_batch_tokens, asked.batch),
        max_model_len=longest,
        prefix_cache=False,  # every answer is computed in full, whatever was asked before
        load_threads=asked.load_threads,
        cuda_graphs="lazy",
    )
    return Engine.from_config(config)


def _write(
    asked: Evaluation,
    rankings: Rankings,
    plan: dict[str, list[Chosen]],
    given: dict[str, list[str]],
    seconds: dict[str, float],
    engine: Engine,
    out: Path,
    elapsed: float,
) -> Json:
    queries, metrics = rankings.queries, rankings.metrics
    scored = {
        name: [
            scores(metrics[query.task], answer, query.references) for query, answer in zip(queries, own, strict=True)
        ]
        for name, own in given.items()
    }
    tasks = tuple(query.task for query in queries)
    clusters = tuple(query.example.cluster for query in queries)
    own_metric, em = (np.array([[s[key] for s in own] for own in scored.values()]) for key in ("score", "em"))
    tables = [Table(tuple(given), tasks, clusters, values) for values in (own_metric, em)]
    result, exact = (table.result(rankings.groups, asked.seed) for table in tables)
    info = engine.info()
    document = {
        "evaluation": "composition",
        "encoder": rankings.encoder,
        "arguments": asdict(asked) | {name: Path(getattr(asked, name)).name for name in FOLDERS},
        "device": info.device,
        "dtype": info.dtype,
        "model_fingerprint": info.model_fingerprint,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "weights": f"1/k for the {asked.top_k} nearest; smear: softmax over {asked.temperature}, in 1/{UNITS}",
        "queries": len(queries),
        "metrics": metrics,
        "distinct_mixes": {name: len(set(own)) for name, own in plan.items()},
        "seconds": {**seconds, "all": round(elapsed, 1)},
        "settings": result,
        "exact_match": {name: {key: found[key] for key in ("mean", "interval")} for name, found in exact.items()},
        "generation": _generation(tasks, scored),
    }
    out.mkdir(parents=True, exist_ok=True)
    with (out / "answers.jsonl").open("w", encoding="utf-8") as file:
        for place, query in enumerate(queries):
            file.write(json.dumps(_line(place, query, plan, given, scored), ensure_ascii=False) + "\n")
    (out / "result.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(result, metrics, Counter(tasks)), encoding="utf-8")
    return document


def _generation(tasks: Sequence[str], scored: dict[str, list[dict[str, float]]]) -> Json:
    """ROUGE-1, ROUGE-L and BLEU of the tasks whose answers are free text."""
    found: Json = {}
    for name, own in scored.items():
        for task in dict.fromkeys(tasks):
            rows = [score for score, place in zip(own, tasks, strict=True) if place == task and "rougeL" in score]
            if rows:
                means = {key: float(np.mean([row[key] for row in rows])) for key in ("rouge1", "rougeL", "bleu")}
                found.setdefault(task, {})[name] = means
    return found


def _line(
    place: int,
    query: RankedQuery,
    plan: dict[str, list[Chosen]],
    given: dict[str, list[str]],
    scored: dict[str, list[dict[str, float]]],
) -> Json:
    return {
        "task": query.task,
        "row": query.row,
        "prompt": query.example.prompt,
        "target": query.example.target,
        "settings": {
            name: {
                "adapters": [[adapter, round(weight, 5)] for adapter, weight in plan[name][place].entries],
                "answer": own[place],
                "score": round(scored[name][place]["score"], 5),
            }
            for name, own in given.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0 done, 2 the input does not fit."""
    asked = vars(_parser().parse_args(arguments))
    out = asked.pop("out")

    try:
        evaluate(Evaluation(**{name: value for name, value in asked.items() if value is not None}), out, say)
    except (AnswerError, ModelError, RequestError, TaskDataError) as error:
        say(str(error))
        return 2
    sys.stdout.write((out / "table.md").read_text(encoding="utf-8"))
    return 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split(":")[0]
    parser = argparse.ArgumentParser(prog="python -m routing.evaluate.composition", description=about)
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--tasks", required=True, help="folder of task folders")
    parser.add_argument("--adapters", required=True, help="folder of PEFT folders by task")
    parser.add_argument("--rankings", required=True, metavar="FILE", help="queries with their ranked adapters")
    parser.add_argument("--out", type=Path, required=True, help="folder of answers.jsonl, result.json and table.md")
    parser.add_argument("--rows", type=int, help="queries of each task [50]")
    parser.add_argument("--top-k", type=int, help="adapters of fusion, mixture and soup [3]")
    parser.add_argument("--temperature", type=float, help="of smear's softmax [0.05]")
    parser.add_argument("--methods", type=_words, help=f"some of {','.join(METHODS)}")
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument("--dtype", help="auto, float32 or bfloat16")
    parser.add_argument("--batch", type=int, help="sequences of a step [64]")
    parser.add_argument("--load-threads", type=int, help="that read and fuse adapters [4]")
    parser.add_argument("--seed", type=int, help="of the bootstrap")
    return parser


if __name__ == "__main__":
    sys.exit(main())
