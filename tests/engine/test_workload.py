"""What the engine's benchmark asks for: the same every time, and as it is described."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.types import TARGETS
from kernels.shapes import SHAPES
from server.engine import peers
from server.engine.bench_session import Options, Session, Setup
from server.engine.workload import Lengths, SyntheticAdapters, Traffic, gamma_arrivals, popular, write_config
from server.model.config import ModelConfig
from tests.engine.tiny_bench import session, silent

__all__ = ["session"]


@pytest.mark.parametrize("name", SHAPES)
def test_config_of_a_shape_is_that_of_a_model(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    write_config(shape, tmp_path)
    model = ModelConfig.from_folder(tmp_path)
    inputs, outputs = model.linear_shape.inputs, model.linear_shape.outputs
    assert sum(linear.inputs * linear.outputs for linear in shape.linears.values()) == sum(
        inputs[target] * outputs[target] for target in TARGETS
    )
    assert (model.num_layers, model.vocab_size, model.tie_word_embeddings) == (
        shape.num_layers,
        shape.vocab_size,
        shape.tied,
    )


def test_same_seed_same_workload(session: Session) -> None:
    session.engine(Setup(3, 4))
    traffic, lengths = Traffic.parse("mix2of5"), session.lengths(8)
    first, again = (session.workload("w", traffic, lengths) for _ in range(2))
    assert first == again
    assert {len(request.mix.entries) for request in first.requests} == {2}
    assert all(set(request.paths) == set(request.mix.digests) for request in first.requests)
    assert len({request.mix for request in first.requests}) > 4
    other = Lengths.uniform(8, 8, 14, seed=1)
    assert other != lengths
    assert Lengths.uniform(8, 8, 14, seed=1) == other


def test_the_peers_workload_has_the_peers_tokens() -> None:
    options = Options(model="tiny", device="cpu")
    with Session(options, silent) as session:
        lengths = session.lengths(256)
        assert (sum(lengths.prompts), sum(lengths.outputs)) == peers.TOTALS
        assert len(session.lengths(128).prompts) == 128


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 40),
    seed=st.integers(0, 5),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_lengths_move_to_any_total(count: int, seed: int, share: tuple[float, float]) -> None:
    totals = tuple(round(count * (8 + part * 24)) for part in share)
    lengths = Lengths.uniform(count, 8, 32, seed, (totals[0], totals[1]))
    assert (sum(lengths.prompts), sum(lengths.outputs)) == totals
    assert all(8 <= length <= 32 for length in (*lengths.prompts, *lengths.outputs))


def test_lengths_refuse_impossible_totals() -> None:
    with pytest.raises(ValueError, match=r"4 lengths in \[8, 16\] cannot sum to 65"):
        Lengths.uniform(4, 8, 16, 0, (65, 40))


def test_arrivals_have_their_rate_and_variation() -> None:
    gaps = np.diff(gamma_arrivals(20_000, 5.0, seed=0, variation=0.5), prepend=0.0)
    assert gaps.mean() == pytest.approx(0.2, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(0.5, rel=0.03)
    poisson = np.diff(gamma_arrivals(20_000, 5.0, seed=0), prepend=0.0)
    assert poisson.std() / poisson.mean() == pytest.approx(1.0, rel=0.03)


def test_popularity_follows_its_exponent() -> None:
    counts = Counter(popular(50_000, 100, 1.0, seed=0))
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.15)
    uniform = Counter(popular(50_000, 100, 0.0, seed=0))
    assert max(uniform.values()) < 1.3 * min(uniform.values())


def test_adapters_are_distinct_readable_and_small(session: Session) -> None:
    shape = session.model.linear_shape
    adapters = SyntheticAdapters(shape, rank=8, targets=("q_proj", "v_proj"), dtype=torch.float32, seed=0, num_sets=2)
    packed = [adapters.read(adapters.digest(i), adapters.path(i)) for i in range(3)]
    assert len({own.digest for own in packed}) == 3
    assert packed[0].groups is packed[2].groups, "thousands of adapters must not take thousands of tensors"
    assert packed[0].group_ranks == {"qkv": 8}
    ((a, b),) = packed[0].groups["qkv"].pages
    assert a.shape == (shape.num_layers, 3, 8, shape.inputs["q_proj"])
    assert [bool(a[:, place].any()) for place in range(3)] == [True, False, True]
    contents = [
        page[0][layer, place]
        for own in packed[:2]
        for page in own.groups["qkv"].pages
        for layer in range(2)
        for place in (0, 2)
    ]
    assert not any(torch.equal(one, other) for i, one in enumerate(contents) for other in contents[:i])
    assert adapters.num_bytes == a.nbytes + b.nbytes
    with pytest.raises(ValueError, match="has digest"):
        adapters.read(adapters.digest(1), adapters.path(2))
