"""The engine on its Triton backend, under Triton's interpreter where there is no GPU, against the reference backend;
and steps launched before the tokens of the step before are known: nothing that a client can see may change.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapters_store.pool import PageLease
from adapters_store.types import BASE, GROUPS
from kernels.ops import Mapping, select_ops
from server.engine.batch import BatchBuilder
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.fairness import OUTPUT_PRICE
from server.engine.graphs import GraphSteps
from server.engine.planner import TilePlanner
from server.engine.runner import Runner
from server.engine.scheduler import Chunk
from server.engine.sequence import FinishReason, Output, Request, SamplingParams, Sequence
from server.engine.staging import StepShape, StepViews, fill
from server.model.decoder import Decoder, ForwardBatch
from tests.conftest import HAS_GPU, SEVEN
from tests.engine.test_engine import PROMPTS, Registered, drain, tokens_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, seed=7)
CPU = {"device": "cpu", "kv_memory": 1 << 22, "page_memory": 1 << 22}


class DelayedSteps:
    """The reference backend as a device that alone knows the tokens of the last launch, by row."""

    lookahead = True

    def __init__(self, runner: Runner, block_size: int) -> None:
        self.runner = runner
        self.builder = BatchBuilder(block_size, runner.device)
        self.sampled = torch.full((64,), -1)
        self.rows = 0

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor | None]:
        pending = [chunk.sequence for chunk in chunks if chunk.start >= len(chunk.sequence.tokens)]
        for sequence in pending:
            sequence.tokens.append(max(0, int(self.sampled[sequence.sampled_row])))
        batch = self.builder.build(chunks)
        for sequence in pending:
            sequence.tokens.pop()
        self.rows += len(batch.ids)
        self.sampled.fill_(-1)
        return self.runner.decoder.forward(batch, self.runner.kv_cache, self.runner.pool.tensors), None

    def remember(self, tokens: Tensor) -> None:
        self.sampled[: len(tokens)] = tokens


Make = Callable[..., Engine]


@pytest.fixture
def make(tiny_model: Path) -> Make:
    """`make(ahead, **settings)`: an engine on the CPU, whose host is one step ahead or not."""

    def engine(ahead: bool = True, **options: object) -> Engine:
        config = EngineConfig(str(tiny_model), **{**CPU, **options})  # type: ignore[arg-type]
        made = Engine.from_config(config)
        if ahead:
            made.runner.steps = DelayedSteps(made.runner, config.block_size)
        return made

    return engine


@pytest.fixture
def registered(tiny_model: Path, adapters: dict[str, Path]) -> Registered:
    return Registered(tiny_model, adapters)


def outputs_of(engine: Engine, requests: list[Request]) -> dict[str, list[Output]]:
    for request in requests:
        engine.add_request(request)
    return drain(engine)


def texts(outputs: dict[str, list[Output]]) -> dict[str, tuple[int, ...]]:
    return {name: tokens_of(own) for name, own in outputs.items()}


def count_charges(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Output tokens that each request's tenant is charged for."""
    charges: Counter[str] = Counter()
    queue = engine.scheduler.waiting
    charge = queue.charge

    def counted(sequence: Sequence, tokens: int, price: float) -> None:
        if price == OUTPUT_PRICE:
            charges[sequence.request.id] += tokens
        charge(sequence, tokens, price)

    monkeypatch.setattr(queue, "charge", counted)
    return charges


def test_the_host_is_one_step_ahead(make: Make) -> None:
    engine = make()
    engine.add_request(Request("r", PROMPTS[0], GREEDY))
    assert engine.step() == [], "launched, not committed"
    first = engine.step()
    assert [len(output.tokens) for output in first] == [1]
    assert first[0].timings is not None


def test_mixed_rows_give_the_same_texts(make: Make, registered: Registered) -> None:
    mixes = [{}, {"all4": 1.0}, {"all4": 0.5, "wide24": 0.8}, {"qv16": 1.0, "rslora8": -0.5}]
    requests = []
    for row in range(12):
        mix = registered.mix(mixes[row % 4])
        params = replace(GREEDY if row % 3 else SAMPLED, max_tokens=3 + row)
        requests.append(Request(str(row), PROMPTS[row % 6], params, mix, registered.paths, mix.digest.encode()))
    settings = {"max_num_seqs": 8, "max_batch_tokens": 40}
    assert texts(outputs_of(make(**settings), requests)) == texts(outputs_of(make(False, **settings), requests))


def test_a_late_stop_token_is_not_emitted_or_charged_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts(outputs_of(make(False), [Request("r", PROMPTS[1], GREEDY)]))["r"]
    stop = text[4]
    length = text.index(stop)
    params = replace(GREEDY, stop_token_ids=frozenset({stop}))
    requests = [Request("r", PROMPTS[1], params), Request("other", PROMPTS[2], GREEDY)]
    engine, plain = make(), make(False)
    charges, plain_charges = count_charges(engine, monkeypatch), count_charges(plain, monkeypatch)
    outputs, expected = outputs_of(engine, requests), outputs_of(plain, requests)
    assert texts(outputs) == texts(expected)
    assert tokens_of(outputs["r"]) == text[:length]
    assert [output.finish_reason for output in outputs["r"]] == [None] * length + [FinishReason.STOP]
    assert charges == plain_charges == {"r": length + 1, "other": 12}


def test_an_ended_id_can_be_used_again_at_once(make: Make) -> None:
    """The step that was launched too much belongs to the sequence that ended, not to its successor."""
    engine = make()
    text = texts(outputs_of(make(False), [Request("r", PROMPTS[1], GREEDY)]))["r"]
    params = replace(GREEDY, stop_token_ids=frozenset({text[2]}))
    expected = texts(outputs_of(make(False), [Request("r", PROMPTS[3], GREEDY)]))["r"]
    assert tokens_of(outputs_of(engine, [Request("r", PROMPTS[1], params)])["r"]) == text[: text.index(text[2])]
    assert not engine.has_work
    assert tokens_of(outputs_of(engine, [Request("r", PROMPTS[3], GREEDY)])["r"]) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_max_tokens_is_exact_and_wastes_no_row(make: Make, count: int) -> None:
    engine = make(prefix_cache=False)
    outputs = outputs_of(engine, [Request("r", PROMPTS[1], replace(GREEDY, max_tokens=count))])["r"]
    assert len(tokens_of(outputs)) == count
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert isinstance(engine.runner.steps, DelayedSteps)
    assert engine.runner.steps.rows == len(PROMPTS[1]) + count - 1
    assert sum(rows for _, rows in engine.stats().steps) == engine.runner.steps.rows


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_abort_between_launch_and_commit(make: Make, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request("gone", PROMPTS[2], GREEDY), Request("stays", PROMPTS[3], SAMPLED)]
    expected = texts(outputs_of(make(False), requests))
    engine = make()
    charges = count_charges(engine, monkeypatch)
    for request in requests:
        engine.add_request(request)
    seen = [output for _ in range(steps) for output in engine.step()]
    engine.abort("gone")
    engine.check_integrity()
    rest = drain(engine)
    before = [token for output in seen if output.request_id == "gone" for token in output.tokens]
    assert tuple(before) == expected["gone"][: steps - 1]
    assert [(output.tokens, output.finish_reason) for output in rest["gone"]] == [((), FinishReason.ABORT)]
    assert (
        tokens_of([*(output for output in seen if output.request_id == "stays"), *rest["stays"]]) == expected["stays"]
    )
    assert charges["stays"] == 12


def test_an_id_after_its_abort(make: Make) -> None:
    engine = make()
    engine.add_request(Request("r", PROMPTS[2], GREEDY))
    engine.step()
    engine.abort("r")
    assert [output.finish_reason for output in engine.step()] == [FinishReason.ABORT]
    assert not engine.has_work
    assert engine.stats().kv_used_blocks == 0
    expected = texts(outputs_of(make(False), [Request("r", PROMPTS[1], GREEDY)]))
    assert texts(outputs_of(engine, [Request("r", PROMPTS[1], GREEDY)])) == expected


PARAMS = {
    "presence": replace(GREEDY, presence_penalty=1.5),
    "frequency": replace(SAMPLED, frequency_penalty=0.8),
    "repetition": replace(GREEDY, repetition_penalty=1.3),
    "biased": replace(SAMPLED, logit_bias={5: 4.0, 9: -50.0}),
    "late": replace(GREEDY, ignore_eos=False, min_tokens=6, stop_token_ids=frozenset(range(0, 512, 3))),
    "truncated": replace(SAMPLED, top_k=20, top_p=0.8, min_p=0.02),
    "logprobs": replace(SAMPLED, logprobs=4),
    "chosen only": replace(GREEDY, logprobs=0),
    "plain": GREEDY,
}


def test_every_way_of_sampling_gives_the_same(make: Make) -> None:
    """Rows whose next token needs the last one wait for it, beside rows that do not."""
    requests = [Request(name, PROMPTS[i % 6], params) for i, (name, params) in enumerate(PARAMS.items())]
    ahead, plain = outputs_of(make(), requests), outputs_of(make(False), requests)
    assert texts(ahead) == texts(plain)
    for name in ("logprobs", "chosen only"):
        found, expected = ([p for output in own[name] for p in output.logprobs] for own in (ahead, plain))
        assert len(found) == 12
        for one, other in zip(found, expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert len(tokens_of(ahead["late"])) >= 6


def test_preemption_changes_nothing(make: Make, registered: Registered) -> None:
    roomy = make(False)
    tight = make(max_model_len=80, kv_memory=8 * roomy.runner.block_bytes(16))
    mix = registered.mix({"all4": 0.5, "qv16": 0.5})
    requests = []
    for row in range(10):
        params = replace((SAMPLED, GREEDY, PARAMS["presence"])[row % 3], max_tokens=24, seed=row)
        use = mix if row % 2 else registered.mix({})
        requests.append(Request(str(row), PROMPTS[row % 6], params, use, registered.paths, b"%d" % (row % 2)))
    assert texts(outputs_of(tight, requests)) == texts(outputs_of(roomy, requests))
    assert tight.stats().preemptions > 0
    assert tight.stats().kv_used_blocks == 0


def test_a_row_that_overflows_ends_once(make: Make, registered: Registered) -> None:
    alone = texts(outputs_of(make(False), [Request("fine", PROMPTS[1], GREEDY, registered.mix({}))]))
    huge = registered.mix({"all4": 1e38})
    requests = [Request("huge", PROMPTS[1], GREEDY, huge, registered.paths, b"x"), Request("fine", PROMPTS[1], GREEDY)]
    outputs = outputs_of(make(), requests)
    assert [output.finish_reason for output in outputs["huge"]] == [FinishReason.ERROR]
    assert tokens_of(outputs["fine"]) == alone["fine"]


def test_requests_that_come_and_go(make: Make, registered: Registered) -> None:
    """Arrivals, aborts and stop tokens at random over little memory; each text is a prefix of the text alone."""
    numbers = torch.Generator().manual_seed(3)

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=numbers))

    roomy = make(False)
    engine = make(max_model_len=80, kv_memory=7 * roomy.runner.block_bytes(16), max_num_seqs=6, max_batch_tokens=32)
    names = list(registered.weights)
    requests = []
    for row in range(40):
        use = registered.mix({names[number(4)]: 1.0} if number(3) else {})
        params = replace(list(PARAMS.values())[number(len(PARAMS))], max_tokens=1 + number(20), seed=row)
        if number(2):
            params = replace(params, stop_token_ids=frozenset(range(number(9), 512, 9)))
        requests.append(Request(str(row), PROMPTS[number(6)], params, use, registered.paths, use.digest.encode()))
    expected = texts(outputs_of(roomy, requests))
    seen: dict[str, list[Output]] = {request.id: [] for request in requests}
    coming = list(requests)
    while coming or engine.has_work:
        for _ in range(min(len(coming), number(4))):
            engine.add_request(coming.pop(0))
        if not number(8):
            engine.abort(str(number(40)))
        for output in engine.step():
            seen[output.request_id].append(output)
        engine.check_integrity()
    aborted = {name for name, outputs in seen.items() if outputs[-1].finish_reason is FinishReason.ABORT}
    assert 0 < len(aborted) < 30
    for name, outputs in seen.items():
        assert sum(output.finish_reason is not None for output in outputs) == 1
        found = tuple(token for output in outputs for token in output.tokens)
        assert found == (expected[name][: len(found)] if name in aborted else expected[name])
    assert engine.stats().preemptions > 0
    assert engine.stats().pages["used"] == 0


# The Triton backend.

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
MICRO = {"kv_memory": 1 << 17, "page_memory": 1 << 19, "max_num_seqs": 4, "max_batch_tokens": 16}
interpreted = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
"""The interpreter makes its run-time loop bounds of arrays with one element."""


@pytest.fixture(scope="module")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So small that the interpreter takes a fraction of a second for a step."""
    folder = tmp_path_factory.mktemp("model") / "micro"
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes, **layers, **tokens)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def micro(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    """Two adapters that differ in rank and targets."""
    folders = {}
    for name, rank, targets in (("all4", 4, SEVEN), ("qv20", 20, ["q_proj", "v_proj"])):
        torch.manual_seed(rank)
        base = AutoModelForCausalLM.from_pretrained(micro_model, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
    return Registered(micro_model, folders)


def micro_engine(folder: Path, backend: str, **settings: object) -> Engine:
    options = {**MICRO, "device": DEVICE.type, "backend": backend, "cuda_graphs": "lazy", **settings}
    return Engine.from_config(EngineConfig(str(folder), **options))  # type: ignore[arg-type]


def micro_requests(micro: Registered) -> list[Request]:
    """Base, one adapter, and a mixture; greedy, drawn, and penalised with log-probabilities."""
    ways = (
        ({}, replace(GREEDY, max_tokens=4)),
        ({"all4": 1.0}, replace(SAMPLED, max_tokens=3)),
        ({"all4": 0.6, "qv20": -0.8}, replace(GREEDY, max_tokens=2, presence_penalty=1.0, logprobs=2)),
    )
    prompts = ((5, 9, 11), (7, 3, 30, 31, 8), tuple(range(2, 20)))
    return [
        Request(str(row), prompt, params, micro.mix(mix), micro.paths, b"%d" % row)
        for row, (prompt, (mix, params)) in enumerate(zip(prompts, ways, strict=True))
    ]


@interpreted
def test_the_triton_backend_equals_the_reference(micro_model: Path, micro: Registered) -> None:
    """A prompt longer than a step's budget is cut, and rows that decode share steps with it."""
    engine = micro_engine(micro_model, "triton")
    assert isinstance(engine.runner.steps, GraphSteps)
    assert engine.runner.lookahead
    found = outputs_of(engine, micro_requests(micro))
    expected = outputs_of(micro_engine(micro_model, "reference"), micro_requests(micro))
    assert texts(found) == texts(expected)
    assert len(set(texts(found).values())) == 3
    pairs = [[p for output in outputs["2"] for p in output.logprobs] for outputs in (found, expected)]
    assert [p.logprob for p in pairs[0]] == pytest.approx([p.logprob for p in pairs[1]], abs=1e-4)
    assert engine.stats().kv_used_blocks == 0
    if not HAS_GPU:
        assert engine.runner.steps.eager_steps == 4


@interpreted
def test_preemption_and_late_stops_on_triton(micro_model: Path) -> None:
    """KV for two short sequences; the text of one ends before max_tokens."""
    params = replace(GREEDY, max_tokens=5)
    requests = [Request(str(i), tuple(range(3 + i, 6 + i)), params, cache_key=b"%d" % i) for i in range(3)]
    roomy = micro_engine(micro_model, "reference", block_size=4)
    text = texts(outputs_of(roomy, requests))["1"]
    requests[1] = replace(requests[1], params=replace(params, stop_token_ids=frozenset({text[2]})))
    expected = outputs_of(roomy, requests)
    block = roomy.runner.block_bytes(4)
    tight = micro_engine(micro_model, "triton", block_size=4, max_model_len=8, kv_memory=3 * block)
    found = outputs_of(tight, requests)
    assert texts(found) == texts(expected)
    assert len(texts(found)["1"]) == text.index(text[2])
    assert tight.stats().preemptions > 0


class FakeStream:
    def wait_stream(self, other: object) -> None:
        """Work on a CPU is done when it is launched."""


class FakeGraph:
    """A graph on a CPU: it keeps the call that was made while it was being captured, and makes it again."""

    capturing: "FakeGraph | None" = None

    def __init__(self) -> None:
        self.work: Callable[[], None] = lambda: None
        self.replays = 0

    def capture_begin(self, pool: object) -> None:
        assert pool is not None
        FakeGraph.capturing = self

    def capture_end(self) -> None:
        FakeGraph.capturing = None

    def replay(self) -> None:
        self.replays += 1
        self.work()


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = GraphSteps._run

    def captured(steps: GraphSteps, *arguments: Any) -> None:
        if FakeGraph.capturing is None:
            run(steps, *arguments)
        else:
            FakeGraph.capturing.work = partial(run, steps, *arguments)

    monkeypatch.setattr(GraphSteps, "_run", captured)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStream())
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # padding rows compute with memory that nothing was written to
@pytest.mark.skipif(HAS_GPU, reason="a GPU has graphs of its own")
@pytest.mark.usefixtures("fake_graphs")
def test_capturing_a_graph_between_steps_changes_nothing(micro_model: Path, micro: Registered) -> None:
    """Each step needs another graph than the one before, whose tokens the host does not know yet."""
    requests = [
        Request("0", (5, 9, 11), replace(GREEDY, max_tokens=5)),
        Request("1", (6, 4), replace(GREEDY, max_tokens=4)),
        Request("2", (8, 2, 7), replace(GREEDY, max_tokens=2), micro.mix({"qv20": 1.0}), micro.paths, b"qv"),
    ]
    engine = micro_engine(micro_model, "triton", max_num_seqs=3, max_batch_tokens=12)
    steps = engine.runner.steps
    assert isinstance(steps, GraphSteps)
    steps.use_graphs = True
    found = texts(outputs_of(engine, requests))
    assert steps.num_graphs >= 4
    assert steps.eager_steps == 0
    assert found == texts(outputs_of(micro_engine(micro_model, "reference"), requests))


# A router inside the model.

PAGES = 3
LARGEST = 12


@dataclass
class BufferGate:
    """A gate whose values lie in device memory: fp32[layers, targets, rows, pages] by group."""

    values: dict[str, Tensor]

    def scale(self, layer: int, group: str, x: Tensor, mapping: Mapping) -> Tensor | None:
        if group == "o":
            return None
        values = self.values[group][layer, :, : len(x)]
        if isinstance(mapping.pages, Tensor):
            return values.index_select(2, mapping.pages.clamp(min=0))
        return values[:, :, list(mapping.pages)].contiguous()


@dataclass
class Gated:
    """One model, random pages, and a step of decoding rows beside a prompt, for any backend."""

    folder: Path
    chunks: list[Chunk]
    gate: BufferGate
    pages: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def random(cls, folder: Path) -> "Gated":
        decoder = Decoder.from_folder(folder, DEVICE, torch.float32)
        shape, layers = decoder.config.linear_shape, decoder.config.num_layers
        pages, values = {}, {}
        for group in GROUPS:
            targets = len(group.targets)
            a = torch.randn(layers, PAGES, 16 * targets, shape.group_input(group), device=DEVICE) / 8
            pages[group.name] = a, torch.randn(layers, PAGES, 16, sum(shape.group_outputs(group)), device=DEVICE) / 4
            values[group.name] = torch.randn(layers, targets, LARGEST, PAGES, device=DEVICE).relu()
        uses = ((0, 2), (), (1,), (2, 1))
        chunks = [cls._chunk(number, own) for number, own in enumerate(uses)]
        return cls(folder, chunks, BufferGate(values), pages)

    @staticmethod
    def _chunk(number: int, pages: tuple[int, ...]) -> Chunk:
        uses = (pages, tuple(0.5 + page for page in pages), (16,) * len(pages))
        pages_by, weights_by, ranks_by = ({group.name: use for group in GROUPS} for use in uses)
        sequence = Sequence.of(Request("r", tuple(range(3 + number, 7 + number)), GREEDY))
        sequence.blocks = [3 - number]
        sequence.lease = PageLease(BASE, pages_by, weights_by, ranks_by, ())
        return Chunk(sequence, 0, 1 if number < 2 else 4, samples=True)

    def cache(self, decoder: Decoder) -> list[tuple[Tensor, Tensor]]:
        shape = (4, 16, decoder.config.num_kv_heads, decoder.config.head_dim)
        return [(torch.zeros(shape, device=DEVICE), torch.zeros(shape, device=DEVICE)) for _ in decoder.layers]

    def reference(self, gate: BufferGate | None) -> Tensor:
        decoder = Decoder.from_folder(self.folder, DEVICE, torch.float32, select_ops(DEVICE, "reference"))
        batch = BatchBuilder(16, DEVICE).build(self.chunks)
        batch.router = gate
        return decoder.forward(batch, self.cache(decoder), self.pages)

    def triton(self) -> tuple[Decoder, ForwardBatch]:
        decoder = Decoder.from_folder(self.folder, DEVICE, torch.float32, select_ops(DEVICE, "triton"))
        rows = sum(chunk.num_tokens for chunk in self.chunks)
        tiles = TilePlanner().plan(self.chunks, 16)
        shape = StepShape(rows, 2, 2, 4, tuple((group, plan.shape) for group, plan in tiles.plans.items()))
        words = torch.zeros(shape.words + 4, dtype=torch.int32)
        fill(words.numpy(), shape, self.chunks, {group: tiles.words(group, own) for group, own in shape.tiles}, 16)
        views = StepViews.of(words.to(DEVICE), shape, 16, 64)
        ids = views.ids.long()
        return decoder, ForwardBatch(ids, views.positions, views.attention, views.mappings, views.logit_rows, self.gate)


@interpreted
@torch.inference_mode()
def test_a_gate_in_device_memory_equals_the_reference(micro_model: Path) -> None:
    gated = Gated.random(micro_model)
    expected = gated.reference(gated.gate)
    assert (gated.reference(None) - expected).abs().max() > 0.1
    decoder, batch = gated.triton()
    torch.testing.assert_close(
        decoder.forward(batch, gated.cache(decoder), gated.pages), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.gpu
@torch.inference_mode()
def test_a_captured_gate_reads_its_buffers_anew(micro_model: Path) -> None:
    gated = Gated.random(micro_model)
    decoder, batch = gated.triton()
    cache = gated.cache(decoder)
    decoder.forward(batch, cache, gated.pages)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        logits = decoder.forward(batch, cache, gated.pages)
    seen = []
    for seed in range(3):
        torch.manual_seed(seed)
        for values in gated.gate.values.values():
            values.normal_().relu_()
        logits.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(logits, gated.reference(gated.gate), atol=1e-4, rtol=1e-4)
        seen.append(logits.clone())
    assert (seen[0] - seen[1]).abs().max() > 0.1
