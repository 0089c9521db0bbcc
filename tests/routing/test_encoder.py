"""Embeddings from the encoder process: shared, remembered, in order of urgency."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import fake_encoder
import numpy as np
import pytest
import pytest_asyncio
from fake_encoder import WIDTH, vector

from routing.encoder import EncoderProcess, EncoderUnavailable

Make = Callable[..., EncoderProcess]


class Folder:
    """The fake encoder's folder, and what its process noted there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "weights").write_text("1")

    def put(self, name: str, text: str = "") -> None:
        (self.path / name).write_text(text)

    def drop(self, name: str) -> None:
        (self.path / name).unlink()

    def lines(self, kind: str) -> list[Any]:
        log = self.path / "log"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line[kind] for line in lines if kind in line]

    @property
    def passes(self) -> list[list[str]]:
        return self.lines("pass")

    async def until(self, condition: Callable[[], object], seconds: float = 150.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "encoder").mkdir()
    return Folder(tmp_path / "encoder")


@pytest_asyncio.fixture
async def make(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    made: list[EncoderProcess] = []

    def make(**options: Any) -> EncoderProcess:
        given = {"loader": fake_encoder.LOADER, "identify": fake_encoder.identify, "restart_seconds": 0.0} | options
        made.append(EncoderProcess(folder.path, **given))
        return made[-1]

    yield make
    for process in made:
        await process.close()
        assert process.pid is None


async def busy(folder: Folder, process: EncoderProcess) -> Awaitable[np.ndarray]:
    """A next pass that does not end before `hold` is dropped."""
    folder.put("hold")
    before = len(folder.passes)
    first = asyncio.create_task(process.encoder().embed(["first"]))
    await folder.until(lambda: len(folder.passes) > before)
    return first


async def test_embeddings_come_in_the_order_of_the_texts(make: Make) -> None:
    process = make()
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


async def test_the_device_auto_is_a_gpu_where_there_is_one(make: Make, folder: Folder) -> None:
    import torch

    expected = "cuda" if torch.cuda.is_available() else "cpu"
    for device, chosen in (("auto", expected), ("cpu", "cpu")):
        await make(device=device).encoder().embed(["text"])
        assert folder.lines("device")[-1] == chosen


async def test_plain_texts_are_another_encoders(make: Make, folder: Folder) -> None:
    process = make()
    first = await busy(folder, process)
    plain, routed = process.plain_encoder(), process.encoder()
    asked = [asyncio.create_task(encoder.embed(["same"])) for encoder in (plain, routed)]
    await asyncio.sleep(0)
    folder.drop("hold")
    rows = await asyncio.gather(*asked)
    await first
    for row, encoder in zip(rows, (plain, routed), strict=True):
        np.testing.assert_array_equal(row[0], vector(encoder.id, "same"))
    assert folder.passes[1:] == [["same"], ["same"]]


async def test_callers_share_passes(make: Make, folder: Folder) -> None:
    process = make(max_batch=16)
    first = await busy(folder, process)
    encoder = process.encoder()
    callers = [asyncio.create_task(encoder.embed([f"caller {n:02}"])) for n in range(48)]
    await asyncio.sleep(0)
    folder.drop("hold")
    rows = await asyncio.gather(*callers)
    await first
    for n, row in enumerate(rows):
        np.testing.assert_array_equal(row[0], vector(encoder.id, f"caller {n:02}"))
    sizes = [len(texts) for texts in folder.passes]
    assert sum(sizes) == 49
    assert max(sizes) <= 16
    assert len(sizes) < 25


async def test_those_who_ask_in_the_same_turn_share_the_first_pass(make: Make, folder: Folder) -> None:
    """The first of a burst does not have the encoder to itself while all others wait."""
    process = make()
    encoder = process.encoder()
    await encoder.embed(["warm-up"])
    texts = [f"caller {n:02}" for n in range(20)]  # as many as one pass holds
    rows = await asyncio.gather(*(encoder.embed([text]) for text in texts))
    assert [sorted(taken) for taken in folder.passes[1:]] == [texts]
    for text, row in zip(texts, rows, strict=True):
        np.testing.assert_array_equal(row[0], vector(encoder.id, text))


async def test_the_same_text_is_computed_once_and_remembered(make: Make, folder: Folder) -> None:
    process = make()
    first = await busy(folder, process)
    encoder = process.encoder()
    callers = [asyncio.create_task(encoder.embed(["same", f"own {n % 4}"])) for n in range(40)]
    await asyncio.sleep(0)
    folder.drop("hold")
    rows = await asyncio.gather(first, *callers)
    assert sorted(text for texts in folder.passes[1:] for text in texts) == ["own 0", "own 1", "own 2", "own 3", "same"]
    await process.close()
    np.testing.assert_array_equal(await process.encoder().embed(["same", "own 1"]), rows[2])
    with pytest.raises(EncoderUnavailable, match="shutting down"):
        await encoder.embed(["new"])


async def test_what_one_tenant_asks_is_neither_shared_nor_remembered_for_another(make: Make, folder: Folder) -> None:
    """How long a text takes must not tell whether somebody else has sent it."""
    process = make()
    first = await busy(folder, process)
    encoder = process.encoder()
    asked = [asyncio.create_task(encoder.embed(["same"], tenant=tenant)) for tenant in ("a", "b", "a")]
    await asyncio.sleep(0)
    folder.drop("hold")
    rows = await asyncio.gather(*asked)
    await first
    assert folder.passes[1:] == [["same", "same"]]
    await encoder.embed(["same"], tenant="b")
    assert len(folder.passes) == 2
    np.testing.assert_array_equal(await encoder.embed(["same"], tenant="c"), rows[0])
    assert folder.passes[2:] == [["same"]]


async def test_the_memory_is_bounded_by_last_use_and_keyed_by_encoder(make: Make, folder: Folder) -> None:
    process = make(cache_texts=3)
    encoder, trained = process.encoder(), process.encoder(Path("change"))
    assert encoder.id != trained.id
    for text in ("a", "b", "c", "a", "d"):  # "b" was not read for longest
        await encoder.embed([text])
    assert len(process.cache) == 3
    before = len(folder.passes)
    await encoder.embed(["a", "c", "d"])
    assert len(folder.passes) == before
    await encoder.embed(["b"])
    assert folder.passes[before:] == [["b"]]
    np.testing.assert_array_equal((await trained.embed(["b"]))[0], vector(trained.id, "b"))
    assert folder.lines("load") == [None, "change"]


@pytest.mark.parametrize(("text", "said"), [("bad", "this text is bad"), ("nan", "finite vectors")])
async def test_a_text_that_fails_fails_alone(make: Make, folder: Folder, text: str, said: str) -> None:
    process = make()
    first = await busy(folder, process)
    encoder = process.encoder()
    others = [asyncio.create_task(encoder.embed([f"other {n}"])) for n in range(5)]
    failing = asyncio.create_task(encoder.embed([text]))
    await asyncio.sleep(0)
    folder.drop("hold")
    assert len(await asyncio.gather(first, *others)) == 6
    with pytest.raises(EncoderUnavailable, match=f"could not be embedded .*{said}"):
        await failing
    assert len(folder.lines("load")) == 1


async def test_killed_in_the_middle_of_a_pass(make: Make, folder: Folder) -> None:
    """Everybody in flight is told once, and the next text starts the encoder again."""
    process = make()
    await process.encoder().embed(["warm-up"])  # else it may be in a pass before it is known to have started
    first = await busy(folder, process)
    encoder = process.encoder()
    others = [asyncio.create_task(encoder.embed([f"text {n}"], bulk=n % 2 == 0)) for n in range(20)]
    await asyncio.sleep(0)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    results = await asyncio.wait_for(asyncio.gather(first, *others, return_exceptions=True), 60)
    assert {str(result) for result in results} == {"the encoder process ended unexpectedly (code -9); please retry"}
    assert all(isinstance(result, EncoderUnavailable) for result in results)
    folder.drop("hold")
    assert len(await encoder.embed(["first"])) == 1
    assert folder.lines("load") == [None, None]


async def test_a_deadly_text_does_not_start_processes_without_end(make: Make, folder: Folder) -> None:
    process = make(restart_seconds=1000.0)
    encoder = process.encoder()
    await encoder.embed(["fine"])
    for _ in range(3):
        with pytest.raises(EncoderUnavailable, match="ended unexpectedly"):
            await encoder.embed(["die"])
    assert len(folder.lines("load")) == 1
    assert len(await encoder.embed(["fine"])) == 1  # what is remembered needs no process


async def test_a_load_that_fails_is_said_and_tried_again(make: Make, folder: Folder) -> None:
    folder.put("fail", "the weights\nare torn")
    process, patient = make(), make(restart_seconds=1000.0)
    for encoder in (process.encoder(), process.encoder(), patient.encoder(), patient.encoder()):
        with pytest.raises(EncoderUnavailable, match=r"^the weights are torn$"):
            await encoder.embed(["text"])
    assert len(folder.lines("load")) == 3
    folder.drop("fail")
    assert len(await process.encoder().embed(["text"])) == 1


async def test_killed_while_it_loads(make: Make, folder: Folder) -> None:
    folder.put("hold-load")
    process = make()
    await process.start()
    waiting = asyncio.create_task(process.encoder().embed(["text"]))
    await folder.until(lambda: folder.lines("load"))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EncoderUnavailable, match="ended while it was starting"):
        await waiting


async def test_a_folder_that_changed_is_not_embedded_with(make: Make, folder: Folder) -> None:
    process = make()
    encoder = process.encoder()
    await encoder.embed(["before"])
    folder.put("weights", "2")
    assert len(await encoder.embed(["loaded before the change"])) == 1
    for changed in (process.encoder(), process.encoder(Path("change"))):
        found = changed.embed(["text"])
        if changed.change is None:
            with pytest.raises(EncoderUnavailable, match="restart the server"):
                await found
        else:
            assert len(await found) == 1


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
async def test_signals_to_the_whole_group_do_not_end_it(make: Make, name: signal.Signals) -> None:
    process = make()
    encoder = process.encoder()
    await encoder.embed(["one"])
    assert process.pid is not None
    os.kill(process.pid, name)
    assert len(await encoder.embed(["two"])) == 1


@pytest.mark.parametrize("state", ["never started", "just started", "loading", "loaded", "in a pass"])
async def test_close_leaves_nothing(
    make: Make, folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str
) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    process = make()
    waiting = None
    if state != "never started":
        await process.start()
    if state == "loading":
        folder.put("hold-load")
        waiting = asyncio.create_task(process.encoder().embed(["text"]))
        await folder.until(lambda: folder.lines("load"))
        assert list((tmp_path / "t").iterdir())
    elif state == "loaded":
        await process.encoder().embed(["text"])
        assert not list((tmp_path / "t").iterdir())
    elif state == "in a pass":
        waiting = await busy(folder, process)
    pid = process.pid
    await asyncio.gather(process.close(), process.close())
    await process.close()
    if pid is not None:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert process.pid is None
    assert not list((tmp_path / "t").iterdir())
    if waiting is not None:
        with pytest.raises(EncoderUnavailable, match="shutting down"):
            await waiting
    with pytest.raises(EncoderUnavailable, match="shutting down"):
        await process.start()


async def test_the_encoder_leaves_when_its_server_dies(folder: Folder, make: Make) -> None:
    """Even in the middle of a pass."""
    make()  # for its environment
    folder.put("hold")
    script = folder.path / "front_end.py"
    script.write_text(
        "import asyncio, sys, fake_encoder\n"
        "from pathlib import Path\n"
        "from routing.encoder import EncoderProcess\n"
        "async def main():\n"
        "    options = dict(loader=fake_encoder.LOADER, identify=fake_encoder.identify)\n"
        "    process = EncoderProcess(Path(sys.argv[1]), **options)\n"
        "    await process.encoder().embed(['never'])\n"
        "asyncio.run(main())\n"
    )
    server = await asyncio.create_subprocess_exec(sys.executable, str(script), str(folder.path))
    await folder.until(lambda: folder.passes)
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    assert len(children) == 1
    server.kill()
    await server.wait()
    await folder.until(lambda: not is_running(int(children[0])))


def is_running(pid: int) -> bool:
    """Whether the process is there and has not ended; an orphan may stay as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_server_never_imports_the_library() -> None:
    code = (
        "import sys, routing.encoder, routing.encoder_process\n"
        "heavy = {'sentence_transformers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
