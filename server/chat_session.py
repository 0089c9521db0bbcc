"""A terminal chat: a conversation, who answers in it, and what lines that begin with a slash do."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.admin_client import AdminClient, AdminError, UsageError
from server.chat_screen import ChatScreen
from server.chat_selection import Selection, SelectionError, parse_adapters

MOST_LISTED = 50

HELP = (
    ("/adapters [PART]", "adapters that you may use, or those with PART in their names"),
    ("/use NAME[=WEIGHT] ...", "these adapters answer; `as fusion` or `as selection` may follow"),
    ("/auto [ROUTER]", "the server chooses adapters by what you write"),
    ("/base", "the base model answers"),
    ("/explain", "shows why the server chose its adapters, or stops showing it"),
    ("/system [TEXT]", "what the model is told before everything; nothing without TEXT"),
    ("/history", "the conversation so far"),
    ("/clear", "begins a new conversation"),
    ("/quit", "leaves, as the end of input does"),
)


@dataclass(frozen=True)
class Generating:
    """How answers are made; None leaves it to the server."""

    temperature: float | None = None
    max_tokens: int | None = None

    def fields(self) -> dict[str, Any]:
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {name: value for name, value in given.items() if value is not None}


class Leaving(Exception):
    """The chat is over."""


class ChatSession:
    """`clock` counts seconds. Where somebody types, `is_patient`: an error or Ctrl-C ends an answer, not the chat."""

    def __init__(
        self,
        client: AdminClient,
        screen: ChatScreen,
        clock: Callable[[], float],
        generating: Generating,
        *,
        is_patient: bool,
    ) -> None:
        self.base = _base_model(client)
        self.selection = Selection(self.base)
        self.system: str | None = None
        self._client = client
        self._screen = screen
        self._clock = clock
        self._generating = generating
        self._is_patient = is_patient
        self._explains = False
        self._messages: list[dict[str, str]] = []
        self._commands: Mapping[str, Callable[[str], None]] = {
            "/help": lambda _: screen.help(HELP),
            "/adapters": self._list,
            "/use": lambda text: self._select(self._adapters(text.split())),
            "/auto": lambda text: self._select(_automatic(text)),
            "/base": lambda _: self._select(Selection(self.base)),
            "/explain": self._toggle_explaining,
            "/system": self._set_system,
            "/history": lambda _: screen.history(self._head + self._messages),
            "/clear": self._clear,
            "/quit": self._leave,
            "/exit": self._leave,
        }

    def begin(self, adapters: Sequence[str], router: str | None, system: str | None) -> None:
        """Who answers at first: adapters if there are any, else a router, `""` being the server's; else the base."""
        self.system = system
        if adapters:
            self.selection = self._adapters(adapters)
        elif router is not None:
            self.selection = _automatic(router)

    def greet(self) -> None:
        self._screen.note(f"{self.base} at {self._client.url}; /help lists commands, Ctrl-C stops an answer")

    def run(self, lines: Iterable[str]) -> None:
        """Do what every line says, until they end. Raises AdminError unless `is_patient`."""
        with contextlib.suppress(Leaving):
            for line in lines:
                try:
                    self.take(line)
                except AdminError as error:
                    if not self._is_patient:
                        raise
                    self._screen.error(str(error))
                except KeyboardInterrupt:
                    if not self._is_patient:
                        raise
                    self._screen.note("stopped")

    def take(self, line: str) -> None:
        """A command, or something to answer; `//` begins a text that begins with a slash. Raises AdminError."""
        text = line.encode(errors="replace").decode().strip()  # a terminal may send what is no text
        if not text:
            return
        if not text.startswith("/") or text.startswith("//"):
            self._answer(text.removeprefix("/") if text.startswith("//") else text)
            return
        name, _, rest = text.partition(" ")
        command = self._commands.get(name)
        if command is None:
            raise UsageError(f"{name}: there is no such command, /help lists all")
        command(rest.strip())

    @property
    def _head(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _answer(self, text: str) -> None:
        """One turn. What has come of an answer stays in the conversation, also of one that was stopped."""
        self._messages.append({"role": "user", "content": text})
        fields = self.selection.fields()
        lora = {**fields.get("lora", {}), **({"explain": True} if self._explains else {})}
        body = {**fields, **self._generating.fields(), "messages": self._head + self._messages, "lora": lora}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = _Answer(self._clock())
        try:
            with contextlib.closing(self._client.events(f"{self._client.url}/v1/chat/completions", body)) as events:
                for piece in answer.read(events, self._clock):
                    self._screen.piece(piece)
            self._screen.end_of_answer()
            self._screen.route(answer.lora, answer.num_tokens, answer.seconds, explains=self._explains)
        finally:
            self._screen.end_of_answer()
            if answer.text:
                self._messages.append({"role": "assistant", "content": answer.text})
            else:
                self._messages.pop()

    def _adapters(self, words: Sequence[str]) -> Selection:
        """What the words say. Raises AdminError, also where an adapter does not exist."""
        try:
            selection = parse_adapters(words, self.base)
        except SelectionError as error:
            raise UsageError(str(error)) from error
        known = set(self._names())
        for name, _ in selection.adapters:
            if name.partition("@")[0] not in known:
                raise UsageError(f"there is no adapter {name}, /adapters lists all")
        return selection

    def _names(self) -> list[str]:
        """Of all adapters: the models that the base is the parent of."""
        models = self._client.pages(f"{self._client.url}/v1/models", {})["data"]
        return [str(model["id"]) for model in models if model.get("parent") == self.base]

    def _list(self, part: str) -> None:
        used = {name.partition("@")[0]: weight for name, weight in self.selection.adapters}
        found = [name for name in self._names() if part in name]
        self._screen.adapters(found[:MOST_LISTED], used, len(found) - MOST_LISTED)

    def _select(self, selection: Selection) -> None:
        self.selection = selection
        self._screen.note(f"now {selection.label} answers")

    def _toggle_explaining(self, _: str) -> None:
        self._explains = not self._explains
        self._screen.note("routes are explained" if self._explains else "routes are no longer explained")

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._screen.note("the model is told so" if text else "the model is told nothing before")

    def _clear(self, _: str) -> None:
        self._messages.clear()
        self._screen.note("a new conversation")

    def _leave(self, _: str) -> None:
        raise Leaving


class _Answer:
    """What has come of one answer. Times are in seconds."""

    def __init__(self, started: float) -> None:
        self.text = ""
        self.lora: Mapping[str, Any] = {}
        self.num_tokens = 0
        self.seconds = 0.0
        self._started = started

    def read(self, events: Iterable[Mapping[str, Any]], clock: Callable[[], float]) -> Iterator[str]:
        """Its pieces of text."""
        for event in events:
            for choice in event.get("choices", ()):
                piece = choice.get("delta", {}).get("content") or ""
                self.text += piece
                if piece:
                    yield piece
            self.lora = event.get("lora") or self.lora
            usage = event.get("usage")
            self.num_tokens = usage["completion_tokens"] if usage else self.num_tokens
        self.seconds = clock() - self._started


def _automatic(router: str) -> Selection:
    return Selection(f"auto:{router}" if router else "auto")


def _base_model(client: AdminClient) -> str:
    """The served name of the base model, which every list of models begins with. Raises AdminError."""
    models = client.get(f"{client.url}/v1/models", {"limit": 1}).get("data")
    if not models:
        raise AdminError(f"{client.url} serves no model: is a loramux server there?")
    return str(models[0]["id"])
