"""`loramux demo`: a server, requests at once that each have their own adapters, and a check of every answer."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from rich.console import Console
from rich.table import Table

from deploy.demo.requests import MAX_TOKENS, ROUTERS, DemoRequest, demo_requests

ADAPTERS = Path(__file__).parent / "adapters"
START_SECONDS = 300.0
SERVED_NAME = "smollm2-135m"


class DemoError(RuntimeError):
    """The demo could not run. The message is one sentence."""


@dataclass(frozen=True)
class Answer:
    """What came back. Seconds from sending to the first text and to the end; tokens as the server counted them."""

    text: str
    adapters: tuple[str, ...]
    first: float
    total: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total


def main(model: Path, encoder: Path, *, once: bool, host: str = "127.0.0.1", port: int = 8000) -> int:
    """Run the demo on `model`, with `encoder` to read prompts; returns the exit code.

    Without `once` the server stays up until Ctrl-C.
    """
    console = Console()
    for number in (signal.SIGHUP, signal.SIGTERM):  # else the server would stay, with the port and a folder
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _leave)
    with _server(model, encoder, host, port, console) as url:
        for name in ROUTERS:
            _add_router(url, name)
        requests = demo_requests()
        console.print(f"\nSending {len(requests)} requests at once, each with its own adapters ...")
        answers = asyncio.run(_ask_all(url, requests))
        console.print(_table(requests, answers))
        failures = _check(model, requests, answers, console)
        for failure in failures:
            console.print(f"[red]FAILED[/red] {failure}")
        if not failures:
            console.print(
                "[green]All answers are right:[/green] known targets hit, the right adapters chosen, texts equal to"
                " transformers + peft where the mix is fixed."
            )
        if not once:
            _stay(url, console)
    return 1 if failures else 0


def _leave(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _server(model: Path, encoder: Path, host: str, port: int, console: Console) -> Iterator[str]:
    """`loramux serve` as a process of its own, until the block ends; nothing is registered beyond it."""
    _check_port(host, port)
    command = [sys.executable, "-P", "-m", "server.cli", "serve", "--model", str(model), "--served-name", SERVED_NAME]
    command += ["--adapters", str(ADAPTERS), "--encoder", str(encoder), "--host", host, "--port", str(port)]
    command += ["--log-level", "warning"]
    url = f"http://{host}:{port}"
    with tempfile.TemporaryDirectory(prefix="loramux-demo-") as folder:
        command += ["--database-url", f"sqlite:///{folder}/registry.sqlite", "--blob-url", f"{folder}/blobs"]
        process = subprocess.Popen(command)
        try:
            with console.status("Starting the server ..."):
                _wait_until_ready(url, process)
            yield url
        finally:
            process.terminate()
            process.wait()


def _add_router(url: str, name: str) -> None:
    """One that was trained over the demo's adapters."""
    folder = ADAPTERS.parent / name
    parts = {"config": folder / "router.json", "weights": folder / "router.safetensors"}
    files = {field: (path.name, path.read_bytes()) for field, path in parts.items()}
    answer = httpx.post(f"{url}/admin/v1/routers", data={"name": name}, files=files, timeout=60, trust_env=False)
    if answer.status_code != 201:
        raise DemoError(f"router {name} is not accepted: {answer.text}")


def _check_port(host: str, port: int) -> None:
    """Else the demo would ask whatever listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            problem = error.strerror or str(error)
            raise DemoError(f"cannot listen on {host} port {port} ({problem}): give another with --port") from error


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the server ended with code {process.returncode} before it was ready")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise DemoError(f"the server was not ready after {START_SECONDS:.0f} seconds")


async def _ask_all(url: str, requests: list[DemoRequest]) -> list[Answer]:
    http = DefaultAsyncHttpxClient(trust_env=False)  # a proxy has nothing to do with this machine's own address
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client:
        return await asyncio.gather(*(_ask(client, request) for request in requests))


async def _ask(client: AsyncOpenAI, request: DemoRequest) -> Answer:
    """Stream one answer. A single adapter is asked for as a model, a mixture by the `lora` object, or none at all.

    Of a router that decides token by token the adapters are those that led a token, of others those that were chosen.
    """
    model: str = SERVED_NAME
    extra: dict[str, Any] = {}
    if request.router is not None:
        model, extra = f"auto:{request.router}", {"lora": {"explain": True}}
    elif request.auto:
        model, extra = "auto", {"lora": {"top_k": 1}}
    elif len(request.adapters) == 1:
        model = request.adapters[0][0]
    elif request.adapters:
        extra = {"lora": {"adapters": [{"name": name, "weight": weight} for name, weight in request.adapters]}}
    started, first, text, tokens = time.monotonic(), None, "", 0
    used: tuple[str, ...] = ()
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": request.prompt}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    async for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if lora := (chunk.model_extra or {}).get("lora"):
            used = tuple(adapter["name"] for adapter in lora["adapters"])
            if "tokens" in lora:
                used = tuple(sorted({token["adapter"] for token in lora["tokens"][0]}))
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic() - started
            text += chunk.choices[0].delta.content
    total = time.monotonic() - started
    return Answer(text, used, first if first is not None else total, total, tokens)


def _table(requests: list[DemoRequest], answers: list[Answer]) -> Table:
    table = Table(show_lines=True)
    for title in ("request", "adapters", "answer"):
        table.add_column(title, overflow="fold")
    for title in ("first token", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for request, answer in zip(requests, answers, strict=True):
        rate = f"{answer.tokens_per_second:.1f}"
        table.add_row(request.prompt, request.label, answer.text, f"{answer.first * 1000:.0f} ms", rate)
    return table


def _check(model: Path, requests: list[DemoRequest], answers: list[Answer], console: Console) -> list[str]:
    """What is wrong with the answers: missed targets, and texts that transformers + peft would not give."""
    from deploy.demo.reference import Reference  # seconds of imports, and only needed once the answers are there

    failures = []
    with console.status("Checking every answer against transformers + peft ..."):
        names = sorted({name for request in requests for name, _ in request.adapters})
        reference = Reference(model, ADAPTERS, names)
        for request, answer in zip(requests, answers, strict=True):
            label = request.label.replace("\n", " ")
            wanted = {name for name, _ in request.adapters}
            if set(answer.adapters) != wanted:
                failures.append(f"{label}: answered with the adapters {sorted(answer.adapters)}")
            if request.target is not None and answer.text.strip() != request.target:
                failures.append(f"{label}: answered {answer.text!r}, the target is {request.target!r}")
            expected = reference.disagreement(request, answer.text) if request.fixed else None
            if expected is not None:
                failures.append(f"{label}: answered {answer.text!r}, transformers + peft say {expected!r}")
    return failures


def _stay(url: str, console: Console) -> None:
    console.print(f"\nThe server stays up at [bold]{url}[/bold]; Ctrl-C stops it. Try:\n")
    body = '{"model": "pirate", "messages": [{"role": "user", "content": "Say it like a pirate.\\nHello my friend."}]}'
    command = f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
    console.print(command, soft_wrap=True, highlight=False, markup=False)
    talk = f"  {Path(sys.executable).with_name('loramux')} chat --auto --url {url}"
    console.print(talk, soft_wrap=True, highlight=False, markup=False)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
