"""Prompt-level routing on the Triton backend, under its interpreter where there is no GPU, against the reference."""

from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.sequence import Request
from tests.engine.plain_routing import make_prompt_router, routed
from tests.engine.test_engine import Registered, drain, tokens_of
from tests.engine.test_layered_engine import ADAPTERS, MILORA
from tests.engine.test_moa_engine import FACTORY, SCORED
from tests.engine.test_triton_engine import interpreted, micro, micro_engine, micro_model

__all__ = ["micro", "micro_model"]


@interpreted
def test_decided_rows_beside_others(micro_model: Path, micro: Registered, tmp_path: Path) -> None:
    """Prompts in several parts, and steps that are launched before the decision of the one before them is known."""
    params = replace(SCORED, max_tokens=3)
    names = ("all4", "qv20")
    milora = make_prompt_router(tmp_path / "milora", micro_model, micro, ("all4",), **MILORA)
    layered = make_prompt_router(tmp_path / "layered", micro_model, micro, names, **ADAPTERS | {"top_k": 1})
    moa = make_prompt_router(tmp_path / "moa", micro_model, micro, names, norm="rms")
    long, short = tuple(range(2, 22)), (5, 9, 33)
    found = {}
    for backend in ("reference", "triton"):
        engine = micro_engine(micro_model, backend, prompt_routers=FACTORY)
        engine.add_request(routed("milora", long, micro, milora.use(), params))
        engine.add_request(routed("layered", short, micro, layered.use(), params))
        engine.add_request(routed("moa", long, micro, moa.use(), params))
        engine.add_request(Request("mix", short, params, micro.mix({"all4": 0.5}), micro.paths))
        found[backend] = drain(engine)
    for name in ("milora", "layered", "moa", "mix"):
        ours, expected = found["triton"][name], found["reference"][name]
        assert tokens_of(ours) == tokens_of(expected)
        for one, other in zip(ours, expected, strict=True):
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-3)
    for name in ("milora", "layered", "moa"):
        ours, expected = (found[backend][name][0].decided for backend in ("triton", "reference"))
        assert ours is not None
        assert expected is not None
        assert ours.chosen == expected.chosen
