"""Which tokens are drawn and how often, against the exact distribution and against transformers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.sampler import _truncate, uniform
from server.engine.sequence import SamplingParams, Sequence
from tests.engine.sampling_rows import CHI_SQUARE, NO_EOS, chi_square, draw, normal, reference, sample, seeded, sequence


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
