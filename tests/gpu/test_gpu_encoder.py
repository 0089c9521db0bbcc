"""The encoder's captured passes on a GPU against passes without a graph."""

from pathlib import Path

import numpy as np
import pytest
from tiny_encoder import make_encoder

from routing.encoder_model import EncoderModel

pytestmark = pytest.mark.gpu
TEXTS = [" ".join(f"w{(7 * row + place) % 30}" for place in range(1 + 3 * row)) for row in range(11)]


def test_captured_passes_equal_those_without(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "encoder")
    plain, encoder = (EncoderModel.load(folder, device="cuda") for _ in range(2))
    encoder.use_graphs()
    for count in (1, 2, 3, 8, 11, 1, 3, 11):
        np.testing.assert_allclose(encoder.embed(TEXTS[-count:]), plain.embed(TEXTS[-count:]), atol=1e-3)
    assert encoder.graphs is not None
    assert encoder.graphs.num_graphs >= 5  # of 1, 2, 4, 8 and 16 texts
