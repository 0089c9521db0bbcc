"""`loramux chat` against the application behind a real socket: from a pipe, and on a terminal."""

import asyncio
import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from io import StringIO
from typing import Any

import pytest
from fake_engine import REPLY
from fakes import Harness
from rich.console import Console
from typer.testing import CliRunner, Result

from server import cli
from server.chat_screen import ChatScreen, route_line
from server.chat_selection import Selection, SelectionError, parse_adapters

Chat = Callable[..., Awaitable[Result]]


@pytest.fixture
async def harness(make_harness: Callable[..., Harness], request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    harness = make_harness(**getattr(request, "param", {}))
    yield harness
    harness.check_all_given_back()


@pytest.fixture
def chat(live: str) -> Chat:
    """`await chat(lines, *options)`; it has to exit with `code`."""

    async def run(lines: str, *options: str, code: int = 0) -> Result:
        environment = {"LORAMUX_URL": live}
        done = await asyncio.to_thread(CliRunner().invoke, cli.app, ["chat", *options], input=lines, env=environment)
        assert done.exit_code == code, done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done

    return run


async def prompts(harness: Harness) -> list[str]:
    return [await harness.services.tokenizer.decode(request.prompt) for request in harness.engine.requests]


async def test_answers_go_to_a_pipe_and_routes_beside_it(chat: Chat, harness: Harness) -> None:
    done = await chat("Hi\n\n  Ho\\\nand so on\n")
    assert done.stdout == f"{REPLY}\n{REPLY}\n"
    assert [line.partition(";")[0] for line in done.stderr.splitlines()] == ["[the base model"] * 2
    _, prompt = await prompts(harness)
    assert f"user\nHi<|im_end|>\n<|im_start|>assistant\n{REPLY}<|im_end|>" in prompt
    assert "user\nHo\nand so on<|im_end|>" in prompt


async def test_one_question(chat: Chat, harness: Harness) -> None:
    options = [
        "--use",
        "sql",
        "--use",
        "german=-0.5",
        "--system",
        "Be brief.",
        "--temperature",
        "0",
        "--max-tokens",
        "3",
    ]
    done = await chat("never read\n", *options, "Hi")
    assert done.stdout.startswith("Hello")
    assert "sql 0.50, german -0.50" in done.stderr
    assert "3 tokens" in done.stderr
    (request,) = harness.engine.requests
    assert (request.params.temperature, request.params.max_tokens) == (0, 3)
    assert "system\nBe brief.<|im_end|>" in (await prompts(harness))[0]


async def test_adapters_are_switched(chat: Chat, harness: Harness) -> None:
    digests = harness.digests
    lines = [
        "/use sql",
        "1",
        "/use sql=0.7 german=0.3",
        "2",
        "/use sql german as fusion",
        "3",
        "/adapters g",
        "/base",
        "4",
    ]
    done = await chat("\n".join(lines))
    assert done.stdout == f"{REPLY}\n" * 4
    weights = [dict(request.mix.entries) for request in harness.engine.requests]
    sql, german = digests["sql"], digests["german"]
    assert weights == [{sql: 1.0}, {sql: 0.7, german: 0.3}, {sql: 0.5, german: 0.5}, {}]
    assert [request.mix.composition.value for request in harness.engine.requests][2] == "fusion"
    shown = done.stderr.splitlines()
    assert "now sql=0.7 german=0.3 answers" in shown
    assert any(line.startswith("[sql 0.50, german 0.50 as fusion; ") for line in shown)
    assert ["german", "yes"] in [line.split() for line in shown]
    assert not [line for line in shown if line.startswith(("sql ", "pirate"))]


async def test_the_conversation(chat: Chat, harness: Harness) -> None:
    lines = [
        "/history",
        "One",
        "/system Be brief.",
        "Two",
        "/history",
        "/clear",
        "/system",
        "Three",
        "//four",
        "/quit",
        "Five",
    ]
    done = await chat("\n".join(lines))
    first, second, third, fourth = await prompts(harness)
    assert first == "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n"
    assert second.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne<|im_end|>")
    assert third == "<|im_start|>user\nThree<|im_end|>\n<|im_start|>assistant\n"
    assert fourth.endswith("user\n/four<|im_end|>\n<|im_start|>assistant\n")
    shown = done.stderr.splitlines()
    assert shown[0] == "nothing was said yet"
    assert [line for line in shown if ": " in line and not line.startswith("[")] == [
        "system: Be brief.",
        "user: One",
        f"assistant: {REPLY}",
        "user: Two",
        f"assistant: {REPLY}",
    ]


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("/fly", 2, "/fly: there is no such command, /help lists all"),
        ("/use nobody", 2, "there is no adapter nobody, /adapters lists all"),
        ("/use tiny", 2, "there is no adapter tiny, /adapters lists all"),
        ("/use sql=much", 2, "sql=much: expected an adapter, or one with its weight, such as pirate=0.5"),
        ("/use", 2, "expected adapters, such as: pirate redact=0.5"),
        ("/auto\nHi", 1, "(no_router)"),
        ("/auto nobody\nHi", 1, "(no_router)"),
        ("x" * 100_000, 1, "(context_length_exceeded)"),
    ],
)
async def test_what_fails_in_a_pipe_ends_it(chat: Chat, harness: Harness, line: str, code: int, message: str) -> None:
    done = await chat(f"{line}\nHi\n", code=code)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].endswith(message)
    assert not harness.engine.requests


async def test_wrong_options(chat: Chat) -> None:
    await chat("", "--use", "sql", "--auto", code=2)
    await chat("", "--max-tokens", "0", code=2)
    assert "no adapter nobody" in (await chat("", "--use", "nobody", code=2)).stderr
    assert "temperature" in (await chat("Hi", "--temperature", "9", code=1)).stderr


async def test_an_engine_that_dies_is_told(chat: Chat, harness: Harness) -> None:
    harness.engine.hold_at = 3
    harness.engine.gate.clear()
    asking = asyncio.create_task(chat("Hi\n", code=1))
    while not harness.engine.num_waiting:
        await asyncio.sleep(0.01)
    harness.engine.kill()
    done = await asking
    assert done.stdout.startswith("Hello")
    assert done.stdout.endswith("\n")
    assert "(engine_error)" in done.stderr
    harness.engine.alive = True


@pytest.mark.parametrize("harness", [{"api_key": ("secret",)}], indirect=True)
async def test_keys(live: str) -> None:
    """The command takes the variable that gives the server its key."""
    for environment, code in (({"LORAMUX_API_KEY": "secret"}, 0), ({"LORAMUX_API_KEY": "wrong"}, 1), ({}, 1)):
        done = await asyncio.to_thread(CliRunner().invoke, cli.app, ["chat", "--url", live, "Hi"], env=environment)
        assert done.exit_code == code
        assert (done.stdout == f"{REPLY}\n") == (code == 0)
        assert ("(invalid_api_key)" in done.stderr) == (code == 1)


def test_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = CliRunner().invoke(cli.app, ["chat", "--url", url, "Hi"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"loramux: no server at {url} ")
    assert "loramux serve --model" in done.stderr


async def test_control_characters_do_not_steer_the_terminal(chat: Chat, harness: Harness) -> None:
    harness.engine.say("a\x1b[31mb\n\tc\x07")
    assert (await chat("Hi\n")).stdout == "a\\x1b[31mb\n\tc\\x07\n"


def test_help_has_examples() -> None:
    done = CliRunner().invoke(cli.app, ["chat", "--help"], env={"COLUMNS": "120"})
    assert "loramux chat " in done.stdout.partition("Examples:")[2] + " "
    assert "LORAMUX_URL" in done.stdout
    assert "LORAMUX_API_KEY" in done.stdout


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        ({}, "the base model"),
        ({"router": None, "adapters": []}, "the base model"),
        ({"router": "explicit", "adapters": [{"name": "a", "weight": 1}]}, "a 1.00"),
        (
            {
                "router": "retriever",
                "composition": "mixture",
                "route_ms": 0.84,
                "adapters": [{"name": "a", "weight": 0.5, "score": 0.831}, {"name": "b", "weight": 0.5, "score": 0.7}],
            },
            "retriever chose a 0.50 (score 0.83), b 0.50 (score 0.70) in 0.8 ms",
        ),
        (
            {"router": "retriever", "cached": True, "adapters": [], "outcome": "below_min_score"},
            "retriever chose the base model remembered, since no adapter is similar enough to the prompt",
        ),
        (
            {"router": "gates", "route_ms": 2, "adapters": [{"name": "a", "weight": 1.0, "share": 0.61}]},
            "gates chose a 1.00 (share 61%) in 2.0 ms",
        ),
    ],
)
def test_routes_in_a_line(lora: dict[str, Any], line: str) -> None:
    assert route_line(lora) == line


def test_routes_are_explained_on_demand() -> None:
    lora = {
        "router": "retriever",
        "composition": "mixture",
        "cached": False,
        "route_ms": 1.0,
        "adapters": [{"name": "spell", "weight": 1.0, "score": 0.8}],
        "scores": [{"name": "spell", "score": 0.8}, {"name": "pirate", "score": 0.3}],
    }
    for explains in (False, True):
        answers, aside = Console(file=StringIO(), width=80), Console(file=StringIO(), width=80)
        ChatScreen(answers, aside).route(lora, 10, 2.0, explains=explains)
        shown = aside.file.getvalue()
        assert answers.file.getvalue() == ""
        assert shown.startswith("[retriever chose spell 1.00 (score 0.80) in 1.0 ms; 10 tokens, 5.0 tokens/s]\n")
        assert (["2", "pirate", "0.300"] in [line.split() for line in shown.splitlines()]) == explains


def test_what_selections_mean() -> None:
    assert Selection("tiny").fields() == {"model": "tiny"}
    assert parse_adapters(["a"], "tiny").fields() == {"model": "a"}
    mixed = parse_adapters(["a", "b=-1e-1", "as", "selection"], "tiny")
    assert mixed.fields() == {
        "model": "tiny",
        "lora": {"adapters": [{"name": "a"}, {"name": "b", "weight": -0.1}], "composition": "selection"},
    }
    assert mixed.label == "a b=-0.1 as selection"
    assert parse_adapters(mixed.label.split(), "tiny") == mixed
    for wrong in (["a", "a=2"], ["a", "as", "glue"], ["a=nan"], ["=1"], ["a=inf"], ["a="]):
        with pytest.raises(SelectionError):
            parse_adapters(wrong, "tiny")


class Terminal:
    """The command on a terminal of its own, where Ctrl-C is a signal."""

    def __init__(self, url: str) -> None:
        leader, follower = pty.openpty()
        start = "import os, sys; os.login_tty(0); sys.argv = ['loramux', 'chat']; from server.cli import main; main()"
        environment = dict(os.environ) | {"LORAMUX_URL": url, "TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", start], stdin=follower, stdout=follower, stderr=follower, env=environment
        )
        os.close(follower)
        self._leader = leader
        self._seen = bytearray()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    @property
    def seen(self) -> str:
        return self._seen.decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    async def until(self, text: str, count: int = 1) -> None:
        """Wait for the text to have come so many times."""
        for _ in range(6000):
            if self.seen.count(text) >= count:
                return
            await asyncio.sleep(0.01)
        pytest.fail(f"waited in vain for {text!r}: {self.seen!r}")

    async def close(self) -> int:
        code = await asyncio.to_thread(self.process.wait, 60)
        await asyncio.to_thread(self._reading.join)
        os.close(self._leader)
        return code

    def _read(self) -> None:
        try:
            while chunk := os.read(self._leader, 1 << 16):
                self._seen += chunk
        except OSError:  # the other side is closed
            return


@pytest.fixture
async def terminal(live: str) -> AsyncIterator[Terminal]:
    terminal = Terminal(live)
    yield terminal
    if terminal.process.poll() is None:
        terminal.process.kill()
        await terminal.close()


async def test_on_a_terminal(terminal: Terminal, harness: Harness) -> None:
    """Ctrl-C stops an answer, which stays in the conversation; an error ends nothing; the end of input does."""
    await terminal.until("tiny> ")
    harness.engine.hold_at = 4
    harness.engine.gate.clear()
    terminal.type("Hi\n")
    await terminal.until("Hello")
    while not harness.engine.num_waiting:
        await asyncio.sleep(0.01)
    terminal.type("\x03")
    await terminal.until("stopped")
    await terminal.until("tiny> ", 2)
    while not harness.engine.ended:
        await asyncio.sleep(0.01)
    assert list(harness.engine.ended.values()) == ["closed"]
    harness.engine.gate.set()

    terminal.type("/use nobody\n")
    await terminal.until("there is no adapter nobody")
    terminal.type("/use sql\n")
    await terminal.until("sql> ")
    terminal.type("given up\\\n")
    await terminal.until("... ")
    terminal.type("as well\x03")
    await terminal.until("sql> ", 2)
    terminal.type("Ho\n")
    await terminal.until(REPLY)
    await terminal.until("[sql 1.00; ")
    prompt = (await prompts(harness))[1]
    stopped = prompt.partition("<|im_start|>assistant\n")[2].partition("<|im_end|>")[0]
    assert stopped
    assert REPLY.startswith(stopped)
    assert prompt.endswith("user\nHo<|im_end|>\n<|im_start|>assistant\n")
    terminal.type("\x04")
    assert await terminal.close() == 0
