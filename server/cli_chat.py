"""`loramux chat`: talk to a running server, and see who answers."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from server.cli_session import HERE, Url, examples, reaching

app = typer.Typer()

Key = Annotated[
    str | None,
    typer.Option("--key", envvar=["LORAMUX_API_KEY", "LORAMUX_ADMIN_KEY"], help="The key, if the server wants one."),
]


@app.command(
    epilog=examples(
        "loramux chat",
        "loramux chat --use pirate --use redact=0.5",
        'loramux chat --auto "Spell this word. lighthouse"',
        "loramux chat --use pirate < questions.txt > answers.txt",
    )
)
def chat(
    message: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="Ask this one thing, and leave with the answer.")
    ] = None,
    use: Annotated[
        list[str] | None, typer.Option("--use", metavar="NAME[=WEIGHT]", help="An adapter that answers; repeatable.")
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="The server chooses adapters by what you write.")] = False,
    router: Annotated[str | None, typer.Option(help="This router chooses.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before everything.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of one answer.")] = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Talk to a running server, switch adapters while you do, and see who answered.

    Without TEXT every line of the input is something to answer, or a command; /help lists them. A backslash at its end
    continues a line.
    """
    if bool(use) + bool(auto or router) > 1:
        raise typer.BadParameter("--use names adapters, --auto and --router leave them to the server: give one of them")
    with reaching(url, key) as client:
        from rich.console import Console

        from server.chat_screen import ChatScreen
        from server.chat_session import ChatSession, Generating

        console = Console(highlight=False)
        is_typed = message is None and sys.stdin.isatty() and console.is_terminal
        aside = console if console.is_terminal else Console(stderr=True, highlight=False)
        session = ChatSession(
            client, ChatScreen(console, aside), time.monotonic, Generating(temperature, max_tokens), is_patient=is_typed
        )
        session.begin(use or (), router or ("" if auto else None), system)
        if is_typed:
            session.greet()
            session.run(typed(lambda: session.selection.label))
        else:
            piped = typer.get_text_stream("stdin", errors="replace")
            session.run([message] if message is not None else joined(line.rstrip("\n") for line in piped))


def typed(label: Callable[[], str]) -> Iterator[str]:
    """What somebody types behind a label, until the end of input. Ctrl-C gives up what is begun."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # `input` then has a history, and keys to edit a line
    begun: list[str] = []
    while True:
        try:
            line = input("... " if begun else f"{label()}> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            begun.clear()
            continue
        begun.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(begun)
            begun.clear()


def joined(lines: Iterator[str]) -> Iterator[str]:
    """Lines, with those that a backslash continues in one."""
    begun: list[str] = []
    for line in lines:
        begun.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(begun)
            begun.clear()
    if begun:
        yield "\n".join(begun)
