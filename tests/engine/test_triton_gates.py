"""Token-level routing on the Triton backend, under its interpreter where there is no GPU, against the reference."""

from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.sequence import Request
from tests.engine.test_engine import Registered, drain, tokens_of
from tests.engine.test_gated_engine import FACTORY, SCORED, make_router, request
from tests.engine.test_triton_engine import interpreted, micro, micro_engine, micro_model

__all__ = ["micro", "micro_model"]


@interpreted
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
    for name in prompts:
        ours, expected = found["triton"][name], found["reference"][name]
        assert tokens_of(ours) == tokens_of(expected)
        for one, other in zip(ours, expected, strict=True):
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-3)
            assert one.shares == pytest.approx(other.shares, abs=1e-3)
    assert all(sum(output.shares) == pytest.approx(1.0) for output in found["triton"]["long"])
