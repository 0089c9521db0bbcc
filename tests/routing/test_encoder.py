"""Embeddings from the encoder process: shared, remembered, in order of urgency."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from encoder_folder import Folder, Make, busy
from fake_encoder import WIDTH, vector

from routing.encoder import EncoderUnavailable


async def test_embeddings_come_in_the_order_of_the_texts(make_process: Make) -> None:
    process = make_process()
    await process.start()
    encoder = process.encoder()
    texts = ["b", "", "a", "b", "x" * 100_000, "\ud800", "emoji 🦊"]
    found = await encoder.embed(texts)
    assert (found.shape, found.dtype, encoder.width) == ((len(texts), WIDTH), np.float32, WIDTH)
    expected = [vector(encoder.id, text.replace("\ud800", "?")) for text in texts]
    np.testing.assert_array_equal(found, np.stack(expected))
    found[:] = 0  # the caller's own: the memory behind it stays as it was
    np.testing.assert_array_equal(await encoder.embed(texts), np.stack(expected))
    assert (await encoder.embed([])).shape == (0, WIDTH)


async def test_the_device_auto_is_a_gpu_where_there_is_one(make_process: Make, fake_folder: Folder) -> None:
    import torch

    expected = "cuda" if torch.cuda.is_available() else "cpu"
    for device, chosen in (("auto", expected), ("cpu", "cpu")):
        await make_process(device=device).encoder().embed(["text"])
        assert fake_folder.lines("device")[-1] == chosen


async def test_plain_texts_are_another_encoders(make_process: Make, fake_folder: Folder) -> None:
    process = make_process()
    first = await busy(fake_folder, process)
    plain, routed = process.plain_encoder(), process.encoder()
    asked = [asyncio.create_task(encoder.embed(["same"])) for encoder in (plain, routed)]
    await asyncio.sleep(0)
    fake_folder.drop("hold")
    rows = await asyncio.gather(*asked)
    await first
    for row, encoder in zip(rows, (plain, routed), strict=True):
        np.testing.assert_array_equal(row[0], vector(encoder.id, "same"))
    assert fake_folder.passes[1:] == [["same"], ["same"]]


async def test_callers_share_passes(make_process: Make, fake_folder: Folder) -> None:
    process = make_process(max_batch=16)
    first = await busy(fake_folder, process)
    encoder = process.encoder()
    callers = [asyncio.create_task(encoder.embed([f"caller {n:02}"])) for n in range(48)]
    await asyncio.sleep(0)
    fake_folder.drop("hold")
    rows = await asyncio.gather(*callers)
    await first
    for n, row in enumerate(rows):
        np.testing.assert_array_equal(row[0], vector(encoder.id, f"caller {n:02}"))
    sizes = [len(texts) for texts in fake_folder.passes]
    assert sum(sizes) == 49
    assert max(sizes) <= 16
    assert len(sizes) < 25


async def test_those_who_ask_in_the_same_turn_share_the_first_pass(make_process: Make, fake_folder: Folder) -> None:
    """The first of a burst does not have the encoder to itself while all others wait."""
    process = make_process()
    encoder = process.encoder()
    await encoder.embed(["warm-up"])
    texts = [f"caller {n:02}" for n in range(20)]  # as many as one pass holds
    rows = await asyncio.gather(*(encoder.embed([text]) for text in texts))
    assert [sorted(taken) for taken in fake_folder.passes[1:]] == [texts]
    for text, row in zip(texts, rows, strict=True):
        np.testing.assert_array_equal(row[0], vector(encoder.id, text))


async def test_the_same_text_is_computed_once_and_remembered(make_process: Make, fake_folder: Folder) -> None:
    process = make_process()
    first = await busy(fake_folder, process)
    encoder = process.encoder()
    callers = [asyncio.create_task(encoder.embed(["same", f"own {n % 4}"])) for n in range(40)]
    await asyncio.sleep(0)
    fake_folder.drop("hold")
    rows = await asyncio.gather(first, *callers)
    computed = sorted(text for texts in fake_folder.passes[1:] for text in texts)
    assert computed == ["own 0", "own 1", "own 2", "own 3", "same"]
    await process.close()
    np.testing.assert_array_equal(await process.encoder().embed(["same", "own 1"]), rows[2])
    with pytest.raises(EncoderUnavailable, match="shutting down"):
        await encoder.embed(["new"])


async def test_what_one_tenant_asks_is_neither_shared_nor_remembered_for_another(
    make_process: Make, fake_folder: Folder
) -> None:
    """How long a text takes must not tell whether somebody else has sent it."""
    process = make_process()
    first = await busy(fake_folder, process)
    encoder = process.encoder()
    asked = [asyncio.create_task(encoder.embed(["same"], tenant=tenant)) for tenant in ("a", "b", "a")]
    await asyncio.sleep(0)
    fake_folder.drop("hold")
    rows = await asyncio.gather(*asked)
    await first
    assert fake_folder.passes[1:] == [["same", "same"]]
    await encoder.embed(["same"], tenant="b")
    assert len(fake_folder.passes) == 2
    np.testing.assert_array_equal(await encoder.embed(["same"], tenant="c"), rows[0])
    assert fake_folder.passes[2:] == [["same"]]


async def test_the_memory_is_bounded_by_last_use_and_keyed_by_encoder(make_process: Make, fake_folder: Folder) -> None:
    process = make_process(cache_texts=3)
    encoder, trained = process.encoder(), process.encoder(Path("change"))
    assert encoder.id != trained.id
    for text in ("a", "b", "c", "a", "d"):  # "b" was not read for longest
        await encoder.embed([text])
    assert len(process.cache) == 3
    before = len(fake_folder.passes)
    await encoder.embed(["a", "c", "d"])
    assert len(fake_folder.passes) == before
    await encoder.embed(["b"])
    assert fake_folder.passes[before:] == [["b"]]
    np.testing.assert_array_equal((await trained.embed(["b"]))[0], vector(trained.id, "b"))
    assert fake_folder.lines("load") == [None, "change"]


@pytest.mark.parametrize(
    ("text", "said"), [("bad", "this text is bad"), ("nan", "finite vectors"), ("panic", "at this text")]
)
async def test_a_text_that_fails_fails_alone(make_process: Make, fake_folder: Folder, text: str, said: str) -> None:
    process = make_process()
    first = await busy(fake_folder, process)
    encoder = process.encoder()
    others = [asyncio.create_task(encoder.embed([f"other {n}"])) for n in range(5)]
    failing = asyncio.create_task(encoder.embed([text]))
    await asyncio.sleep(0)
    fake_folder.drop("hold")
    assert len(await asyncio.gather(first, *others)) == 6
    with pytest.raises(EncoderUnavailable, match=f"could not be embedded .*{said}"):
        await failing
    assert len(fake_folder.lines("load")) == 1
