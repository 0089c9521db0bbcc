"""Text that a model says to text and calls, piece by piece."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from server.tools.call_scanner import CallScanner
from server.tools.form import ToolForm
from server.tools.json_scanner import WHITESPACE, Progress


@dataclass(frozen=True)
class Text:
    """What is no call."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """The call with this number, counted from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Said = Text | CallBegins | Arguments


class CallParser:
    """Finds calls to `names` in the form of a model; however the text is cut, the same comes out.

    Whatever is no call is text, and nothing of it is lost but the space around calls, which counts only between texts,
    and the beginning of a marker behind a call at the very end, where an answer was cut.
    What looks like a call as far as the beginning of its arguments is one. If these are no JSON further on, they are
    given out as they were said, up to the closing marker. After `most` calls further ones are dropped.
    """

    def __init__(self, form: ToolForm, names: Collection[str], most: int | None = None) -> None:
        self.num_calls = 0
        self._form = form
        self._names = names
        self._most = most
        self._said: list[Said] = []
        self._buffer = ""
        self._has_ended = False
        self._step: Callable[[], bool] = self._start if form.is_bare else self._in_text
        self._opened: list[str] = []  # what was read of a call that may turn out to be none, or behind one
        self._scanner = CallScanner(names)
        self._is_begun = False  # the call that is being read
        self._is_shown = False
        self._is_behind_call = False  # with nothing but space since then
        self._space: list[str] = []
        self._has_text = False

    def feed(self, text: str) -> list[Said]:
        """What is known now and was not before."""
        self._buffer += text
        while self._step():
            pass
        said, self._said = self._said, []
        return said

    def end(self) -> list[Said]:
        """What was held back. The text has ended."""
        self._has_ended = True
        said = self.feed("")
        if self._space and not self.num_calls:
            said.append(Text("".join(self._space)))
        return said

    # Steps take something of the buffer, or choose the next step; False waits for more text.

    def _start(self) -> bool:
        """An object, behind space, is a call without an opening."""
        text = self._buffer.lstrip(WHITESPACE)
        self._opened.append(self._take(len(self._buffer) - len(text)))
        if text.startswith("{"):
            return self._go(self._before_call)
        return bool(text or self._has_ended) and self._is_no_call()

    def _in_text(self) -> bool:
        opening = self._form.opening
        position = self._buffer.find(opening)
        if position >= 0:
            self._say(self._take(position))
            return self._open(len(opening))
        held = self._num_held(opening)
        self._say(self._take(len(self._buffer) - held))
        if self._has_ended and not self._is_behind_call:
            self._say(self._take(held))
        return False

    def _open(self, length: int) -> bool:
        self._opened = [self._take(length)]
        return self._go(self._before_call)

    def _before_call(self) -> bool:
        text = self._buffer.lstrip(WHITESPACE + ("[" if self._form.is_list else ""))
        self._opened.append(self._take(len(self._buffer) - len(text)))
        if text.startswith("{"):
            self._scanner, self._is_begun = CallScanner(self._names), False
            return self._go(self._in_call)
        if text or self._has_ended:
            return self._is_no_call()
        return False

    def _in_call(self) -> bool:
        scanner = self._scanner
        count, progress = scanner.feed(self._buffer)
        taken = self._take(count)
        if scanner.is_certain:
            self._call(scanner)
        else:
            self._opened.append(taken)
        if progress is Progress.DONE or (progress is Progress.BROKEN and scanner.is_whole):
            self._opened = []
            return self._go(self._after_call)
        if progress is Progress.BROKEN:
            return self._go(self._in_broken_arguments) if scanner.is_certain else self._is_no_call()
        return self._has_ended and not scanner.is_certain and self._is_no_call()

    def _after_call(self) -> bool:
        """Space, separators, and then the closing marker, another call, or text."""
        form, text = self._form, self._buffer.lstrip(WHITESPACE + self._form.separators)
        self._opened.append(self._take(len(self._buffer) - len(text)))
        if form.closing and text.startswith(form.closing):
            self._take(len(form.closing))
            self._is_behind_call = True
            return self._go(self._in_text)
        if text.startswith("{"):
            return self._go(self._before_call)
        is_marker = any(marker.startswith(text) for marker in form.markers)  # the whole of it, or what was cut
        return bool(text) and not is_marker and self._is_no_call()

    def _in_broken_arguments(self) -> bool:
        """All up to the closing marker, but the brace that closes the call."""
        closing = self._form.closing
        position = self._buffer.find(closing) if closing else -1
        is_end = position >= 0 or self._has_ended
        if position < 0:
            position = len(self._buffer) - (0 if self._has_ended else self._num_held(closing))
        text = self._buffer[:position].rstrip(WHITESPACE).removesuffix("}")
        if text and self._is_shown:
            self._said.append(Arguments(self.num_calls - 1, text))
        self._take(position + len(closing) if is_end else len(text))
        return is_end and self._go(self._in_text)

    def _is_no_call(self) -> bool:
        self._say("".join(self._opened))
        return self._go(self._in_text)

    def _go(self, step: Callable[[], bool]) -> bool:
        self._step = step
        return True

    def _take(self, count: int) -> str:
        """The beginning of the buffer, which is then gone from it."""
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _num_held(self, marker: str) -> int:
        """Characters at the end of the buffer that may become the marker."""
        longest = min(len(marker) - 1, len(self._buffer))
        return next((count for count in range(longest, 0, -1) if self._buffer.endswith(marker[:count])), 0)

    def _call(self, scanner: CallScanner) -> None:
        """What is known of a call, unless there are enough of them."""
        assert scanner.name is not None
        if not self._is_begun:
            self._is_begun, self._is_shown = True, self._most is None or self.num_calls < self._most
            if self._is_shown:
                self._said.append(CallBegins(self.num_calls, scanner.name))
                self.num_calls += 1
        text = scanner.take()
        if text and self._is_shown:
            self._said.append(Arguments(self.num_calls - 1, text))

    def _say(self, text: str) -> None:
        """Text without the space at its end, which is said when more follows."""
        body = text.rstrip(WHITESPACE)
        if not body:
            self._space += [text] if text else []
            return
        self._is_behind_call = False
        is_after_calls = self.num_calls and not self._has_text
        self._said.append(Text(body.lstrip(WHITESPACE) if is_after_calls else "".join(self._space) + body))
        self._space, self._has_text = [text[len(body) :]] if body != text else [], True
