"""`python -m routing.bench_prompt`: what MoA and MiLoRA cost beside the base model, plain LoRA and MoE-LoRA, as JSON.

A random model, random adapters of one rank and random routers: how fast it is does not depend on what they choose.
`prompt`: seconds to the first token of a prompt, alone on the engine, `first` when it has to be decided and `again`
when that is known; the prefix cache is off. `decode`: milliseconds of a step of `rows` sequences, by number of
`tenants`, each with an adapter of its own and, for MiLoRA, the router over its linears; for MoE-LoRA, the baseline of
MiLoRA's paper whose gates choose for every token, with experts and gates of its own. `weights`: bytes of a tenant.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from adapters_store.pages import PackedAdapter, page_bytes
from adapters_store.tiers import HostTier
from adapters_store.types import GROUPS, PAGE_RANK, TARGETS, Mix
from kernels.shapes import SHAPES
from routing.card_adapters import CardAdapter
from routing.prompt_folder import MILORA, MOA, PromptCard, write_prompt_router
from routing.prompt_router import GELU_A, GELU_B, LayerRouter, RouterForm
from server.engine.adapters import EngineAdapters
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.gates import GateUse
from server.engine.prompt_routers import PromptUse
from server.engine.reads import start_loader
from server.engine.router_bank import RouterBank
from server.engine.runner import Runner, choose_device, choose_dtype
from server.engine.sequence import Request, SamplingParams
from server.engine.workload import SyntheticAdapters, write_config
from server.model.config import ModelConfig

Json = dict[str, Any]
MOE_LORA = "moe-lora"
KINDS = ("base", "lora", MOA, MILORA, MOE_LORA)
FACTORY, GATES = "routing.prompt_serving:PromptRouterFactory", "routing.token_router:TokenGateFactory"


@dataclass(frozen=True)
class Options:
    """`prompt` and `context` are tokens, `rows` sequences, `steps` those that are timed after `warm` others.

    MoE-LoRA has `experts` of `expert_rank` in each linear, of which a token takes `chosen`.
    """

    model: str = "8b"
    device: str = "auto"
    cuda_graphs: str = "capture"
    rank: int = 16
    adapters: int = 8
    top_k: int = 3
    experts: int = 8
    expert_rank: int = 4
    chosen: int = 4
    prompt: int = 1024
    repeats: int = 5
    rows: int = 64
    context: int = 400
    warm: int = 10
    steps: int = 50
    tenants: tuple[int, ...] = (1, 2, 4, 8)
    max_batch_tokens: int = 512
    seed: int = 0


@dataclass(eq=False)
class Bench:
    """One engine, its adapters, and a router of each kind, which stands for any number of them."""

    options: Options
    folder: Path
    clock: Callable[[], float] = time.perf_counter
    _number: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        options = self.options
        write_config(SHAPES[options.model], self.folder)
        self.model = ModelConfig.from_folder(str(self.folder))
        shape, dtype = self.model.linear_shape, choose_dtype("auto", choose_device(options.device), self.model)
        self.adapters = SyntheticAdapters(shape, rank=options.rank, targets=TARGETS, dtype=dtype, seed=options.seed)
        self.experts = SyntheticAdapters(
            shape, rank=options.expert_rank, targets=TARGETS, dtype=dtype, seed=options.seed + 1
        )
        self.itemsize = dtype.itemsize
        most, tenants = max(options.adapters, *options.tenants), max(options.tenants)
        self._expert_digests = {self.experts.digest(index) for index in range(tenants * options.experts)}
        pages = most * -(-options.rank // PAGE_RANK)
        pages += len(self._expert_digests) * -(-options.expert_rank // PAGE_RANK)
        page = sum(page_bytes(shape, group, dtype.itemsize) for group in GROUPS)
        token = 2 * self.model.num_layers * self.model.num_kv_heads * self.model.head_dim * dtype.itemsize
        longest = max(options.prompt, options.context + options.warm + options.steps) + 64
        config = EngineConfig(
            str(self.folder),
            device=options.device,
            max_num_seqs=options.rows,
            max_batch_tokens=max(options.max_batch_tokens, options.rows),
            max_model_len=min(longest, self.model.max_position_embeddings),
            kv_memory=(options.rows + 2) * (longest + 16) * token,
            page_memory=pages * page,
            prefix_cache=False,
            load_format="random",
            cuda_graphs=options.cuda_graphs,
            prompt_routers=FACTORY,
            gates=GATES,
            gate_slots=tenants,
            gates_per_slot=options.experts,
        )
        runner = Runner(config)
        assert runner.prompt_routers is not None
        loader = start_loader(config.load_threads, runner.device)
        host = HostTier(self.adapters.num_bytes * (most + 1) + self.experts.num_bytes * (len(self._expert_digests) + 1))
        adapters = EngineAdapters(host, runner.pool, loader, self._read, self.clock)
        gates, routers = runner.gate_bank(loader, options.experts), RouterBank(loader, runner.prompt_routers.read)
        self.engine = Engine(config, runner, adapters, self.clock, gates, routers)
        self.device = str(runner.device)
        self._write_routers()

    def prompts(self, kind: str) -> Json:
        """Seconds to the first token, the median over prompts that differ."""
        first, again = list[float](), list[float]()
        for number in range(self.options.repeats + 1):
            for seconds in (first, again):
                self.engine.add_request(self._request(kind, self.options.prompt, number, tenant=0, max_tokens=1))
                started = self.clock()
                while self.engine.has_work:
                    self.engine.step()
                seconds.append(self.clock() - started)
        return {"first": median(first[1:]), "again": median(again[1:])}  # the first prompt compiles and loads

    def decode(self, kind: str, tenants: int) -> float:
        """Median milliseconds of a step in which every row gets a token."""
        options, seconds = self.options, list[float]()
        count = options.warm + options.steps + 1
        for row in range(options.rows):
            prompt = max(1, options.context // 2 + row * options.context // options.rows)
            request = self._request(kind, prompt, row, tenant=row % tenants, max_tokens=count + options.rows * 4)
            self.engine.add_request(request)
        waiting = options.rows
        while waiting:
            waiting -= sum(output.timings is not None for output in self.engine.step())
        for step in range(options.warm + options.steps):
            started = self.clock()
            outputs = self.engine.step()
            if step >= options.warm and len(outputs) == options.rows:
                seconds.append(self.clock() - started)
        for sequence in tuple(self.engine.scheduler.running):
            self.engine.abort(sequence.request.id)
        while self.engine.has_work:
            self.engine.step()
        return 1000 * median(seconds)

    def weights(self, kind: str) -> int:
        """Bytes in pages, gate slots and router that a tenant of this kind needs; of MoA all tenants share them."""
        shape, layers = self.model.linear_shape, self.model.num_layers
        if kind == MOE_LORA:
            gates = layers * sum(shape.inputs[target] for target in TARGETS) * self.itemsize
            return self.options.experts * (self.experts.num_bytes + gates)
        routers = sum(path.stat().st_size for path in (self.folder / kind).glob("*.safetensors"))
        return len(self._indices(kind, 0)) * self.adapters.num_bytes + routers

    def _request(self, kind: str, length: int, number: int, tenant: int, max_tokens: int) -> Request:
        self._number += 1
        generator = torch.Generator().manual_seed(self.options.seed + number)
        prompt = tuple(torch.randint(2, self.model.vocab_size, (length,), generator=generator).tolist())
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        library = self.experts if kind == MOE_LORA else self.adapters
        indices = self._indices(kind, tenant)
        digests = [library.digest(index) for index in indices]
        paths = {digest: library.path(index) for digest, index in zip(digests, indices, strict=True)}
        mix = Mix(tuple((digest, 1.0) for digest in sorted(digests)))
        use = None
        if kind in (MOA, MILORA):
            top_k = 1 if kind == MOA else self.options.top_k
            use = PromptUse(f"{kind} {tenant}", str(self.folder / kind), tuple(digests), kind == MILORA, top_k)
        gates = None
        if kind == MOE_LORA:
            gates = GateUse(f"{kind} {tenant}", "random", tuple(digests), self.options.chosen, 1.0)
        return Request(str(self._number), prompt, params, mix, paths, gates=gates, prompt_router=use)

    def _indices(self, kind: str, tenant: int) -> Sequence[int]:
        """Of the adapters, or the experts, that a request of the tenant needs."""
        experts = self.options.experts
        shared = {"base": range(0), MOA: range(self.options.adapters)}
        own = range(tenant * experts, (tenant + 1) * experts) if kind == MOE_LORA else range(tenant, tenant + 1)
        return shared.get(kind, own)

    def _read(self, digest: str, path: str) -> PackedAdapter:
        """As `SyntheticAdapters.read`."""
        return (self.experts if digest in self._expert_digests else self.adapters).read(digest, path)

    def _write_routers(self) -> None:
        layers, width = self.model.num_layers, self.model.hidden_size
        generator = torch.Generator().manual_seed(self.options.seed)
        for kind, count in ((MOA, self.options.adapters), (MILORA, 1)):
            form = RouterForm("adapters", layers, count, 1, "mean", "none", "rms", "vote")
            if kind == MILORA:
                form = RouterForm("modules", layers, len(TARGETS), 1, "attention", "rational", "rms", "layer")
            drawn = [torch.randn(form.num_experts + 1, width, generator=generator) for _ in range(layers)]
            routers = [LayerRouter(w[1:]) for w in drawn]
            if kind == MILORA:
                a, b = torch.tensor(GELU_A), torch.tensor(GELU_B)
                routers = [LayerRouter(w[1:], w[0] / width, a.clone(), b.clone()) for w in drawn]
            adapters = tuple(CardAdapter(str(index), self.adapters.digest(index)) for index in range(count))
            card = PromptCard(kind, self.model.fingerprint(), "random", adapters, form, False, "")
            write_prompt_router(self.folder / kind, card, tuple(routers))


def measure(options: Options, folder: Path, say: Callable[[str], None]) -> Json:
    """The whole document."""
    bench = Bench(options, folder)
    prompt, decode = {}, {}
    for kind in KINDS:
        prompt[kind] = bench.prompts(kind)
        say(f"{kind}: first token after {prompt[kind]['first']:.4f} s, again after {prompt[kind]['again']:.4f} s")
    for kind in KINDS:
        decode[kind] = {tenants: bench.decode(kind, tenants) for tenants in options.tenants}
        say(f"{kind}: decoding steps of " + ", ".join(f"{ms:.2f} ms ({n})" for n, ms in decode[kind].items()))
    bench.engine.close()
    weights = {kind: bench.weights(kind) for kind in KINDS}
    measured = {"prompt": prompt, "decode": decode, "weights": weights}
    return {"options": asdict(options), "device": bench.device, **measured}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the document; progress goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m routing.bench_prompt", description=__doc__)
    for each in fields(Options):
        name = "--" + each.name.replace("_", "-")
        if each.name == "tenants":
            parser.add_argument(name, type=int, nargs="+", default=each.default)
        else:
            parser.add_argument(name, type=type(each.default), default=each.default)
    given = vars(parser.parse_args(arguments))
    options = Options(**given | {"tenants": tuple(given["tenants"])})

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder), say)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
