"""LoRA in the decoder: single adapters against PEFT, mixtures and routers against sums of products in plain torch."""

import copy
import math
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from adapters_store.types import GROUP_OF, GROUPS, PAGE_RANK, TARGETS, LinearShape, LoraPair
from kernels import tiles
from kernels.mapping import Mapping as PageMapping
from server.model.decoder import Decoder
from tests.model.conftest import CPU, Driver, PageWriter, Saved, merge_uses

Pairs = Mapping[tuple[int, str], LoraPair]
TOKENS = [(11 * i * i + 5 * i + 3) % 90 + 3 for i in range(30)]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
# Page ids far apart and out of order, so that blocks are gathered as well as sliced.
ORDER = random.Random(5).sample(range(40), 40)


def random_pairs(shape: LinearShape, seed: int, rank: int, targets: tuple[str, ...] = TARGETS) -> Pairs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) / size[1] ** 0.5

    return {
        (layer, target): LoraPair(
            normal(rank, shape.inputs[target]), normal(shape.outputs[target], rank), 1.0 + seed / 4
        )
        for layer in range(shape.num_layers)
        for target in targets
    }


def linears(model: Any) -> dict[tuple[int, str], torch.nn.Linear]:
    return {
        (i, target): getattr(layer.mlp if hasattr(layer.mlp, target) else layer.self_attn, target)
        for i, layer in enumerate(model.model.layers)
        for target in TARGETS
    }


@contextmanager
def sum_of_products(
    saved: Saved, mix: list[tuple[Pairs, float]], factor: Callable[..., Tensor | float] | None = None
) -> Any:
    """The transformers model with y += weight * scale * factor * B A x for every pair, in plain torch."""

    def add(key: tuple[int, str], _module: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        for number, (pairs, weight) in enumerate(mix):
            if key in pairs:
                pair = pairs[key]
                extra = 1.0 if factor is None else factor(*key, number, inputs[0])
                y = y + weight * pair.scale * extra * (inputs[0] @ pair.a.T @ pair.b.T)
        return y

    with ExitStack() as stack:
        for key, linear in linears(saved.model).items():
            stack.callback(linear.register_forward_hook(partial(add, key)).remove)
        yield


@pytest.fixture
def qwen(saved: Callable[[str], Saved]) -> Saved:
    return saved("qwen2")


@pytest.fixture
def driver(qwen: Saved) -> Driver:
    return Driver(Decoder.from_folder(qwen.folder, CPU, torch.float32))


@pytest.fixture
def writer(driver: Driver) -> PageWriter:
    return PageWriter(driver, ORDER)


def test_the_pages_of_adapters_have_the_rank_that_the_kernels_read() -> None:
    assert PAGE_RANK == tiles.PAGE_RANK


PEFT_CASES = {
    "all-linears": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 8, "lora_alpha": 12, "use_rslora": True},
    "two-pages": {"r": 24, "lora_alpha": 10},
    "query-value": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "up-down-first-layer": {
        "r": 3,
        "lora_alpha": 9,
        "target_modules": ["up_proj", "down_proj"],
        "layers_to_transform": [0],
    },
}


@pytest.mark.parametrize("variant", ["llama-biases", "mistral-window", "qwen2", "qwen3"])
@pytest.mark.parametrize("case", PEFT_CASES)
def test_one_adapter_equals_peft(saved: Callable[[str], Saved], variant: str, case: str) -> None:
    base = saved(variant)
    config = LoraConfig(**{"target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **PEFT_CASES[case]})
    model = get_peft_model(copy.deepcopy(base.model), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pairs = {
        key: LoraPair(linear.lora_A["default"].weight, linear.lora_B["default"].weight, linear.scaling["default"])
        for key, linear in linears(model.base_model.model).items()
        if hasattr(linear, "lora_A")
    }
    driver = Driver(Decoder.from_folder(base.folder, CPU, torch.float32))
    with torch.no_grad():
        row = driver.add(PageWriter(driver, ORDER).write(pairs))
    expected = Saved(base.folder, model).logits(TOKENS)
    assert (expected - base.logits(TOKENS)).abs().max() > 0.1
    [prefill] = driver.step([(row, TOKENS[:20])])
    decoded = [driver.step([(row, [token])])[0] for token in TOKENS[20:]]
    torch.testing.assert_close(torch.cat([prefill, *decoded]), expected, **TOLERANCE)


class TestBatches:
    """Many rows with different pages in the same steps, each against its own plain computation."""

    def run(
        self, saved: Saved, driver: Driver, mixes: list[list[tuple[Pairs, float]]], uses: list[dict[str, Any]]
    ) -> None:
        numbers = [driver.add(use) for use in uses]
        prompts = [[(token + 7 * row) % 90 + 3 for token in TOKENS[: 6 + 5 * row % 23]] for row in numbers]
        answers = [[(3 * token + row) % 90 + 3 for token in TOKENS[:5]] for row in numbers]
        got = [list(logits) for logits in zip(driver.step(list(zip(numbers, prompts, strict=True))), strict=True)]
        for i in range(5):
            step = driver.step([(row, [answer[i]]) for row, answer in zip(numbers, answers, strict=True)])
            for logits, new in zip(got, step, strict=True):
                logits.append(new)
        for logits, prompt, answer, mix in zip(got, prompts, answers, mixes, strict=True):
            with sum_of_products(saved, mix):
                torch.testing.assert_close(torch.cat(logits), saved.logits(prompt + answer), **TOLERANCE)

    def test_mixed_ranks_and_base_rows(self, qwen: Saved, driver: Driver, writer: PageWriter) -> None:
        shape = driver.decoder.config.linear_shape
        adapters = [random_pairs(shape, seed, rank) for seed, rank in enumerate((4, 8, 16, 24, 64))]
        uses = [writer.write(pairs) for pairs in adapters]
        self.run(qwen, driver, [[], *([(pairs, 1.0)] for pairs in adapters), []], [{}, *uses, {}])

    def test_any_number_of_adapters_a_row_and_negative_weights(
        self, qwen: Saved, driver: Driver, writer: PageWriter
    ) -> None:
        shape = driver.decoder.config.linear_shape
        targets = (TARGETS, ("q_proj", "v_proj"), ("down_proj",), ("k_proj", "o_proj", "gate_proj"))
        adapters = [random_pairs(shape, seed, 4 + 3 * seed, targets[seed % 4]) for seed in range(8)]
        written = [writer.write(pairs) for pairs in adapters]
        mixes, uses = [], []
        for count in range(9):
            weights = [(0.6, -0.4, 0.25, 1.0)[i % 4] for i in range(count)]
            mixes.append(list(zip(adapters, weights, strict=False)))
            scaled = [
                {group: [(page, scale * weight) for page, scale in pages] for group, pages in use.items()}
                for use, weight in zip(written, weights, strict=False)
            ]
            uses.append(merge_uses(*scaled))
        self.run(qwen, driver, mixes, uses)

    def test_rows_of_one_mixture_of_three(self, qwen: Saved, driver: Driver, writer: PageWriter) -> None:
        shape = driver.decoder.config.linear_shape
        mix = [(random_pairs(shape, seed, 16), weight) for seed, weight in enumerate((0.5, 0.7, -0.3))]
        use = merge_uses(*(writer.write(pairs, weight) for pairs, weight in mix))
        self.run(qwen, driver, [mix] * 6, [use] * 6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_pages_of_others_never_reach_a_row(qwen: Saved, driver: Driver, poison: float) -> None:
    shape = driver.decoder.config.linear_shape
    writer = PageWriter(driver, list(range(40)))
    pairs = random_pairs(shape, 1, 8)
    own, foreign, stale = writer.write(pairs), writer.write(random_pairs(shape, 2, 8)), writer.write(pairs)
    last = writer.write(pairs)
    for group in GROUPS:
        for part in driver.pages[group.name]:
            for use in (foreign, stale):
                part[:, use[group.name][0][0]] = poison
    victim, broken, plain, other = (driver.add(use) for use in (own, foreign, None, last))
    logits = driver.step([(row, TOKENS[:9]) for row in (victim, broken, plain, other)])
    for token in TOKENS[9:12]:
        new = driver.step([(row, [token]) for row in (victim, broken, plain, other)])
        logits = [torch.cat(parts) for parts in zip(logits, new, strict=True)]
    assert not logits[1].isfinite().any()
    torch.testing.assert_close(logits[2], qwen.logits(TOKENS[:12]), **TOLERANCE)
    with sum_of_products(qwen, [(pairs, 1.0)]):
        expected = qwen.logits(TOKENS[:12])
    torch.testing.assert_close(logits[0], expected, **TOLERANCE)
    torch.testing.assert_close(logits[3], expected, **TOLERANCE)


def gate(layer: int, target: str, page: int, x: Tensor) -> Tensor:
    """An arbitrary function of layer, target, page and x [..., in]; 0 for some."""
    index = GROUP_OF[target].targets.index(target)
    open_ = (layer + index + page) % 3 > 0
    return open_ * torch.sin(1.3 * layer + 0.7 * index + 0.9 * page + 2.0 * x.mean(-1, keepdim=True))


class SineRouter:
    """Returns `gate`, but leaves the group o alone."""

    def scale(self, layer: int, group: str, x: Tensor, mapping: PageMapping) -> Tensor | None:
        if group == "o":
            return None
        [targets] = [g.targets for g in GROUPS if g.name == group]
        gates = [[gate(layer, target, page, x) for page in mapping.pages] for target in targets]
        return torch.stack([torch.cat(pages, dim=-1) for pages in gates])


def test_a_router_inside_the_model_equals_plain_torch(qwen: Saved, driver: Driver, writer: PageWriter) -> None:
    shape = driver.decoder.config.linear_shape
    adapters = [random_pairs(shape, seed, rank) for seed, rank in enumerate((4, 16, 9, 12))]
    uses = [writer.write(pairs) for pairs in adapters]
    numbers = [driver.add(merge_uses(*uses[:3])), driver.add(merge_uses(uses[1], uses[3])), driver.add(uses[0])]
    mixes = [[0, 1, 2], [1, 3], [0]]
    prompts = [TOKENS[:18], TOKENS[3:8], TOKENS[4:24]]
    logits = driver.step(list(zip(numbers, prompts, strict=True)), SineRouter())
    for token in (5, 50, 20):
        new = driver.step([(row, [token]) for row in numbers], SineRouter())
        logits = [torch.cat(parts) for parts in zip(logits, new, strict=True)]

    def factor(chosen: list[int], layer: int, target: str, number: int, x: Tensor) -> Tensor | float:
        [(page, _)] = uses[chosen[number]][GROUP_OF[target].name]
        return 1.0 if target == "o_proj" else gate(layer, target, page, x)

    for got, prompt, chosen in zip(logits, prompts, mixes, strict=True):
        mix = [(adapters[i], 1.0) for i in chosen]
        with sum_of_products(qwen, mix, partial(factor, chosen)):
            expected = qwen.logits([*prompt, 5, 50, 20])
        with sum_of_products(qwen, mix):
            assert (qwen.logits([*prompt, 5, 50, 20]) - expected).abs().max() > 0.1
        torch.testing.assert_close(got, expected, **TOLERANCE)


def test_a_row_among_many_equals_the_row_alone(qwen: Saved) -> None:
    decoder = Decoder.from_folder(qwen.folder, CPU, torch.float32)
    shape = decoder.config.linear_shape
    logits = []
    for neighbours in (0, 31):
        driver = Driver(decoder, num_blocks=400)
        writer = PageWriter(driver, ORDER)
        uses = [writer.write(random_pairs(shape, seed, 5 + 3 * seed)) for seed in range(5)]
        rows = [driver.add(uses[3]), *(driver.add(uses[i % 5]) for i in range(neighbours))]
        got = driver.step([(row, TOKENS[: 7 + row % 5]) for row in rows])[0]
        for token in TOKENS[7:13]:
            got = torch.cat([got, driver.step([(row, [token]) for row in rows])[0]])
        logits.append(got)
    assert math.isfinite(logits[0].sum().item())
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
