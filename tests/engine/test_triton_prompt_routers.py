"""Prompt-level routing on the Triton backend, under its interpreter where there is no GPU, against the reference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.decided_memory import MOST_PAGES, DecidedMemory
from server.engine.decided_rows import PLACES, DecidedRows
from server.engine.sequence import Request
from tests.engine.gated_world import FACTORY as GATES
from tests.engine.gated_world import make_router
from tests.engine.gated_world import request as gated
from tests.engine.micro_engine import micro, micro_engine, micro_model
from tests.engine.plain_routing import ADAPTERS, MILORA, make_prompt_router, routed
from tests.engine.routed_world import FACTORY, SCORED
from tests.engine.tiny_engine import Registered, drain, tokens_of

__all__ = ["micro", "micro_model"]


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_decided_rows_beside_others(micro_model: Path, micro: Registered, tmp_path: Path, everything: bool) -> None:
    """Prompts in several parts, rows of gates among them, and steps launched before the one before them has decided."""
    params = replace(SCORED, max_tokens=3 if everything else 2)
    names = ("all4", "qv20")
    milora = make_prompt_router(tmp_path / "milora", micro_model, micro, ("all4",), **MILORA)
    layered = make_prompt_router(tmp_path / "layered", micro_model, micro, names, **ADAPTERS | {"top_k": 1})
    moa = make_prompt_router(tmp_path / "moa", micro_model, micro, names, norm="rms")
    gates = make_router(tmp_path / "gates", micro_model, micro, names, 3, True)
    long, short = tuple(range(2, 22)), (5, 9, 33)
    requests = [
        routed("milora", long, micro, milora.use(), params),
        Request("mix", short, params, micro.mix({"all4": 0.5}), micro.paths),
        routed("moa", long, micro, moa.use(), params),
        routed("layered", short, micro, layered.use(), params),
        gated("gated", short, micro, gates.use(1), params),
    ]
    found = {}
    for backend in ("reference", "triton"):
        engine = micro_engine(micro_model, backend, prompt_routers=FACTORY, gates=GATES)
        for request in requests if everything else requests[:2]:
            engine.add_request(request)
        found[backend] = drain(engine)
    assert found["triton"].keys() == found["reference"].keys()
    for name, expected in found["reference"].items():
        ours = found["triton"][name]
        assert tokens_of(ours) == tokens_of(expected)
        for one, other in zip(ours, expected, strict=True):
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-3)
        told = [outputs[0].decided for outputs in (ours, expected)]
        assert [each is not None for each in told] == [name not in ("mix", "gated")] * 2
        assert len({each.chosen for each in told if each is not None}) <= 1


def drawn(rows: list[int] | None, count: int, pages: int) -> DecidedRows:
    tables = {group: torch.rand(2, len(places), count, pages) for group, places in PLACES.items()}
    return DecidedRows(None if rows is None else torch.tensor(rows), tables)


def test_decisions_at_fixed_addresses() -> None:
    """A step finds what was written for it, whatever was written before, and one that is too large finds no room."""
    memory = DecidedMemory(2, max_rows=8, max_num_seqs=2, device=torch.device("cpu"))
    steps = (drawn([0, 1, 2, 1, 0], 3, 4), drawn(None, 2, 5), drawn([1], 2, 1), drawn([2, 0], 3, MOST_PAGES))
    for decided in steps:
        assert memory.write(decided)
        pages = {group: table.shape[3] for group, table in decided.tables.items()}
        decoding, count = decided.rows is None, 2 if decided.rows is None else len(decided.rows)
        seen = memory.view(3 if decoding else 7, decoding=decoding, pages=pages)
        for group in PLACES:
            found = seen.scale(1, group, torch.empty(7, 0), None)
            assert found.stride(2) == 1
            assert found[:, :count].equal(decided.scale(1, group, torch.empty(count, 0), None))
    assert not memory.write(drawn([3], 4, 1))
    assert not memory.write(drawn(None, 4, 1))
    assert not memory.write(drawn([0], 1, MOST_PAGES + 1))


def test_graphs_have_room_for_decisions_up_to_what_is_kept() -> None:
    memory = DecidedMemory(2, max_rows=8, max_num_seqs=2, device=torch.device("cpu"))
    assert memory.fits(3, decoding=True, pages=[1, MOST_PAGES])
    assert memory.fits(8, decoding=False, pages=[MOST_PAGES])
    assert not memory.fits(4, decoding=True, pages=[1])
    assert not memory.fits(1, decoding=True, pages=[1, MOST_PAGES + 1])
