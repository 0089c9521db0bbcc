"""Sampling against transformers, against the exact distribution, and against itself in other batches."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine import sampler
from server.engine.sampler import _adjust, _draw, _truncate, stop_ids, uniform
from server.engine.sequence import Request, SamplingParams, Sequence, TokenLogprobs

NO_EOS: frozenset[int] = frozenset()

CHI_SQUARE = {7: 29.88, 15: 44.26, 63: 111.6}
"""By degrees of freedom: values that chance exceeds once in 10,000. Seeds are fixed, so nothing here is random."""


def sequence(prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **params: Any) -> Sequence:
    found = Sequence.of(Request("r", prompt, SamplingParams(**params)))
    found.tokens += output
    return found


def sample(
    logits: torch.Tensor, sequences: list[Sequence], eos: frozenset[int]
) -> tuple[list[int | None], list[TokenLogprobs | None]]:
    return sampler.sample(logits, sequences, eos).to_host().read()


def draw(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    return _draw(logits, [one.request.params for one in sequences], [one.num_sampled for one in sequences])


def seeded(count: int, **params: Any) -> list[Sequence]:
    return [sequence(seed=seed, **params) for seed in range(count)]


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def reference(logits: torch.Tensor, **params: Any) -> torch.Tensor:
    """transformers' scores, in float64, in the order in which `generate` applies its warpers."""
    warpers = LogitsProcessorList()
    if "temperature" in params:
        warpers.append(TemperatureLogitsWarper(params["temperature"]))
    if params.get("top_k"):
        warpers.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(MinPLogitsWarper(params["min_p"]))
    scores = warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits.double())
    assert isinstance(scores, torch.Tensor)
    return scores


class TestUniform:
    def test_is_splitmix64(self) -> None:
        """Published outputs: the generator's first for state 0, and for state 1234567."""
        first_of_0 = 0xE220A8397B1DCDAF
        assert uniform(0, first_of_0 ^ 1234567) == (6457827717110365317 >> 32) / 2**32

    @pytest.mark.parametrize("by", ["seed", "index"])
    def test_is_uniform(self, by: str) -> None:
        numbers = torch.tensor(
            [uniform(i, 3) if by == "seed" else uniform(3, i) for i in range(20_000)], dtype=torch.float64
        )
        assert 0 <= numbers.min() < numbers.max() < 1
        counts = torch.bincount((numbers * 64).long(), minlength=64).double()
        assert chi_square(counts, torch.full((64,), 1 / 64)) < CHI_SQUARE[63]
        assert abs(numbers.mean() - 0.5) < 4 / math.sqrt(12 * 20_000)
        neighbours = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
        assert abs(neighbours) < 4 / math.sqrt(20_000)

    def test_streams_of_neighbouring_seeds_do_not_overlap(self) -> None:
        streams = [{uniform(seed, index) for index in range(200)} for seed in range(20)]
        assert len(set().union(*streams)) == 20 * 200

    @given(st.integers(-(2**63), 2**64), st.integers(0, 2**31))
    def test_takes_any_seed(self, seed: int, index: int) -> None:
        assert 0 <= uniform(seed, index) < 1
        assert uniform(seed, index) == uniform(seed, index)


class TestGreedy:
    def test_is_argmax(self) -> None:
        logits = normal(50, 97)
        tokens, logprobs = sample(logits.clone(), [sequence(temperature=0.0)] * 50, NO_EOS)
        assert tokens == logits.argmax(-1).tolist()
        assert logprobs == [None] * 50

    def test_ignores_truncation_and_seed(self) -> None:
        logits = normal(1, 97)
        tokens, _ = sample(logits.clone(), [sequence(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5, seed=9)], NO_EOS)
        assert tokens == logits.argmax(-1).tolist()

    def test_a_temperature_close_to_zero_is_greedy(self) -> None:
        logits = normal(4, 97, scale=30.0)
        cuts: list[dict[str, Any]] = [{}, {"top_k": 40, "top_p": 0.9, "min_p": 0.1}]
        for temperature in (1e-5, 1e-30, 1e-320):
            for cut in cuts:
                drawn, _ = sample(logits.clone(), seeded(4, temperature=temperature, **cut), NO_EOS)
                assert drawn == logits.argmax(-1).tolist()

    def test_no_rows(self) -> None:
        assert sample(torch.empty(0, 97), [], NO_EOS) == ([], [])


class TestDistribution:
    logits = normal(1, 8, seed=5, scale=1.0)

    def draw(self, sequences: list[Sequence]) -> torch.Tensor:
        drawn = draw(self.logits.expand(len(sequences), -1), sequences)
        return torch.bincount(drawn, minlength=8).double()

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_over_seeds_is_softmax(self, temperature: float) -> None:
        counts = self.draw(seeded(20_000, temperature=temperature))
        assert chi_square(counts, torch.softmax(self.logits[0] / temperature, -1)) < CHI_SQUARE[7]

    def test_over_the_output_of_one_request_is_softmax(self) -> None:
        counts = self.draw([sequence(output=(0,) * index, seed=11) for index in range(2_000)])
        assert chi_square(counts, torch.softmax(self.logits[0], -1)) < CHI_SQUARE[7]

    def test_of_truncated_rows_is_that_of_the_reference(self) -> None:
        params = {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.05}
        expected = torch.softmax(reference(self.logits, **params), -1)[0]
        counts = self.draw(seeded(20_000, **params))
        kept = expected > 0
        assert 1 < kept.sum() < 8
        assert counts[~kept].sum() == 0
        assert chi_square(counts[kept], expected[kept]) < CHI_SQUARE[7]

    def test_equal_logits_are_equally_likely(self) -> None:
        drawn = draw(torch.zeros(16_000, 16), seeded(16_000))
        counts = torch.bincount(drawn, minlength=16).double()
        assert chi_square(counts, torch.full((16,), 1 / 16)) < CHI_SQUARE[15]

    def test_impossible_tokens_are_never_drawn(self) -> None:
        logits = torch.full((2_000, 9), -torch.inf)
        logits[:, [2, 5]] = 1.0
        assert set(draw(logits, seeded(2_000)).tolist()) == {2, 5}
        assert set(draw(logits, seeded(2_000, top_k=7, top_p=0.99, min_p=0.01)).tolist()) == {2, 5}

    @pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1 - 2**-32, 3)])
    def test_nor_are_they_at_the_ends_of_the_range(
        self, number: float, token: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("server.engine.sampler.uniform", lambda *_: number)
        logits = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0, -torch.inf]])
        assert draw(logits, [sequence()]).tolist() == [token]

    def test_a_row_without_any_distribution_gives_no_token(self) -> None:
        """An adapter may overflow; its row must not break the step of the others."""
        logits = torch.stack([torch.full((7,), torch.nan), torch.full((7,), -torch.inf), normal(7)])
        cuts: list[dict[str, Any]] = [{}, {"top_p": 0.5}]
        for cut in cuts:
            tokens, _ = sample(logits.clone(), seeded(3, **cut), NO_EOS)
            assert tokens[:2] == [None, None]
            assert tokens[2] == sample(logits[2:].clone(), [sequence(seed=2, **cut)], NO_EOS)[0][0]


class TestTruncation:
    """The kept sets, and the logits within them, are those of transformers."""

    def kept(self, logits: torch.Tensor, **params: Any) -> torch.Tensor:
        return _truncate(logits, [SamplingParams(**params)] * len(logits))

    @pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
    @pytest.mark.parametrize(
        "params",
        [
            {"top_k": 1},
            {"top_k": 7},
            {"top_k": 90},
            {"top_p": 0.01},
            {"top_p": 0.5},
            {"top_p": 0.9},
            {"top_p": 0.999},
            {"min_p": 0.001},
            {"min_p": 0.2},
            {"min_p": 0.9},
            {"top_k": 20, "top_p": 0.8},
            {"top_k": 5, "min_p": 0.1},
            {"top_p": 0.95, "min_p": 0.02},
            {"top_k": 50, "top_p": 0.95, "min_p": 0.01},
        ],
        ids=str,
    )
    def test_like_transformers(self, params: dict[str, Any], temperature: float) -> None:
        logits = normal(40, 97, seed=1) / temperature
        kept = self.kept(logits.clone(), **params)
        expected = reference(logits, **params)
        assert torch.equal(kept.isfinite(), expected.isfinite())
        assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])

    def test_every_row_has_its_own(self) -> None:
        logits = normal(5, 97, seed=2)
        params: list[dict[str, Any]] = [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.5}]
        kept = _truncate(logits, [SamplingParams(**each) for each in params])
        for row, each in enumerate(params):
            assert torch.equal(kept[row].isfinite(), reference(logits[row : row + 1], **each)[0].isfinite())

    def test_top_k_beyond_the_vocabulary_keeps_all(self) -> None:
        logits = normal(1, 97)
        assert torch.equal(self.kept(logits, top_k=1000), logits)

    @pytest.mark.parametrize("params", [{"top_p": 0.0}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}], ids=str)
    def test_the_most_likely_token_is_always_kept(self, params: dict[str, Any]) -> None:
        logits = normal(9, 97)
        kept = self.kept(logits.clone(), **params)
        assert kept.isfinite().sum() == 9
        assert kept.argmax(-1).tolist() == logits.argmax(-1).tolist()

    def test_equal_logits(self) -> None:
        logits = torch.zeros(1, 10)
        assert self.kept(logits, top_k=4).isfinite().sum() == 4
        assert self.kept(logits, top_p=0.35).isfinite().sum() == 4
        assert self.kept(logits, min_p=1.0).isfinite().sum() == 10

    def test_top_p_counts_within_what_top_k_kept(self) -> None:
        logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
        assert self.kept(logits, top_p=0.6).isfinite().tolist() == [[True, True, False, False]]
        assert self.kept(logits, top_k=2, top_p=0.55).isfinite().tolist() == [[True, False, False, False]]


class TestAdjustments:
    def adjusted(self, logits: torch.Tensor, found: Sequence, eos: frozenset[int] = NO_EOS) -> torch.Tensor:
        logits = logits.clone()
        _adjust(logits, found, found.num_sampled, eos)
        return logits

    @pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
    def test_repetition_penalty_like_transformers(self, penalty: float) -> None:
        logits = normal(1, 30)
        found = sequence((3, 4, 4, 9), (9, 11, 9), repetition_penalty=penalty)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([found.tokens]), logits.clone())
        assert torch.equal(self.adjusted(logits[0], found), expected[0])

    def test_presence_and_frequency_count_the_output(self) -> None:
        logits = normal(12)
        found = sequence((1, 2, 2), (2, 5, 5, 5), presence_penalty=0.7, frequency_penalty=-0.2)
        counts = torch.tensor([0, 0, 1, 0, 0, 3, 0, 0, 0, 0, 0, 0])
        torch.testing.assert_close(self.adjusted(logits, found), logits - 0.7 * (counts > 0) + 0.2 * counts)

    def test_presence_alone_before_any_output_changes_nothing(self) -> None:
        logits = normal(12)
        assert torch.equal(self.adjusted(logits, sequence((1, 2), presence_penalty=2.0)), logits)

    def test_logit_bias(self) -> None:
        logits = normal(12)
        bias: Mapping[int, float] = {3: -100.0, 7: 1.5, 0: 0.25}
        expected = logits.clone()
        for token, value in bias.items():
            expected[token] += value
        torch.testing.assert_close(self.adjusted(logits, sequence(logit_bias=bias)), expected)

    def test_a_bias_of_a_hundred_forces_or_forbids(self) -> None:
        logits = normal(500, 12)
        forced, _ = sample(logits.clone(), seeded(500, logit_bias={4: 100.0}), NO_EOS)
        assert set(forced) == {4}
        logits[:, 4] += 3.0
        free, _ = sample(logits.clone(), seeded(500), NO_EOS)
        forbidden, _ = sample(logits.clone(), seeded(500, logit_bias={4: -100.0}), NO_EOS)
        assert 4 in free
        assert 4 not in forbidden

    def test_min_tokens_bans_every_stop_token_until_then(self) -> None:
        logits = torch.zeros(12)
        for output, banned in (((), {1, 5, 6}), ((0,), {1, 5, 6}), ((0, 0), set())):
            found = sequence(output=output, min_tokens=2, stop_token_ids=frozenset({5, 6}))
            adjusted = self.adjusted(logits, found, frozenset({1}))
            assert set((adjusted == -torch.inf).nonzero().flatten().tolist()) == banned

    def test_min_tokens_wins_over_a_bias(self) -> None:
        found = sequence(temperature=0.0, min_tokens=1, logit_bias={1: 100.0})
        tokens, _ = sample(torch.zeros(1, 4), [found], frozenset({1}))
        assert tokens != [1]

    def test_ignore_eos_leaves_the_end_of_text_alone(self) -> None:
        params = SamplingParams(stop_token_ids=frozenset({5}), ignore_eos=True)
        assert stop_ids(params, frozenset({1})) == {5}
        assert stop_ids(SamplingParams(stop_token_ids=frozenset({5})), frozenset({1})) == {1, 5}
        logits = torch.zeros(12)
        found = sequence(min_tokens=3, ignore_eos=True)
        assert torch.equal(self.adjusted(logits, found, frozenset({1})), logits)

    def test_rows_keep_their_adjustments_to_themselves(self) -> None:
        logits = normal(3, 12)
        changed = sequence(temperature=0.0, logit_bias={2: 100.0}, repetition_penalty=5.0)
        plain = sequence(temperature=0.0)
        tokens, _ = sample(logits.clone(), [plain, changed, plain], NO_EOS)
        assert tokens == [int(logits[0].argmax()), 2, int(logits[2].argmax())]


class TestLogprobs:
    def test_are_those_of_the_unmodified_distribution(self) -> None:
        logits = normal(3, 40)
        expected = torch.log_softmax(logits, -1)
        sequences = [
            sequence(temperature=0.3, top_k=2, logit_bias={7: 100.0}, repetition_penalty=3.0, logprobs=5),
            sequence(),
            sequence(temperature=0.0, logprobs=3),
        ]
        tokens, logprobs = sample(logits.clone(), sequences, NO_EOS)
        assert tokens[0] == 7
        assert logprobs[1] is None
        for row, count in ((0, 5), (2, 3)):
            found = logprobs[row]
            assert found is not None
            assert found.logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-6)
            values, ids = expected[row].topk(count)
            assert [token for token, _ in found.top] == ids.tolist()
            assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-6)

    def test_may_be_asked_for_without_alternatives(self) -> None:
        _, (found,) = sample(normal(1, 40), [sequence(logprobs=0)], NO_EOS)
        assert found is not None
        assert found.top == ()
        assert found.logprob < 0

    def test_more_than_the_vocabulary(self) -> None:
        _, (found,) = sample(normal(1, 5), [sequence(logprobs=20)], NO_EOS)
        assert found is not None
        assert sum(math.exp(value) for _, value in found.top) == pytest.approx(1.0)


rows = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 1.0, 1.5]),
    top_k=st.sampled_from([0, 0, 1, 5, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.5, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    logit_bias=st.dictionaries(st.integers(0, 60), st.floats(-5, 5), max_size=2),
    seed=st.integers(0, 2**63 - 1),
    min_tokens=st.integers(0, 3),
    logprobs=st.sampled_from([None, 0, 3]),
)


@given(
    params=st.lists(rows, min_size=1, max_size=8), data=st.data(), noise=st.integers(0, 1000), outputs=st.integers(0, 4)
)
@settings(max_examples=100, deadline=None)
def test_a_row_draws_the_same_whatever_shares_the_batch(
    params: list[SamplingParams], data: st.DataObject, noise: int, outputs: int
) -> None:
    eos = frozenset({3})
    logits = normal(len(params), 61, seed=noise)
    sequences = []
    for index, each in enumerate(params):
        sequences.append(Sequence.of(Request(str(index), (1, 2), each)))
        sequences[-1].tokens += [(index + position) % 61 for position in range(outputs)]
    alone = [sample(logits[row : row + 1].clone(), [found], eos) for row, found in enumerate(sequences)]
    order = data.draw(st.permutations(range(len(params))))
    tokens, logprobs = sample(logits[order], [sequences[row] for row in order], eos)
    for place, row in enumerate(order):
        assert tokens[place] == alone[row][0][0]
        assert (logprobs[place] is None) == (alone[row][1][0] is None)
