"""The process of an encoder: killed, failing, told to leave, and left alone."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from encoder_folder import Folder, Make, busy

from routing.encoder import EncoderUnavailable


async def test_killed_in_the_middle_of_a_pass(make_process: Make, fake_folder: Folder) -> None:
    """Everybody in flight is told once, and the next text starts the encoder again."""
    process = make_process()
    await process.encoder().embed(["warm-up"])  # else it may be in a pass before it is known to have started
    first = await busy(fake_folder, process)
    encoder = process.encoder()
    others = [asyncio.create_task(encoder.embed([f"text {n}"], bulk=n % 2 == 0)) for n in range(20)]
    await asyncio.sleep(0)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    results = await asyncio.wait_for(asyncio.gather(first, *others, return_exceptions=True), 60)
    assert {str(result) for result in results} == {"the encoder process ended unexpectedly (code -9); please retry"}
    assert all(isinstance(result, EncoderUnavailable) for result in results)
    fake_folder.drop("hold")
    assert len(await encoder.embed(["first"])) == 1
    assert fake_folder.lines("load") == [None, None]


async def test_a_deadly_text_does_not_start_processes_without_end(make_process: Make, fake_folder: Folder) -> None:
    process = make_process(restart_seconds=1000.0)
    encoder = process.encoder()
    await encoder.embed(["fine"])
    for _ in range(3):
        with pytest.raises(EncoderUnavailable, match="ended unexpectedly"):
            await encoder.embed(["die"])
    assert len(fake_folder.lines("load")) == 1
    assert len(await encoder.embed(["fine"])) == 1  # what is remembered needs no process


async def test_a_load_that_fails_is_said_and_tried_again(make_process: Make, fake_folder: Folder) -> None:
    fake_folder.put("fail", "the weights\nare torn")
    process, patient = make_process(), make_process(restart_seconds=1000.0)
    for encoder in (process.encoder(), process.encoder(), patient.encoder(), patient.encoder()):
        with pytest.raises(EncoderUnavailable, match=r"^the weights are torn$"):
            await encoder.embed(["text"])
    assert len(fake_folder.lines("load")) == 3
    fake_folder.drop("fail")
    assert len(await process.encoder().embed(["text"])) == 1


async def test_killed_while_it_loads(make_process: Make, fake_folder: Folder) -> None:
    fake_folder.put("hold-load")
    process = make_process()
    await process.start()
    waiting = asyncio.create_task(process.encoder().embed(["text"]))
    await fake_folder.until(lambda: fake_folder.lines("load"))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EncoderUnavailable, match="ended while it was starting"):
        await waiting


async def test_a_folder_that_changed_is_not_embedded_with(make_process: Make, fake_folder: Folder) -> None:
    process = make_process()
    encoder = process.encoder()
    await encoder.embed(["before"])
    fake_folder.put("weights", "2")
    assert len(await encoder.embed(["loaded before the change"])) == 1
    for changed in (process.encoder(), process.encoder(Path("change"))):
        found = changed.embed(["text"])
        if changed.change is None:
            with pytest.raises(EncoderUnavailable, match="restart the server"):
                await found
        else:
            assert len(await found) == 1


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
async def test_signals_to_the_whole_group_do_not_end_it(make_process: Make, name: signal.Signals) -> None:
    process = make_process()
    encoder = process.encoder()
    await encoder.embed(["one"])
    assert process.pid is not None
    os.kill(process.pid, name)
    assert len(await encoder.embed(["two"])) == 1


@pytest.mark.parametrize("state", ["never started", "just started", "loading", "loaded", "in a pass"])
async def test_close_leaves_nothing(
    make_process: Make, fake_folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str
) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    process = make_process()
    waiting = None
    if state != "never started":
        await process.start()
    if state == "loading":
        fake_folder.put("hold-load")
        waiting = asyncio.create_task(process.encoder().embed(["text"]))
        await fake_folder.until(lambda: fake_folder.lines("load"))
        assert list((tmp_path / "t").iterdir())
    elif state == "loaded":
        await process.encoder().embed(["text"])
        assert not list((tmp_path / "t").iterdir())
    elif state == "in a pass":
        waiting = await busy(fake_folder, process)
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


async def test_the_encoder_leaves_when_its_server_dies(fake_folder: Folder, make_process: Make) -> None:
    """Even in the middle of a pass."""
    make_process()  # for its environment
    fake_folder.put("hold")
    script = fake_folder.path / "front_end.py"
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
    server = await asyncio.create_subprocess_exec(sys.executable, str(script), str(fake_folder.path))
    await fake_folder.until(lambda: fake_folder.passes)
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    assert len(children) == 1
    server.kill()
    await server.wait()
    await fake_folder.until(lambda: not is_running(int(children[0])))


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
