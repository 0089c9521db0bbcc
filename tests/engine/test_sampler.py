"""What is asked of single rows, against transformers and against the same rows in other batches."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from server.engine.sampler import _adjust, stop_ids
from server.engine.sequence import Request, SamplingParams, Sequence
from tests.engine.sampling_rows import NO_EOS, normal, sample, seeded, sequence


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
