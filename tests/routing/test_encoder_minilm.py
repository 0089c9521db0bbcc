"""The encoder process with all-MiniLM-L6-v2 and with folders that are none."""

from pathlib import Path

import numpy as np
import pytest

from routing.encoder import EncoderProcess, EncoderUnavailable, ServedEncoder
from routing.encoder_model import PREFIX
from routing.encoder_width import encoder_width

TEXTS = ["", "Translate to French: good morning", "what is 7 * 8?", "字" * 400, "long " * 20_000, "  ", "a\x00b \ud800"]


@pytest.mark.slow
async def test_embeddings_equal_those_of_sentence_transformers(minilm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process = EncoderProcess(minilm)
    try:
        encoder = process.encoder()
        found = await encoder.embed(TEXTS)
        bulk = await encoder.embed([f"{text} " for text in TEXTS], bulk=True)
        plain = await process.plain_encoder().embed(TEXTS)
    finally:
        await process.close()
    assert capfd.readouterr() == ("", "")
    from sentence_transformers import SentenceTransformer

    original = SentenceTransformer(str(minilm), device="cpu", local_files_only=True)
    texts = [PREFIX + text[:5000].replace("\ud800", "?") for text in TEXTS]
    expected = np.stack([original.encode(text, show_progress_bar=False) for text in texts])
    assert (found.shape, encoder.width) == ((len(TEXTS), 384), 384)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(bulk, expected, atol=1e-5)  # a space at the end is no token
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    as_they_are = [text[:5000].replace("\ud800", "?") for text in TEXTS]
    expected = np.stack([original.encode(text, show_progress_bar=False) for text in as_they_are])
    np.testing.assert_allclose(plain, expected, atol=1e-5)


async def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    process = EncoderProcess(tmp_path / "nothing")
    try:
        with pytest.raises(EncoderUnavailable, match=r"nothing: expected a sentence-transformers folder"):
            process.encoder()
        with pytest.raises(EncoderUnavailable, match=r"nothing: expected a sentence-transformers folder"):
            await ServedEncoder(process, "0" * 16, 8, None).embed(["text"])
    finally:
        await process.close()


async def test_without_the_extra_the_sentence_names_it(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sentence_transformers.py").write_text("raise ModuleNotFoundError('No module', name=__name__)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = EncoderProcess(minilm)
    try:
        with pytest.raises(EncoderUnavailable, match=r"pip install 'loramux\[routing\]'"):
            await process.encoder().embed(["text"])
    finally:
        await process.close()


@pytest.mark.parametrize(
    ("pooling", "width"),
    [
        ('{"word_embedding_dimension": 384, "pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}', 384),
        ('{"word_embedding_dimension": 10, "pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}', 20),
        ('{"embedding_dimension": 7, "pooling_mode": "mean", "include_prompt": true}', 7),
        ('{"embedding_dimension": 7, "pooling_mode": ["mean", "max", "cls"]}', 21),
        ("{}", None),
        ("[]", None),
        ('{"embedding_dimension": "x"}', None),
    ],
)
def test_width_from_the_files(tmp_path: Path, pooling: str, width: int | None) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]')
    (tmp_path / "1_Pooling" / "config.json").write_text(pooling)
    if width is None:
        with pytest.raises(EncoderUnavailable, match="expected"):
            EncoderProcess(tmp_path, identify=lambda folder, _: ("id", encoder_width(folder))).encoder()
    else:
        assert encoder_width(tmp_path) == width
