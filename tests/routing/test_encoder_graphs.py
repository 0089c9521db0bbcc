"""Passes from captured graphs against the same encoder without, on a CPU: see `tests/engine/recorded_graph.py`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_encoder import make_encoder

from routing.encoder_graphs import LENGTHS, ROWS
from routing.encoder_model import EncoderModel
from tests.conftest import HAS_GPU
from tests.engine.recorded_graph import RecordedGraph, recorded_graphs

pytestmark = pytest.mark.skipif(HAS_GPU, reason="a GPU has graphs of its own")
TEXTS = [" ".join(f"w{(7 * row + place) % 30}" for place in range(1 + 3 * row)) for row in range(11)]


@pytest.fixture(autouse=True)
def _recorded() -> Iterator[None]:
    with recorded_graphs():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def encoder(folder: Path) -> EncoderModel:
    encoder = EncoderModel.load(folder)
    encoder.use_graphs()
    return encoder


def test_passes_of_all_sizes_equal_those_without_a_graph(folder: Path, encoder: EncoderModel) -> None:
    plain = EncoderModel.load(folder)
    assert encoder.graphs is not None
    for count in (1, 2, 3, 8, 11, 1, 3):
        np.testing.assert_allclose(encoder.embed(TEXTS[-count:]), plain.embed(TEXTS[-count:]), atol=1e-5)
        np.testing.assert_allclose(encoder.embed(TEXTS[:count]), plain.embed(TEXTS[:count]), atol=1e-5)
    assert encoder.graphs.num_graphs >= 5
    few = encoder.graphs.num_graphs
    np.testing.assert_allclose(encoder.plain().embed(TEXTS), plain.plain().embed(TEXTS), atol=1e-5)
    assert encoder.graphs.num_graphs - few <= 1
    replays = [captured.graph.replays for captured in encoder.graphs._graphs.values() if captured is not None]
    assert sum(isinstance(count, int) and count > 1 for count in replays) >= 3


def test_padding_on_the_left(folder: Path, encoder: EncoderModel) -> None:
    plain = EncoderModel.load(folder)
    for each in (plain, encoder):
        each.model.tokenizer.padding_side = "left"
    np.testing.assert_allclose(encoder.embed(TEXTS[:3]), plain.embed(TEXTS[:3]), atol=1e-5)
    assert encoder.graphs is not None
    assert encoder.graphs.num_graphs == 1


def test_an_encoder_that_a_graph_cannot_hold_does_without(
    folder: Path, encoder: EncoderModel, caplog: pytest.LogCaptureFixture
) -> None:
    def look(_module: object, given: tuple[dict[str, torch.Tensor]], _out: object) -> None:
        assert given[0]["attention_mask"].any().item()

    encoder.model[1].register_forward_hook(look)
    plain = EncoderModel.load(folder)
    np.testing.assert_array_equal(encoder.embed(TEXTS[:2]), plain.embed(TEXTS[:2]))
    assert encoder.graphs is not None
    assert encoder.graphs.num_graphs == 0
    assert "waits for the device" in caplog.text


def test_an_encoder_that_padding_changes_does_without(encoder: EncoderModel, caplog: pytest.LogCaptureFixture) -> None:
    def turn(_module: object, given: tuple[dict[str, torch.Tensor]], out: dict[str, torch.Tensor]) -> None:
        if given[0]["attention_mask"].shape[1] in LENGTHS:
            out["sentence_embedding"] = -out["sentence_embedding"]

    encoder.model[1].register_forward_hook(turn)
    encoder.embed(TEXTS[:2])
    assert encoder.graphs is not None
    assert encoder.graphs.num_graphs == 0
    assert "other embeddings" in caplog.text


def test_a_refused_capture_costs_nothing_but_speed(
    folder: Path, encoder: EncoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordedGraph, "refuses", True)
    np.testing.assert_array_equal(encoder.embed(TEXTS), EncoderModel.load(folder).embed(TEXTS))
    assert encoder.graphs is not None
    assert encoder.graphs.num_graphs == 0


def test_more_texts_or_tokens_than_graphs_have_room_for(
    folder: Path, encoder: EncoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from routing import encoder_graphs

    assert (ROWS[-1], LENGTHS[-1]) == (64, 256)
    for name in ("ROWS", "LENGTHS"):
        monkeypatch.setattr(encoder_graphs, name, (4,))
        encoder.use_graphs()
        np.testing.assert_array_equal(encoder.embed(TEXTS), EncoderModel.load(folder).embed(TEXTS))
        assert encoder.graphs is not None
        assert encoder.graphs.num_graphs == 0
        monkeypatch.undo()
