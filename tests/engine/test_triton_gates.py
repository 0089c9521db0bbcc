"""Token-level routing on the Triton backend, under its interpreter where there is no GPU, against the reference."""

from dataclasses import replace
from pathlib import Path

import pytest

from kernels import triton_ops
from server.engine.config import RequestError
from server.engine.sequence import Output, Request
from server.model.config import ModelError
from tests.engine.gated_world import FACTORY, SCORED, make_router, request
from tests.engine.micro_engine import micro, micro_engine, micro_model
from tests.engine.tiny_engine import Registered, drain, tokens_of

__all__ = ["micro", "micro_model"]


def assert_equal(found: dict[str, list[Output]], expected: dict[str, list[Output]]) -> None:
    assert found.keys() == expected.keys()
    for name, outputs in found.items():
        assert tokens_of(outputs) == tokens_of(expected[name]), name
        for one, other in zip(outputs, expected[name], strict=True):
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-3)
            assert one.shares == pytest.approx(other.shares, abs=1e-3)


def test_gated_rows_beside_others(micro_model: Path, micro: Registered, tmp_path: Path) -> None:
    router = make_router(tmp_path / "router", micro_model, micro, ("all4", "qv20"), 3, True)
    params = replace(SCORED, max_tokens=3)
    prompts = {"long": tuple(range(2, 22)), "short": (5, 9, 33), "base": (7, 8, 9, 10)}
    found = {}
    for backend in ("reference", "triton"):
        engine = micro_engine(micro_model, backend, gates=FACTORY)
        engine.add_request(request("long", prompts["long"], micro, router.use(2), params))
        engine.add_request(request("short", prompts["short"], micro, router.use(1, only=("qv20",)), params))
        engine.add_request(Request("base", prompts["base"], params, micro.mix({"all4": 0.5}), micro.paths))
        found[backend] = drain(engine)
    assert_equal(found["triton"], found["reference"])
    assert all(sum(output.shares) == pytest.approx(1.0) for output in found["triton"]["long"])


def test_routers_change_slots_and_share_steps(micro_model: Path, micro: Registered, tmp_path: Path) -> None:
    """Three routers on two slots, a mask, temperatures at both ends, and rows that use no gates."""
    params = replace(SCORED, max_tokens=2)
    names = ("all4", "qv20")
    routers = [make_router(tmp_path / str(seed), micro_model, micro, names, seed, seed == 5) for seed in (3, 4, 5)]
    uses = [routers[0].use(2, 8.0), routers[1].use(1), routers[2].use(3), routers[0].use(2, 0.01, ("all4",))]
    found: dict[str, dict[str, list[Output]]] = {}
    for backend in ("reference", "triton"):
        engine = micro_engine(micro_model, backend, gates=FACTORY, gate_slots=2, gates_per_slot=32)
        for number, use in enumerate(uses):
            engine.add_request(request(f"{number}", (5 + number, 9), micro, use, params))
        engine.add_request(Request("mix", (7, 8), params, micro.mix({"all4": 0.5, "qv20": -0.5}), micro.paths))
        engine.add_request(Request("base", (7, 8), params))
        found[backend] = drain(engine)
        engine.check_integrity()
    assert_equal(found["triton"], found["reference"])


def test_rows_of_prompts_take_the_dense_way(
    micro_model: Path, micro: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_ops, "SIDE_ROWS", 3)
    router = make_router(tmp_path / "router", micro_model, micro, ("all4", "qv20"), 3, False)
    params = replace(SCORED, max_tokens=2)
    found = {}
    for backend in ("reference", "triton"):
        engine = micro_engine(micro_model, backend, gates=FACTORY)
        engine.add_request(request("r", tuple(range(2, 9)), micro, router.use(2), params))
        engine.add_request(Request("mix", (7, 8, 9), params, micro.mix({"qv20": 0.7}), micro.paths))
        found[backend] = drain(engine)
    assert_equal(found["triton"], found["reference"])


def test_gates_that_no_slot_holds_are_refused(micro_model: Path, micro: Registered, tmp_path: Path) -> None:
    router = make_router(tmp_path / "router", micro_model, micro, ("all4",) * 33, 3, False)
    engine = micro_engine(micro_model, "triton", gates=FACTORY, gates_per_slot=32)
    engine.add_request(request("r", (5, 9), micro, router.use(1), SCORED))
    (output,) = drain(engine)["r"]
    assert output.error == "the router has 33 gates a linear, but this engine has room for 32"
    assert (output.error_code, output.error_param) == ("router_unavailable", "lora.router")
    engine.check_integrity()


def test_an_engine_without_slots_has_no_routers(micro_model: Path, micro: Registered, tmp_path: Path) -> None:
    router = make_router(tmp_path / "router", micro_model, micro, ("all4", "qv20"), 3, False)
    engine = micro_engine(micro_model, "triton", gates=FACTORY, gate_slots=0)
    assert engine.info().memory["gates"] == 0
    with pytest.raises(RequestError, match="no token-level routers"):
        engine.add_request(request("r", (5, 9), micro, router.use(1), SCORED))


@pytest.mark.parametrize("settings", [{"gates_per_slot": 0}, {"gate_slots": -1}])
def test_slots_of_no_sense_are_refused(micro_model: Path, settings: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="expected at least 0 and 1"):
        micro_engine(micro_model, "triton", gates=FACTORY, **settings)
