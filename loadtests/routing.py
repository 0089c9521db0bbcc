"""What it costs that the server chooses: `python -m loadtests.routing --model FOLDER --out result.json`.

One server, whose adapters each have samples of their kind of task. The same requests are played in alternating rounds:
naming the adapters that `auto` chooses for them (`named`), with `auto` and nothing remembered (`auto`), and with `auto`
and every decision remembered (`cached`). The last line printed is one JSON document.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from loadtests.process import KEY, ServerProcess
from loadtests.random_adapter import LinearSizes, write_adapter
from loadtests.spread import spread
from loadtests.streamed import Answered, AnswerError, Round, complete, play
from loadtests.topics import Topic, make_topics
from loadtests.upload import upload

Json = dict[str, Any]
RANK = 8
TARGETS = ("q_proj", "v_proj")
SAMPLES = 20
MODES = ("named", "auto", "cached")
DEFAULT_ENCODER = "all-minilm-l6-v2"
SETTINGS = "[routing]\ncached_texts = 0\n"
"""The encoder reads every prompt of every round, although they are the same ones."""


def main(arguments: Sequence[str] | None = None) -> Json:
    """Measure, print a table, and write the JSON document to `--out`."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    model, encoder = asked.model.resolve(), asked.encoder or asked.model.resolve().parent / DEFAULT_ENCODER
    each = -(-asked.requests // max(asked.adapters, 1))
    try:
        topics = make_topics(asked.adapters, SAMPLES, each)
    except ValueError as error:
        parser.error(str(error))
    prompts = [topic.prompts[index] for index in range(each) for topic in topics]
    document: Json = {
        "bench": "routing",
        "model": model.name,
        "encoder": encoder.name,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rank": RANK,
        "targets": list(TARGETS),
        "samples": SAMPLES,
        "arguments": {name: getattr(asked, name) for name in ("adapters", "requests", "at_once", "tokens", "rounds")},
    }
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        work = Path(folder)
        (work / "settings.toml").write_text(SETTINGS, encoding="utf-8")
        options = ["--encoder", str(encoder), "--config", str(work / "settings.toml"), "--max-model-len", "1024"]
        options += ["--no-prefix-cache", "--page-memory", asked.page_memory]
        with ServerProcess(model, work / "data", *options) as server:
            document["start_s"] = server.seconds
            with server.client() as client:
                _register(client, work, LinearSizes.of(model), topics)
            bench = Bench(server.url, model.name, prompts[: asked.requests], asked.at_once, asked.tokens)
            document |= asyncio.run(bench.run(asked.top_k or (1, 3), asked.rounds))
    print("\n".join(_lines(document)))
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return document


def _register(client: httpx.Client, work: Path, sizes: LinearSizes, topics: Sequence[Topic]) -> None:
    """Upload an adapter for every topic, and bring it to the device as far as there is room."""
    for seed, topic in enumerate(topics):
        folder = write_adapter(work / "adapter", sizes, RANK, seed, TARGETS)
        upload(client, topic.name, folder, samples=json.dumps(topic.samples))
    for topic in topics:
        client.post(f"/admin/v1/adapters/{topic.name}/prefetch").raise_for_status()


class Bench:
    """The requests, asked in every mode. Nothing else may use the server at `url`, whose base model is `model`."""

    def __init__(self, url: str, model: str, prompts: Sequence[str], at_once: int, tokens: int) -> None:
        self._url = url
        self._model = model
        self._prompts = prompts
        self._at_once = at_once
        self._tokens = tokens
        self._seen = 0

    async def run(self, top_ks: Sequence[int], rounds: int) -> Json:
        """The document's figures. Raises AnswerError, httpx.HTTPError."""
        headers, limits = {"Authorization": f"Bearer {KEY}"}, httpx.Limits(max_connections=self._at_once)
        async with httpx.AsyncClient(base_url=self._url, headers=headers, limits=limits, timeout=600) as client:
            found: Json = {f"top_k_{top_k}": await self._compare(client, top_k, rounds) for top_k in top_ks}
        found["lowest_auto_to_named"] = min(found[f"top_k_{top_k}"]["auto"]["to_named"] for top_k in top_ks)
        return found

    async def _compare(self, client: httpx.AsyncClient, top_k: int, rounds: int) -> Json:
        """Rounds of every mode, every second time in the reverse order, after one that does not count."""
        remembered = self._unseen(top_k)
        bodies = [self._body(prompt, "auto", remembered) for prompt in self._prompts]
        chosen = (await play(client, bodies, self._at_once)).answers
        played: dict[str, list[Round]] = {mode: [] for mode in MODES}
        for number in range(rounds):
            for mode in MODES[:: 1 if number % 2 == 0 else -1]:
                done = await play(client, self._bodies(mode, chosen, top_k, remembered), self._at_once)
                check(mode, done.answers, chosen)
                played[mode].append(done)
        alone: dict[str, list[Answered]] = {mode: [] for mode in MODES}
        asked = {mode: self._bodies(mode, chosen, top_k, remembered) for mode in MODES}
        for index in range(len(chosen)):
            for mode in MODES[:: 1 if index % 2 == 0 else -1]:
                alone[mode].append(await complete(client, asked[mode][index] | {"max_tokens": 1}))
        for mode in MODES:
            check(mode, alone[mode], chosen)
        return figures(played, alone)

    def _bodies(self, mode: str, chosen: Sequence[Answered], top_k: int, remembered: Json) -> list[Json]:
        """One for every prompt."""
        if mode == "named":
            entries = [[_entry(adapter) for adapter in answer.route["adapters"]] for answer in chosen]
            pairs = zip(self._prompts, entries, strict=True)
            return [self._body(prompt, self._model, {"adapters": adapters}) for prompt, adapters in pairs]
        lora = remembered if mode == "cached" else self._unseen(top_k)
        return [self._body(prompt, "auto", lora) for prompt in self._prompts]

    def _body(self, prompt: str, model: str, lora: Json) -> Json:
        return {"model": model, "prompt": prompt, "max_tokens": self._tokens, "lora": lora}

    def _unseen(self, top_k: int) -> Json:
        """Options for which nothing is remembered: each time others, which all choose the same adapters."""
        self._seen += 1
        return {"top_k": top_k, "min_score": -1.0 - self._seen}


def check(mode: str, answers: Sequence[Answered], chosen: Sequence[Answered]) -> None:
    """Raises AnswerError if a mode is not what its name says."""
    for answer, expected in zip(answers, chosen, strict=True):
        if sorted(answer.names) != sorted(expected.names) or not answer.names:
            raise AnswerError(f"{mode}: the adapters {answer.names} answered instead of {expected.names}")
        if answer.route["cached"] != (mode == "cached"):
            raise AnswerError(f"{mode}: a decision was {'' if answer.route['cached'] else 'not '}remembered")


def figures(played: Mapping[str, Sequence[Round]], alone: Mapping[str, Sequence[Answered]]) -> Json:
    """By mode. `to_named`: throughput over that of `named` in the same round, the median over all rounds.

    `first_token_above_named_ms` is a median too, over prompts that were asked one at a time.
    """
    found: Json = {}
    for mode in MODES:
        rates = [done.tokens_per_second for done in played[mode]]
        pairs = zip(rates, played["named"], strict=True)
        ratios = [rate / named.tokens_per_second for rate, named in pairs]
        answers = [answer for done in played[mode] for answer in done.answers]
        above = [mine.first - named.first for mine, named in zip(alone[mode], alone["named"], strict=True)]
        found[mode] = {
            "tokens_per_second": [round(rate, 1) for rate in rates],
            "to_named": statistics.median(ratios),
            "to_named_rounds": [round(ratio, 4) for ratio in ratios],
            "route_ms": spread([answer.route["route_ms"] for answer in answers]),
            "first_token_ms": spread([1e3 * answer.first for answer in answers]),
            "alone_route_ms": spread([answer.route["route_ms"] for answer in alone[mode]]),
            "alone_first_token_ms": spread([1e3 * answer.first for answer in alone[mode]]),
            "alone_first_token_above_named_ms": 1e3 * statistics.median(above),
        }
    return found


def _lines(document: Json) -> list[str]:
    """A table of the figures."""
    lines = [f"{'':16}{'tokens/s':>10}{'of named':>10}{'route ms':>10}{'alone: route ms':>17}{'first token ms':>16}"]
    for name, found in document.items():
        if not name.startswith("top_k_"):
            continue
        for mode in MODES:
            each = found[mode]
            rate = statistics.median(each["tokens_per_second"])
            route, alone = each["route_ms"]["p50"], each["alone_route_ms"]["p50"]
            first = each["alone_first_token_ms"]["p50"]
            line = f"{name + ' ' + mode:16}{rate:10.1f}{each['to_named']:10.3f}{route:10.2f}{alone:17.2f}{first:16.1f}"
            lines.append(line)
    return lines


def _entry(adapter: Mapping[str, Any]) -> Json:
    return {"name": adapter["name"], "weight": adapter["weight"]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.routing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--encoder", type=Path, metavar="FOLDER", help=f"[{DEFAULT_ENCODER} beside the model]")
    parser.add_argument("--adapters", type=int, default=100, help="each with samples of its own kind of task [100]")
    parser.add_argument("--requests", type=int, default=24, help="of a round, each with a prompt of its own [24]")
    parser.add_argument("--at-once", type=int, default=8, help="requests at a time [8]")
    parser.add_argument("--tokens", type=int, default=24, help="of every answer [24]")
    parser.add_argument("--rounds", type=int, default=4, help="of every mode [4]")
    parser.add_argument("--top-k", type=int, action="append", help="adapters of a request; repeatable [1, 3]")
    parser.add_argument("--page-memory", default="1GiB", help="for adapters on the device [1GiB]")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser


if __name__ == "__main__":
    main()
