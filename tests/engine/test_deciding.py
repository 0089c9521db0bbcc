"""Prompts that wait for each other's decisions: each is decided once, whoever comes, ends and is forgotten."""

from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters_store.types import BASE, TARGETS, Mix
from server.engine.deciding import Deciding
from server.engine.decisions import Decision
from server.engine.prompt_routers import PromptUse, Verdict
from server.engine.sequence import Request, SamplingParams, Sequence

USE = PromptUse("r", "/routers/r", ("a", None, "b"), layered=False, top_k=1)
MIX = Mix((("a", 1.0), ("b", 1.0)))


def verdict(weights: torch.Tensor) -> Verdict:
    """Of weights [L, 7, R]."""
    probabilities = torch.full((weights.shape[0], weights.shape[2]), 0.5)
    return Verdict(weights, weights.amax(dim=1) > 0, probabilities)


def decision(layered: bool = False) -> Decision:
    weights = torch.zeros(2, len(TARGETS), 3)
    weights[:, :, 0] = 1.0
    found = Decision.of(replace(USE, layered=layered), MIX, verdict(weights), 0.25)
    assert found is not None
    return found


def sequence(name: str, prompt: int, use: PromptUse = USE, key: bytes = b"tenant") -> Sequence:
    tokens = tuple(range(prompt + 1))
    return Sequence.of(Request(name, tokens, SamplingParams(), MIX, cache_key=key, prompt_router=use))


class DecidingMachine(RuleBasedStateMachine):
    """Random prompts come, end and are decided for; a model of who waits for whom is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.deciding = Deciding(most_bytes=6000)  # room for few
        self.first: dict[tuple[int, bytes], Sequence] = {}
        self.followers: dict[tuple[int, bytes], list[Sequence]] = {}
        self.count = 0

    @rule(prompt=st.integers(0, 5), tenant=st.sampled_from([b"x", b"y"]))
    def come(self, prompt: int, tenant: bytes) -> None:
        self.count += 1
        new, key = sequence(str(self.count), prompt, key=tenant), (prompt, tenant)
        goes_on = self.deciding.enter(new)
        if new.decision is not None:
            assert goes_on
            assert key not in self.first
            assert new.decision.told.cached
        elif key in self.first:
            assert not goes_on
            assert self.deciding.waits(new)
            self.followers.setdefault(key, []).append(new)
        else:
            assert goes_on
            assert new.request.mix == BASE, "it reads as a row of the base model"
            self.first[key] = new

    @precondition(lambda self: self.first)
    @rule(data=st.data())
    def decide(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.first)))
        one, waiting = self.first.pop(key), self.followers.pop(key, [])
        assert self.deciding.decide(one, decision()) == waiting
        for each, cached in ((one, False), *((other, True) for other in waiting)):
            assert each.decision is not None
            assert (each.request.mix.digests, each.decision.told.cached) == (("a",), cached)
            assert not each.undecided

    @precondition(lambda self: self.first)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.first)))
        waiting = self.followers.get(key, [])
        which = data.draw(st.integers(0, len(waiting)))
        if which:
            assert self.deciding.leave(waiting.pop(which - 1)) is None
            return
        successor = self.deciding.leave(self.first.pop(key))
        assert successor is (waiting.pop(0) if waiting else None)
        if successor is not None:
            self.first[key] = successor
            assert successor.request.mix == BASE

    @invariant()
    def holds(self) -> None:
        self.deciding.check_integrity()
        assert len(self.deciding.followers) == sum(map(len, self.followers.values()))
        assert self.deciding.num_remembered <= 6


TestDecidingMachine = DecidingMachine.TestCase
TestDecidingMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(
    "other",
    [
        sequence("o", 4),
        sequence("o", 3, key=b"other"),
        sequence("o", 3, replace(USE, digest="q")),
        sequence("o", 3, replace(USE, top_k=2)),
        sequence("o", 3, replace(USE, rows=("a", "b", None))),
    ],
)
def test_another_prompt_tenant_router_option_or_mask_is_decided_anew(other: Sequence) -> None:
    deciding, first, same = Deciding(), sequence("f", 3), sequence("s", 3)
    assert deciding.enter(first)
    deciding.decide(first, decision())
    assert deciding.enter(same)
    assert same.decision is not None
    assert deciding.enter(other)
    assert other.decision is None


def test_one_choice_for_all_layers_is_a_mix() -> None:
    found = decision()
    assert (found.mix.entries, found.weights, found.key) == ((("a", 1.0),), None, b"")
    weights = torch.full((2, 7, 3), 0.5)
    weights[:, :, 1] = 0.0
    halves = Decision.of(USE, MIX, verdict(weights), 0.0)
    assert halves is not None
    assert (halves.mix.entries, halves.weights) == ((("a", 0.5), ("b", 0.5)), None)
    none = Decision.of(USE, MIX, verdict(torch.zeros(2, 7, 3)), 0.0)
    assert none is not None
    assert (none.mix, none.weights, none.key) == (BASE, None, b"")


def test_layers_that_differ_keep_their_factors() -> None:
    weights = torch.zeros(2, 7, 3)
    weights[0, :, 0], weights[1, :, 2] = 1.0, 1.0
    found = Decision.of(USE, MIX, verdict(weights), 0.0)
    assert found is not None
    assert found.mix == MIX
    assert found.weights is not None
    assert found.weights.equal(weights[:, :, [0, 2]])
    turned = Decision.of(USE, MIX, verdict(weights.flip(0)), 0.0)
    assert turned is not None
    assert len({found.key, turned.key, b""}) == 3


def test_what_was_computed_with_all_adapters_keeps_them() -> None:
    found = decision(layered=True)
    assert found.mix == MIX
    assert found.weights is not None
    assert found.weights[:, :, 0].eq(1).all()
    assert not found.weights[:, :, 1].any()


def test_what_is_not_finite_is_no_decision() -> None:
    weights, chosen, probabilities = verdict(torch.ones(2, 7, 3))
    assert Decision.of(USE, MIX, Verdict(weights, chosen, probabilities * torch.nan), 0.0) is None


def test_two_rows_of_one_adapter_add_up() -> None:
    twice = replace(USE, rows=("a", "a", "b"))
    weights = torch.zeros(2, 7, 3)
    weights[:, :, 0] = weights[:, :, 1] = 0.5
    found = Decision.of(twice, MIX, verdict(weights), 0.0)
    assert found is not None
    assert found.mix.entries == (("a", 1.0),)
