"""Encoders as they are loaded, beside sentence-transformers itself, and with trained changes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_encoder import MAX_TOKENS, WIDTH, make_encoder

from routing.encoder_model import PREFIX, EncoderError, EncoderModel, encoder_id, plain_id, transformer
from routing.router_folder import RouterCard, write_router

TEXTS = ["translate the word cat", "", "12 + 7", "Ünïcode, 漢字 ✓", "   "]
QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("base"))


def change(folder: Path, out: Path, mode: str, tensors: dict[str, torch.Tensor], width: int = WIDTH) -> Path:
    write_router(out, RouterCard(encoder_id(folder), "tiny", mode, PREFIX, width, ""), tensors)
    return out


def test_embeddings_are_those_of_the_library_with_the_prefix(folder: Path) -> None:
    encoder = EncoderModel.load(folder)
    found = encoder.embed(TEXTS)
    expected = SentenceTransformer(str(folder), device="cpu").encode([PREFIX + text for text in TEXTS])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert (encoder.width, encoder.max_tokens) == (WIDTH, MAX_TOKENS)
    assert encoder.embed([]).shape == (0, WIDTH)


def test_plain_embeddings_are_those_of_the_library(folder: Path) -> None:
    encoder = EncoderModel.load(folder)
    plain = encoder.plain()
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(plain.embed(TEXTS), expected, atol=1e-6)
    assert plain.model is encoder.model
    assert plain.id == plain_id(encoder.id) != encoder.id


def test_texts_of_any_kind_have_finite_embeddings(folder: Path) -> None:
    found = EncoderModel.load(folder, prefix="").embed(["", "\ud800", "\x00", "x" * 100_000, "漢" * 100_000])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_long_texts_are_cut_without_changing_what_is_read_of_them(folder: Path) -> None:
    encoder = EncoderModel.load(folder)
    start = "many words " * MAX_TOKENS
    np.testing.assert_array_equal(encoder.embed([start]), encoder.embed([start + "more words " * 20_000]))


def test_the_id_says_what_decides_the_embeddings(folder: Path, tmp_path: Path) -> None:
    found = encoder_id(folder)
    assert len(found) == 16
    assert EncoderModel.load(folder).id == found
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert encoder_id(copy) == found, "the folder's name is no part of it"
    (copy / "README.md").write_text("nor is this")
    assert encoder_id(copy) == found
    assert encoder_id(folder, prefix="") != found
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"pooling_mode": "max"}))
    assert encoder_id(copy) != found
    assert encoder_id(make_encoder(tmp_path / "other", seed=2)) != found


def test_a_head_is_applied_before_normalisation(folder: Path, tmp_path: Path) -> None:
    weight = torch.randn(WIDTH, WIDTH)
    router = change(folder, tmp_path, "head", {"head": weight})
    base, trained = EncoderModel.load(folder), EncoderModel.load(folder, router)
    pooled = SentenceTransformer(modules=list(base.model)[:2]).encode([PREFIX + text for text in TEXTS])
    expected = pooled @ weight.numpy().T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(trained.embed(TEXTS), expected, atol=1e-5)
    assert trained.id == encoder_id(folder, router) != base.id


def test_lora_is_merged(folder: Path, tmp_path: Path) -> None:
    a, b = torch.randn(2, WIDTH), torch.randn(WIDTH, 2)
    router = change(folder, tmp_path, "lora", {f"{QUERY}.lora_A": a, f"{QUERY}.lora_B": b})
    trained, expected = EncoderModel.load(folder, router), EncoderModel.load(folder)
    with torch.no_grad():
        transformer(expected.model).get_parameter(f"{QUERY}.weight").add_(b @ a)
    np.testing.assert_array_equal(trained.embed(TEXTS), expected.embed(TEXTS))
    assert not np.allclose(trained.embed(TEXTS), EncoderModel.load(folder).embed(TEXTS), atol=1e-3)


def test_full_weights_replace_the_base(folder: Path, tmp_path: Path) -> None:
    other = EncoderModel.load(make_encoder(tmp_path / "other", seed=2))
    weights = {name: weight for name, weight in transformer(other.model).named_parameters() if "pooler" not in name}
    router = change(folder, tmp_path / "router", "full", weights)
    np.testing.assert_array_equal(EncoderModel.load(folder, router).embed(TEXTS), other.embed(TEXTS))


def test_a_router_of_another_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    router = change(folder, tmp_path / "router", "head", {"head": torch.eye(WIDTH)})
    other = make_encoder(tmp_path / "other", seed=2)
    for load in (EncoderModel.load, encoder_id):
        with pytest.raises(
            EncoderError, match=r"field base: the router was trained on tiny \(\w{16}\), expected encoder"
        ):
            load(other, router)


def test_a_router_of_another_width_is_refused(folder: Path, tmp_path: Path) -> None:
    router = change(folder, tmp_path, "head", {"head": torch.eye(8)}, width=8)
    with pytest.raises(EncoderError, match="field width: expected 16"):
        EncoderModel.load(folder, router)


@pytest.mark.parametrize(
    ("mode", "tensors", "message"),
    [
        ("full", {"encoder.layer.7.weight": torch.ones(3)}, "an unknown name"),
        ("full", {f"{QUERY}.weight": torch.ones(3, 3)}, "shape"),
        ("lora", {"nowhere.lora_A": torch.ones(2, 16), "nowhere.lora_B": torch.ones(16, 2)}, "an unknown name"),
        ("lora", {f"{QUERY}.lora_A": torch.ones(2, 5), f"{QUERY}.lora_B": torch.ones(16, 2)}, "shape"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, mode: str, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(EncoderError, match=message):
        EncoderModel.load(folder, change(folder, tmp_path, mode, tensors))


def test_a_folder_that_is_no_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"expected a sentence-transformers folder with a modules\.json"):
        EncoderModel.load(tmp_path)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="expected weights as a safetensors file"):
        encoder_id(copy)
    (copy / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Transformer"}]))
    with pytest.raises(EncoderError, match=r"module 'evil\.Transformer': expected Transformer, Pooling, Normalize"):
        EncoderModel.load(copy)
