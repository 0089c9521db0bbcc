"""`loramux chat` from a pipe, against the application behind a real socket."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from fake_engine import REPLY
from fakes import Harness
from typer.testing import CliRunner, Result

from server import cli

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
    with socket.socket() as silent:  # it has the port, so that nobody else gets it, and does not listen
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
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
