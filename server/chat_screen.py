"""How a chat looks: answers as they come, and who gave them."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from server.admin_tables import Column, Printer, printable
from server.explanation_view import print_explanation
from server.router_views import REASONS

ADAPTERS = (Column("adapter", style="cyan"), Column("in use", right=True))
COMMANDS = (Column("command", style="cyan"), Column("what it does", spare=1))
MOST_SCORES = 10
EXPLANATIONS = frozenset({"layers", "tokens", "scores"})
"""What the `lora` object has more of where it was asked for."""
_LAYOUT = "\n\t"


class ChatScreen:
    """Answers go to `console`, everything else to `aside`: the same on a terminal, stderr beside a pipe."""

    def __init__(self, console: Console, aside: Console) -> None:
        self._console = console
        self._out = Printer(aside)
        self._is_at_start = True

    def piece(self, text: str) -> None:
        """More of an answer, without what could steer the terminal."""
        shown = "".join(char if char in _LAYOUT else printable(char) for char in text)
        self._console.file.write(shown)
        self._console.file.flush()
        self._is_at_start = shown.endswith("\n")

    def end_of_answer(self) -> None:
        if not self._is_at_start:
            self._console.file.write("\n")
            self._console.file.flush()
        self._is_at_start = True

    def route(self, lora: Mapping[str, Any], num_tokens: int, seconds: float, *, explains: bool) -> None:
        """Who answered, and how fast; with `explains` the scores of who could have, or who led where."""
        speed = f", {num_tokens / seconds:.1f} tokens/s" if seconds > 0 and num_tokens else ""
        self._out.line(f"[{route_line(lora)}; {num_tokens} tokens{speed}]", style="dim")
        if explains and lora.keys() & EXPLANATIONS:
            print_explanation(self._out, lora, MOST_SCORES)

    def adapters(self, names: Sequence[str], used: Mapping[str, float | None], num_more: int) -> None:
        rows = [(name, _use(name, used)) for name in names]
        self._out.table(ADAPTERS, rows, empty="no adapters")
        if num_more > 0:
            self._out.line(f"and {num_more} more; /adapters PART shows those with PART in their names")

    def help(self, commands: Sequence[tuple[str, str]]) -> None:
        self._out.table(COMMANDS, commands)

    def history(self, messages: Sequence[Mapping[str, str]]) -> None:
        if not messages:
            self._out.line("nothing was said yet")
        for message in messages:
            first, *others = message["content"].split("\n")
            self._out.spans([(f"{message['role']}: ", "bold"), (first, "")])
            for line in others:
                self._out.line(line)

    def note(self, text: str) -> None:
        self._out.line(text, style="dim")

    def error(self, text: str) -> None:
        self._out.line(text, style="red")


def route_line(lora: Mapping[str, Any]) -> str:
    """A decision in one line: `retriever chose pirate 0.50 (score 0.83), redact 0.50 (score 0.71) in 0.8 ms`."""
    adapters = ", ".join(_adapter(each) for each in lora.get("adapters", ())) or "the base model"
    composition = lora.get("composition", "mixture")
    if composition != "mixture" and lora.get("adapters"):
        adapters += f" as {composition}"
    if lora.get("router") in (None, "explicit"):
        return adapters
    reason = REASONS.get(lora.get("outcome", ""))
    when = "remembered" if lora.get("cached") else f"in {lora.get('route_ms', 0.0):.1f} ms"
    return f"{lora['router']} chose {adapters} {when}" + (f", since {reason}" if reason else "")


def _adapter(entry: Mapping[str, Any]) -> str:
    known = [f"score {entry['score']:.2f}"] if "score" in entry else []
    known += [f"share {entry['share']:.0%}"] if "share" in entry else []
    return f"{entry['name']} {entry['weight']:.2f}" + (f" ({', '.join(known)})" if known else "")


def _use(name: str, used: Mapping[str, float | None]) -> str:
    if name not in used:
        return ""
    weight = used[name]
    return "yes" if weight is None else f"{weight:g}"
