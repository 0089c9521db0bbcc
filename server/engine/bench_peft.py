"""Throughput of the engine beside `transformers` with `peft`, in one process and one run: `loramux bench`.

Every row decodes the same number of tokens from a random prompt of the same length, greedy, end of text ignored. The
adapters are random, rank 8 on all seven linears, and row i uses adapter i mod 8: the case that peft's `adapter_names`
covers as well. The last line printed is one JSON document.
"""

import json
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Sequence as Rows
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adapters_store.pages import page_bytes
from adapters_store.peft_format import read_adapter
from adapters_store.types import GROUPS, TARGETS, Mix
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.sequence import Request, SamplingParams

NUM_ADAPTERS = 8
RANK = 8


@dataclass(frozen=True)
class Workload:
    """`rows` sequences of `prompt_len` + `output_len` tokens each."""

    rows: int
    prompt_len: int
    output_len: int

    def prompts(self, vocabulary: int, seed: int) -> list[list[int]]:
        rng = random.Random(seed)
        return [[rng.randrange(vocabulary) for _ in range(self.prompt_len)] for _ in range(self.rows)]


@dataclass(frozen=True)
class Result:
    """Output tokens per second of both, best of the repeats, and their ratio."""

    rows: int
    adapters: int
    loramux: float
    transformers: float

    @property
    def ratio(self) -> float:
        return self.loramux / self.transformers


def main(
    model: Path,
    *,
    rows: Rows[int] = (1, 8, 32),
    prompt_len: int = 64,
    output_len: int = 32,
    repeats: int = 2,
    seed: int = 0,
) -> list[Result]:
    """Measure, print a table and one line of JSON."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(model, Path(folder), seed)
        engine = Engine.from_config(EngineConfig(str(model), prefix_cache=False, max_num_seqs=max(rows)))
        shape = engine.runner.model.linear_shape
        digests = {read_adapter(path, shape).weights.digest: str(path) for path in peer.folders}
        results = []
        for count in rows:
            work = Workload(count, prompt_len, output_len)
            for adapters in (0, min(count, NUM_ADAPTERS)):
                with console.status(f"{count} rows, {adapters} adapters ..."):
                    results.append(_measure(work, adapters, engine, digests, peer, repeats, seed))
                console.print(f"{count} rows, {adapters} adapters: {results[-1].ratio:.2f} times transformers + peft")
    table = Table("rows", "adapters", "loramux tokens/s", "transformers + peft tokens/s", "ratio")
    for result in results:
        cells = (f"{result.loramux:.1f}", f"{result.transformers:.1f}", f"{result.ratio:.2f}")
        table.add_row(str(result.rows), str(result.adapters), *cells)
    console.print(table)
    print(json.dumps(_document(results, engine, prompt_len, output_len, seed)))
    return results


class Peer:
    """`transformers` generate, over a base model and over the same model in peft with its adapters loaded."""

    def __init__(self, model: Path, folder: Path, seed: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)  # peft uses what transformers is about to rename
        torch.manual_seed(seed)
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        wrapped = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules=list(TARGETS), init_lora_weights=False)
        self.peft = get_peft_model(wrapped, config, adapter_name="adapter0")
        for index in range(1, NUM_ADAPTERS):
            self.peft.add_adapter(f"adapter{index}", config)
        self.peft.eval().save_pretrained(folder)
        self.folders = [folder / f"adapter{index}" for index in range(NUM_ADAPTERS)]

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], output_len: int, adapters: int) -> None:
        ids = torch.tensor(prompts)
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": output_len,
            "min_new_tokens": output_len,
            "do_sample": False,
            "pad_token_id": 0,
        }
        if adapters:
            options["adapter_names"] = [f"adapter{row % adapters}" for row in range(len(prompts))]
        output = (self.peft if adapters else self.base).generate(input_ids=ids, **options)
        if output.shape[1] != ids.shape[1] + output_len:
            raise RuntimeError(f"transformers generated {output.shape[1] - ids.shape[1]} tokens, expected {output_len}")


def _measure(
    work: Workload, adapters: int, engine: Engine, digests: dict[str, str], peer: Peer, repeats: int, seed: int
) -> Result:
    """Best of `repeats` of each, in turns, so that both meet the same machine; the first round only warms up."""
    prompts = work.prompts(engine.runner.model.vocab_size, seed)
    ours, theirs = [], []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        _generate(engine, prompts, work.output_len, dict(list(digests.items())[:adapters]))
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        peer.generate(prompts, work.output_len, adapters)
        theirs.append(time.perf_counter() - started)
    tokens = work.rows * work.output_len
    return Result(work.rows, adapters, tokens / min(ours[1:]), tokens / min(theirs[1:]))


def _generate(engine: Engine, prompts: list[list[int]], output_len: int, digests: dict[str, str]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    names = list(digests)
    for row, prompt in enumerate(prompts):
        mix = Mix.of([(names[row % len(names)], 1.0)]) if names else Mix()
        engine.add_request(Request(f"row-{row}", tuple(prompt), params, mix, digests))
    produced = 0
    while engine.has_work:
        produced += sum(len(output.tokens) for output in engine.step())
    if produced != len(prompts) * output_len:
        raise RuntimeError(f"the engine produced {produced} tokens, expected {len(prompts) * output_len}")


def _document(results: list[Result], engine: Engine, prompt_len: int, output_len: int, seed: int) -> dict[str, Any]:
    info = engine.info()
    shape, size = engine.runner.model.linear_shape, engine.runner.dtype.itemsize
    groups = {group.name: group for group in GROUPS}
    return {
        "bench": "engine",
        "results": [{**asdict(result), "ratio": result.ratio} for result in results],
        "prompt_len": prompt_len,
        "output_len": output_len,
        "seed": seed,
        "device": info.device,
        "dtype": info.dtype,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "memory_bytes": dict(info.memory),
        "planned_bytes": {
            "kv": info.num_kv_blocks * engine.runner.block_bytes(info.block_size),
            "pages": sum(pages * page_bytes(shape, groups[name], size) for name, pages in info.num_pages.items()),
        },
    }
