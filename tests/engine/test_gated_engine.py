"""Token-level routing through the whole engine, against MeteoRA's formulas over the `transformers` model."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters_store.types import BASE
from server.engine.config import EngineConfig, RequestError
from server.engine.engine import Engine
from server.engine.gates import GateUse
from server.engine.router_bank import KEPT
from server.engine.sequence import FinishReason, Request
from tests.conftest import MakeAdapter
from tests.engine.gated_world import (
    SCORED,
    Plain,
    Routed,
    assert_equals_plain,
    engine,
    gated_engine,
    make_router,
    plain,
    request,
    router,
)
from tests.engine.tiny_engine import GREEDY, PROMPTS, SMALL, Registered, drain, tokens_of

__all__ = ["engine", "plain", "router"]


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
