"""Token-level routing through the whole engine, against MeteoRA's formulas over the `transformers` model."""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters_store.types import BASE, GROUP_OF, TARGETS, LoraPair, Mix
from routing.card_adapters import CardAdapter
from routing.gate_folder import GateCard, write_gates
from server.engine.config import EngineConfig, RequestError
from server.engine.engine import Engine
from server.engine.gates import GateUse
from server.engine.router_bank import KEPT
from server.engine.sequence import FinishReason, Request, SamplingParams
from server.model.config import ModelConfig
from tests.conftest import MakeAdapter
from tests.engine.test_engine import GREEDY, PROMPTS, SMALL, Registered, drain, tokens_of

FACTORY = "routing.token_router:TokenGateFactory"
TOLERANCE = 1e-3
"""Every gate of a later layer magnifies what rounding did to its input: differences were 4e-4 at most, mostly 1e-5."""
Gates = Mapping[tuple[int, str], Tensor]
Pairs = Mapping[tuple[int, str], LoraPair]


@dataclass(frozen=True)
class Routed:
    """A router's folder over registered adapters, and its gates."""

    folder: Path
    names: tuple[str, ...]
    digests: tuple[str, ...]
    gates: Gates
    null: bool

    def use(self, top_k: int = 2, temperature: float = 1.0, only: tuple[str, ...] | None = None) -> GateUse:
        rows = (
            digest if only is None or name in only else None
            for name, digest in zip(self.names, self.digests, strict=True)
        )
        return GateUse(self.folder.name, str(self.folder), tuple(rows), top_k, temperature, self.null)


def make_router(folder: Path, model: Path, known: Registered, names: tuple[str, ...], seed: int, null: bool) -> Routed:
    shape = ModelConfig.from_folder(model).linear_shape
    generator = torch.Generator().manual_seed(seed)
    rows = len(names) + null
    gates = {
        (layer, target): torch.randn(rows, shape.inputs[target], generator=generator) * 0.4
        for layer in range(shape.num_layers)
        for target in TARGETS
    }
    digests = tuple(known.weights[name].digest for name in names)
    adapters = tuple(
        CardAdapter(f"{i}-{name}", digest) for i, (name, digest) in enumerate(zip(names, digests, strict=True))
    )
    fingerprint = ModelConfig.from_folder(model).fingerprint()
    write_gates(folder, GateCard(fingerprint, "tiny", adapters, TARGETS, 2, 1.0, null, ""), gates)
    return Routed(folder, names, digests, gates, null)


@pytest.fixture
def registered(tiny_model: Path, adapters: dict[str, Path]) -> Registered:
    return Registered(tiny_model, adapters)


@pytest.fixture
def router(tiny_model: Path, registered: Registered, tmp_path: Path) -> Routed:
    return make_router(tmp_path / "router", tiny_model, registered, tuple(sorted(registered.weights)), 3, True)


def gated_engine(model: Path, **settings: Any) -> Engine:
    return Engine.from_config(EngineConfig(str(model), gates=FACTORY, **{**SMALL, **settings}))


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return gated_engine(tiny_model)


def weights_of(x: Tensor, gate: Tensor, use: GateUse) -> list[dict[int, float]]:
    """By token the chosen rows of the gate and their weights."""
    found = []
    for token in x:
        logits = {row: float(gate[row] @ token) for row, may in enumerate(use.allowed) if may}
        chosen = sorted(logits, key=lambda row: -logits[row])[: use.top_k]
        powers = torch.tensor([logits[row] / use.temperature for row in chosen]).softmax(dim=0).tolist()
        found.append(dict(zip(chosen, powers, strict=True)))
    return found


class Plain:
    """MeteoRA over a `transformers` model, token by token and linear by linear."""

    def __init__(self, folder: Path, known: Registered, router: Routed) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.router = router
        self.pairs: list[Pairs] = [known.weights[name].pairs for name in router.names]
        self.shares: list[Tensor] = []

    @contextmanager
    def routed(self, use: GateUse) -> Iterator[None]:
        self.shares = []
        with ExitStack() as stack:
            for layer, block in enumerate(self.model.model.layers):
                for target in TARGETS:
                    linear = getattr(block.mlp if hasattr(block.mlp, target) else block.self_attn, target)
                    hook = partial(self._add, (layer, target), use)
                    stack.callback(linear.register_forward_hook(hook).remove)
            yield

    def _add(self, key: tuple[int, str], use: GateUse, _: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        x, rows = inputs[0][0], []
        shares = torch.zeros(len(x), len(use.allowed))
        for token, chosen in enumerate(weights_of(x, self.router.gates[key], use)):
            delta = torch.zeros(y.shape[-1])
            for row, weight in chosen.items():
                shares[token, row] = weight
                pair = self.pairs[row].get(key) if row < len(self.pairs) else None
                if pair is not None:
                    delta += weight * pair.scale * (pair.b.float() @ (pair.a.float() @ x[token]))
            rows.append(delta)
        usable = [pairs for row, pairs in zip(use.rows, self.pairs, strict=True) if row is not None]
        if any(GROUP_OF[target] is GROUP_OF[key[1]] for pairs in usable for _, target in pairs):
            self.shares.append(shares)
        return y + torch.stack(rows)

    def greedy(self, prompt: tuple[int, ...], use: GateUse, count: int) -> tuple[tuple[int, ...], list[float], Tensor]:
        """Tokens, their log-probabilities, and shares [count, n] of the rows that they were sampled from."""
        tokens, scores, shares = list(prompt), [], []
        with torch.inference_mode(), self.routed(use):
            for _ in range(count):
                self.shares = []
                logits = self.model(torch.tensor([tokens])).logits[0, -1].log_softmax(dim=0)
                tokens.append(int(logits.argmax()))
                scores.append(float(logits.max()))
                shares.append(torch.stack(self.shares).mean(dim=0)[-1])
        return tuple(tokens[len(prompt) :]), scores, torch.stack(shares)


@pytest.fixture
def plain(tiny_model: Path, registered: Registered, router: Routed) -> Plain:
    return Plain(tiny_model, registered, router)


def request(
    name: str, prompt: tuple[int, ...], known: Registered, use: GateUse | None, params: SamplingParams = GREEDY
) -> Request:
    rows = sorted({row for row in use.rows if row is not None}) if use is not None else []
    return Request(name, prompt, params, Mix(tuple((row, 1.0) for row in rows)), known.paths, gates=use)


SCORED = replace(GREEDY, logprobs=0, max_tokens=6)


def assert_equals_plain(outputs: list[Any], plain: Plain, prompt: tuple[int, ...], use: GateUse) -> None:
    tokens, scores, shares = plain.greedy(prompt, use, SCORED.max_tokens)
    assert tokens_of(outputs) == tokens
    assert [output.logprobs[0].logprob for output in outputs] == pytest.approx(scores, abs=TOLERANCE)
    assert torch.tensor([output.shares for output in outputs]) == pytest.approx(shares, abs=TOLERANCE)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (2, 15.0), (3, 0.3), (8, 2.0)])
def test_one_request_equals_the_formulas(
    engine: Engine, plain: Plain, router: Routed, registered: Registered, top_k: int, temperature: float
) -> None:
    use = router.use(top_k, temperature)
    engine.add_request(request("r", PROMPTS[2], registered, use, SCORED))
    assert_equals_plain(drain(engine)["r"], plain, PROMPTS[2], use)


def test_masked_adapters_are_never_chosen(engine: Engine, plain: Plain, router: Routed, registered: Registered) -> None:
    use = router.use(3, only=router.names[1:3])
    engine.add_request(request("r", PROMPTS[1], registered, use, SCORED))
    outputs = drain(engine)["r"]
    assert_equals_plain(outputs, plain, PROMPTS[1], use)
    assert all(output.shares[0] == output.shares[3] == 0 for output in outputs)


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batch_tokens": 8, "max_num_seqs": 8}, {"kv_memory": 24 * 3072, "block_size": 4, "max_model_len": 64}],
)
def test_all_kinds_of_rows_share_batches_and_survive_chunks_and_preemption(
    tiny_model: Path, plain: Plain, router: Routed, registered: Registered, tmp_path: Path, settings: dict[str, Any]
) -> None:
    engine = gated_engine(tiny_model, **settings)
    other = make_router(tmp_path / "other", tiny_model, registered, router.names[::-1][:3], 8, False)
    both = {"router": (plain, router), "other": (Plain(tiny_model, registered, other), other)}
    asked: dict[str, tuple[str, tuple[int, ...], GateUse]] = {}
    for number, prompt in enumerate(PROMPTS):
        for which, (_, own) in both.items():
            use = own.use(1 + number % 3, (1.0, 4.0)[number % 2], own.names[number % 2 :])
            asked[f"{which}-{number}"] = (which, prompt, use)
    names = [*asked, *(f"base-{number}" for number in range(len(PROMPTS)))]
    random.Random(1).shuffle(names)
    for name in names:
        if name in asked:
            _, prompt, use = asked[name]
            engine.add_request(request(name, prompt, registered, use, SCORED))
        else:
            engine.add_request(request(name, PROMPTS[int(name[-1])], registered, None, SCORED))
    outputs = drain(engine)
    assert engine.scheduler.preemptions > 0 or "kv_memory" not in settings
    for name, (which, prompt, use) in asked.items():
        assert_equals_plain(outputs[name], both[which][0], prompt, use)
    alone = gated_engine(tiny_model)
    for name in names:
        if name not in asked:
            alone.add_request(request(name, PROMPTS[int(name[-1])], registered, None, SCORED))
            assert tokens_of(drain(alone)[name]) == tokens_of(outputs[name])


def test_the_prefix_cache_tells_routers_and_their_options_apart(
    engine: Engine, plain: Plain, router: Routed, registered: Registered
) -> None:
    prompt = PROMPTS[5]
    uses = [router.use(2), router.use(1), router.use(2, 7.0), router.use(2, only=router.names[:2]), router.use(2)]
    cached = []
    for number, use in enumerate(uses):
        engine.add_request(request(str(number), prompt, registered, use, SCORED))
        outputs = drain(engine)[str(number)]
        assert_equals_plain(outputs, plain, prompt, use)
        cached.append(outputs[0].cached_tokens)
    assert cached[:4] == [0, 0, 0, 0]
    assert cached[4] == len(prompt) // 16 * 16


def test_shares_do_not_depend_on_the_neighbours(
    engine: Engine, plain: Plain, router: Routed, registered: Registered
) -> None:
    """Alone an adapter of q and v is routed in no other linears; beside another one all linears are."""
    use = router.use(1, only=("qv16",))
    engine.add_request(request("r", PROMPTS[1], registered, use, SCORED))
    alone = drain(engine)["r"]
    assert_equals_plain(alone, plain, PROMPTS[1], use)
    engine.add_request(request("r", PROMPTS[1], registered, use, SCORED))
    engine.add_request(request("other", PROMPTS[2], registered, router.use(), SCORED))
    assert_equals_plain(drain(engine)["r"], plain, PROMPTS[1], use)


def test_temperatures_at_both_ends(engine: Engine, plain: Plain, router: Routed, registered: Registered) -> None:
    """As it falls to 0 only the best row counts, as it grows all chosen rows count alike; nothing overflows."""
    for number, (temperature, same) in enumerate(
        ((1e-300, router.use(1)), (1e-38, router.use(1)), (3e38, router.use(2, 1e5)), (1e300, router.use(2, 1e5)))
    ):
        use = router.use(2, temperature)
        engine.add_request(request(str(number), PROMPTS[1], registered, use, SCORED))
        assert_equals_plain(drain(engine)[str(number)], plain, PROMPTS[1], same)


def test_an_adapter_that_does_nothing_is_a_row_like_others(
    engine: Engine, tiny_model: Path, registered: Registered, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Its scale is 0, so that the mapping has no columns for its pages."""
    known = Registered(tiny_model, {"zero": make_adapter("zero", lora_alpha=0), "all4": make_adapter("all4", seed=10)})
    with_zero = make_router(tmp_path / "zero", tiny_model, known, ("zero", "all4"), 5, False)
    engine.add_request(request("r", PROMPTS[0], known, with_zero.use(2), SCORED))
    engine.add_request(request("base", PROMPTS[1], registered, None, SCORED))
    assert_equals_plain(drain(engine)["r"], Plain(tiny_model, known, with_zero), PROMPTS[0], with_zero.use(2))


def test_gates_of_another_number_of_rows_are_refused(engine: Engine, router: Routed, registered: Registered) -> None:
    use = replace(router.use(), rows=router.use().rows[:2])
    engine.add_request(request("r", PROMPTS[0], registered, use))
    (output,) = drain(engine)["r"]
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "router_unavailable")
    assert "5 rows, expected 3" in (output.error or "")


def test_two_rows_may_name_the_same_adapter(
    engine: Engine, tiny_model: Path, registered: Registered, tmp_path: Path
) -> None:
    name = sorted(registered.weights)[0]
    twice = make_router(tmp_path / "twice", tiny_model, registered, (name, name), 5, False)
    engine.add_request(request("r", PROMPTS[0], registered, twice.use(2), SCORED))
    assert_equals_plain(drain(engine)["r"], Plain(tiny_model, registered, twice), PROMPTS[0], twice.use(2))


def test_routers_that_nobody_uses_are_forgotten(
    engine: Engine, tiny_model: Path, registered: Registered, tmp_path: Path
) -> None:
    for number in range(KEPT + 2):
        one = make_router(tmp_path / str(number), tiny_model, registered, ("all4", "qv16"), number, False)
        engine.add_request(request(str(number), PROMPTS[0], registered, one.use()))
        if number % 2:
            engine.abort(str(number))
        drain(engine)
    gates = engine.arrivals.gates
    assert gates is not None
    assert len(gates) == KEPT


def test_a_request_ends_while_its_gates_are_read(engine: Engine, router: Routed, registered: Registered) -> None:
    registered.load(engine)
    engine.add_request(request("r", PROMPTS[0], registered, router.use()))
    engine.check_integrity()
    engine.abort("r")
    (output,) = drain(engine)["r"]
    assert output.finish_reason is FinishReason.ABORT


def test_gates_that_cannot_be_read_end_their_requests_alone(
    engine: Engine, router: Routed, registered: Registered
) -> None:
    broken = replace(router.use(), digest="lost", path=str(router.folder / "nowhere"))
    engine.add_request(request("lost", PROMPTS[0], registered, broken))
    engine.add_request(request("base", PROMPTS[0], registered, None))
    outputs = drain(engine)
    assert len(tokens_of(outputs["base"])) == GREEDY.max_tokens
    (output,) = outputs["lost"]
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "router_unavailable")
    assert "router.json" in (output.error or "")


def test_an_engine_without_gates_refuses(tiny_model: Path, router: Routed, registered: Registered) -> None:
    engine = Engine.from_config(EngineConfig(str(tiny_model), **SMALL))
    with pytest.raises(RequestError, match="no token-level routers"):
        engine.add_request(request("r", PROMPTS[0], registered, router.use()))
    assert not engine.has_work


def test_a_base_request_has_no_shares(engine: Engine) -> None:
    engine.add_request(Request("r", PROMPTS[0], GREEDY, BASE))
    assert {output.shares for output in drain(engine)["r"]} == {()}
